//! What a device hands over to the next daemon, beside its session.

use std::collections::BTreeMap;
use std::sync::Arc;

use virtionet_handover::PairCounters;
use virtionet_virtio_net::DeviceQueue;
use virtionet_virtio_net::stats::{VringStats, WorkerStats};

use super::NetDevice;
use crate::crash_records::CrashRecords;
use crate::vring_slot::VringSlot;

impl NetDevice {
    /// The records of the progress of packed vrings.
    pub fn crash_records(&self) -> Option<&CrashRecords> {
        self.crash_records.as_ref()
    }

    /// What the device's frames go to: `null`, `tap NAME`, `switch NAME`.
    pub fn uplink_text(&self) -> String {
        format!("{} {}", self.uplink.kind(), self.uplink.name())
    }

    /// The counters of the queue pairs.
    pub fn counters(&self) -> BTreeMap<u16, PairCounters> {
        let counters = self.pairs().map(|served| {
            let counters = PairCounters {
                rx: vring_counters(served.pair.rx()),
                tx: vring_counters(served.pair.tx()),
                worker: by_name(WorkerStats::NAMES, served.pair.worker_stats().values()),
            };
            (served.pair.index(), counters)
        });
        counters.collect()
    }

    /// Adds the counters of the daemon before this one, while nothing else counts.
    pub fn add_counters(&self, counters: &BTreeMap<u16, PairCounters>) {
        for (index, counters) in counters {
            let Some(place) = self.pairs.get(usize::from(*index)) else {
                continue;
            };
            let served = place.get_or_init(|| self.create_pair(*index));
            add_to(served.pair.rx().stats(), &counters.rx);
            add_to(served.pair.tx().stats(), &counters.tx);
            for (name, n) in &counters.worker {
                served.pair.worker_stats().add_to(name, *n);
            }
        }
    }
}

fn vring_counters<Q: DeviceQueue>(slot: &VringSlot<Q>) -> BTreeMap<String, u64> {
    by_name(VringStats::NAMES, slot.stats().values())
}

fn by_name(names: &[(&str, &str)], values: Vec<u64>) -> BTreeMap<String, u64> {
    let counters = names.iter().map(|(name, _)| (*name).to_owned()).zip(values);
    counters.filter(|(_, n)| *n != 0).collect()
}

fn add_to(stats: &Arc<VringStats>, counters: &BTreeMap<String, u64>) {
    for (name, n) in counters {
        stats.add_to(name, *n);
    }
}
