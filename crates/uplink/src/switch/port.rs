//! A device's port: the receiveqs of its queue pairs, which of them are attached, and the offloads
//! that its driver negotiated.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{OnceLock, Weak};

use parking_lot::{Mutex, RwLock};
use virtionet_virtio_net::header::{FrameFormat, VNET_HEADER_LEN};
use virtionet_virtio_net::uplink::{RxSink, TxFrame};

use super::flow_table::{FlowTable, MAX_PAIRS, PairSet};

/// The receiveq of a queue pair, if the pair was used.
type PairReceiveq = RwLock<Option<Weak<dyn RxSink>>>;

/// The port of a device. The fields that senders read change only when the guest's driver is
/// reconfigured, and when the device is removed. The port can then be that of another device.
#[derive(Debug)]
pub(super) struct DevicePort {
    /// The device's name; empty while there is none.
    device: Mutex<String>,
    /// The MTU that the front-end has set; 0 where it has not.
    mtu: AtomicU16,
    /// A bit for each of [`MAX_PAIRS`] pairs.
    attached: [AtomicU64; 2],
    /// The negotiated offloads as [`pack`] encodes them.
    format: AtomicU8,
    /// Written only when a queue pair is first used, and when the device is removed.
    pairs: Box<[PairReceiveq]>,
    /// Created when a second pair is attached.
    flows: OnceLock<FlowTable>,
}

impl DevicePort {
    pub(super) fn new(device: &str) -> Self {
        Self {
            device: Mutex::new(device.to_owned()),
            mtu: AtomicU16::new(0),
            attached: [AtomicU64::new(0), AtomicU64::new(0)],
            format: AtomicU8::new(0),
            pairs: (0..MAX_PAIRS).map(|_| RwLock::default()).collect(),
            flows: OnceLock::new(),
        }
    }

    /// The device's name; empty while there is none.
    pub(super) fn device(&self) -> String {
        self.device.lock().clone()
    }

    /// Makes this the port of another device, which has no queue pairs yet.
    pub(super) fn set_device(&self, device: &str) {
        device.clone_into(&mut self.device.lock());
    }

    /// Forgets the device, whose worker has ended.
    pub(super) fn clear(&self) {
        for word in &self.attached {
            word.store(0, Ordering::Relaxed);
        }
        for pair in &self.pairs {
            *pair.write() = None;
        }
        self.set_mtu(0);
        self.format.store(0, Ordering::Relaxed);
        if let Some(flows) = self.flows.get() {
            flows.clear();
        }
        self.set_device("");
    }

    pub(super) fn set_mtu(&self, mtu: u16) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// The MTU that the front-end has set; 0 where it has not.
    pub(super) fn mtu(&self) -> u16 {
        self.mtu.load(Ordering::Relaxed)
    }

    /// Sets the receiveq of a detached pair; returns false when the index is too high. A receiveq
    /// that is set already stays.
    pub(super) fn add_pair(&self, pair: u16, rx: Weak<dyn RxSink>) -> bool {
        match self.pairs.get(usize::from(pair)) {
            Some(slot) => {
                slot.write().get_or_insert(rx);
                true
            }
            None => false,
        }
    }

    pub(super) fn set_attached(&self, pair: u16, attached: bool) {
        let Some(word) = self.attached.get(usize::from(pair / 64)) else {
            return;
        };
        let bit = 1 << (pair % 64);
        match attached {
            true => word.fetch_or(bit, Ordering::Relaxed),
            false => word.fetch_and(!bit, Ordering::Relaxed),
        };
        if self.attached().has_several() {
            self.flows.get_or_init(FlowTable::new);
        }
    }

    /// The pairs that are attached.
    #[inline(always)]
    pub(super) fn attached(&self) -> PairSet {
        let [low, high] = &self.attached;
        let [low, high] = [low, high].map(|word| u128::from(word.load(Ordering::Relaxed)));
        PairSet(high << 64 | low)
    }

    /// The table of the port's flows; `None` until several pairs were attached.
    #[inline(always)]
    pub(super) fn flows(&self) -> Option<&FlowTable> {
        self.flows.get()
    }

    /// Takes the entries of a table of the same switch's seed.
    pub(super) fn restore_flows(&self, entries: &[(u16, u64)], now: u32) {
        self.flows.get_or_init(FlowTable::new).restore(entries, now);
    }

    pub(super) fn set_format(&self, format: FrameFormat) {
        self.format.store(pack(format), Ordering::Relaxed);
    }

    /// The offloads that the driver negotiated. The header's length has no meaning here, because
    /// the receiveq stores it.
    #[inline(always)]
    pub(super) fn format(&self) -> FrameFormat {
        unpack(self.format.load(Ordering::Relaxed))
    }

    /// Pushes `frames` to the receiveq of a pair, which may call `release` when they are copied.
    #[inline(always)]
    pub(super) fn push(
        &self,
        pair: u16,
        frames: &[TxFrame<'_>],
        release: &mut dyn FnMut(),
    ) -> usize {
        if frames.is_empty() {
            return 0;
        }
        let Some(slot) = self.pairs.get(usize::from(pair)) else {
            return 0;
        };
        // The lock is not held while frames are pushed.
        let rx = slot.read().as_ref().and_then(Weak::upgrade);
        rx.map_or(0, |rx| rx.push_releasing(frames, release))
    }
}

fn pack(format: FrameFormat) -> u8 {
    u8::from(format.csum)
        | u8::from(format.tso4) << 1
        | u8::from(format.tso6) << 2
        | u8::from(format.ecn) << 3
        | u8::from(format.ufo) << 4
}

#[inline(always)]
fn unpack(bits: u8) -> FrameFormat {
    let has = |bit: u8| bits >> bit & 1 == 1;
    FrameFormat {
        header_len: VNET_HEADER_LEN,
        csum: has(0),
        tso4: has(1),
        tso6: has(2),
        ecn: has(3),
        ufo: has(4),
    }
}
