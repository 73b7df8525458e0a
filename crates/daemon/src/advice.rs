//! What a guest could do better with the queue pairs it was given, and the command that mends it.
//!
//! A driver starts with few pairs and scripts raise their number later; so only what has stood still
//! for a while is spoken of, once. The number of interrupt vectors never reaches a back-end: QEMU is
//! asked for it where it has a monitor for us, once a connection and by a thread of its own.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_placement::{QemuNetDevice, query_net_device};

use crate::net_device::{NetDevice, is_in_use};

/// How long the guest's choice must have stood.
const MIN_STABLE: Duration = Duration::from_secs(8);

/// How long QEMU may take to answer, and how often it is tried.
const QMP_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_QMP_ATTEMPTS: u32 = 3;

/// What the guest does with its queue pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueUsage {
    /// Pairs that the front-end has.
    pub offered: u16,
    /// Pairs that the driver enabled.
    pub enabled: u16,
    /// Whether the driver took the feature of several pairs.
    pub multiqueue: bool,
    /// The guest's vCPUs, where they are known.
    pub vcpus: Option<u16>,
}

impl QueueUsage {
    /// How the guest of `net_device` uses it now; `None` while it uses no pair at all.
    #[must_use]
    pub fn of(net_device: &NetDevice) -> Option<Self> {
        let frontend = net_device.frontend();
        let live = || net_device.pairs().filter(|pair| is_in_use(pair));
        // Between them, the pairs in use have all vCPUs.
        let vcpus: BTreeSet<u32> = live()
            .filter_map(|pair| pair.placement())
            .flat_map(|placement| placement.decision.vcpus)
            .collect();
        let enabled = u16::try_from(live().count()).unwrap_or(u16::MAX);
        (frontend.connected && enabled > 0).then(|| Self {
            offered: frontend.pairs,
            enabled,
            multiqueue: frontend.features.names().contains(&"MQ"),
            vcpus: u16::try_from(vcpus.len()).ok().filter(|count| *count > 0),
        })
    }
}

/// What is said to one device's guest.
#[derive(Debug)]
pub struct Adviser {
    device: String,
    /// QEMU's monitor and the vhost-user socket that tells which card is meant.
    monitor: Option<(PathBuf, PathBuf)>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    usage: Option<(QueueUsage, Instant)>,
    qmp_attempts: u32,
    /// What QEMU said of its card.
    net_device: Option<QemuNetDevice>,
    /// Somebody is with QEMU's monitor.
    is_querying: bool,
    current: Vec<String>,
    reported: Vec<String>,
}

impl Adviser {
    /// For `device`, whose front-end has a monitor and connects on a socket, where those are known.
    #[must_use]
    pub fn new(device: &str, monitor: Option<PathBuf>, socket: Option<PathBuf>) -> Self {
        Self {
            device: device.to_owned(),
            monitor: monitor.map(|monitor| (monitor, socket.unwrap_or_default())),
            state: Arc::default(),
        }
    }

    /// What there is to say now.
    #[must_use]
    pub fn current(&self) -> Vec<String> {
        self.state.lock().current.clone()
    }

    /// Notes what `observe` says that the guest does now; `None` while it uses no pair at all.
    pub fn update(&self, observe: impl FnOnce() -> Option<QueueUsage>, now: Instant) {
        // Looked at under the lock: a front-end that goes meanwhile is forgotten after it.
        let mut state = self.state.lock();
        let Some(usage) = observe() else {
            // The guest boots again, perhaps: what was said is not said again.
            let reported = std::mem::take(&mut state.reported);
            let is_querying = state.is_querying;
            *state = State {
                reported,
                is_querying,
                ..State::default()
            };
            return;
        };
        let since = match state.usage {
            Some((before, since)) if before == usage => since,
            _ => now,
        };
        state.usage = Some((usage, since));
        if now.saturating_duration_since(since) < MIN_STABLE {
            return;
        }
        self.query_vectors(&mut state);
        let mut advice: Vec<String> = idle_pairs_advice(usage).into_iter().collect();
        advice.extend(
            state
                .net_device
                .as_ref()
                .and_then(|net_device| vectors_advice(usage, net_device)),
        );
        for line in advice.iter().filter(|line| !state.reported.contains(line)) {
            tracing::warn!("{}: {line}", self.device);
        }
        if advice != state.current {
            state.reported.clone_from(&advice);
            state.current = advice;
        }
    }

    /// The front-end has gone: the next one is told all anew.
    pub fn reset(&self) {
        self.update(|| None, Instant::now());
        self.state.lock().reported.clear();
    }

    /// Has QEMU asked for its card, until it has said.
    fn query_vectors(&self, state: &mut State) {
        let Some((monitor, socket)) = self.monitor.clone() else {
            return;
        };
        if state.net_device.is_some() || state.is_querying || state.qmp_attempts >= MAX_QMP_ATTEMPTS
        {
            return;
        }
        state.is_querying = true;
        state.qmp_attempts += 1;
        let (shared, device) = (Arc::clone(&self.state), self.device.clone());
        let spawned = std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || {
                let answer = query_net_device(&monitor, &socket, QMP_TIMEOUT);
                let mut state = shared.lock();
                state.is_querying = false;
                match answer {
                    Ok(Some(net_device)) if state.usage.is_some() => {
                        state.net_device = Some(net_device)
                    }
                    Ok(_) => {}
                    Err(error) => tracing::debug!("{device}: QEMU's card is not known: {error}"),
                }
            });
        if spawned.is_err() {
            state.is_querying = false;
        }
    }
}

/// What to do about pairs that lie idle.
fn idle_pairs_advice(usage: QueueUsage) -> Option<String> {
    let QueueUsage {
        offered, enabled, ..
    } = usage;
    if enabled == 0 || enabled >= offered {
        return None;
    }
    let head = format!("the guest uses {enabled} of its {offered} queue pairs");
    Some(match usage.vcpus {
        _ if !usage.multiqueue => format!(
            "{head}, because its driver was not offered several or does not know them: add mq=on to QEMU's -device virtio-net-pci"
        ),
        Some(vcpus) if enabled >= vcpus => format!(
            "{head}, one for each of its {vcpus} vCPUs: queues={vcpus} at QEMU's -netdev would do; to use all, run `ethtool -L IFACE combined {offered}` in the guest"
        ),
        Some(vcpus) => format!(
            "{head} though it has {vcpus} vCPUs: run `ethtool -L IFACE combined {}` in the guest",
            offered.min(vcpus)
        ),
        None => format!("{head}: run `ethtool -L IFACE combined {offered}` in the guest"),
    })
}

/// What to do about vectors that are too few for one a ring. The control queue needs none of its
/// own with Linux's driver, so one less than is usually given serves as well.
fn vectors_advice(usage: QueueUsage, net_device: &QemuNetDevice) -> Option<String> {
    let pairs = u32::from(usage.offered);
    let plenty = 2 * pairs + 2;
    (net_device.vectors.saturating_add(1) < plenty).then(|| {
        format!(
            "the guest's card (netdev {}) has {} interrupt vectors for {pairs} queue pairs, so queues share one and their interrupts cannot be spread over vCPUs: use vectors={plenty} at QEMU's -device virtio-net-pci",
            net_device.netdev, net_device.vectors
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(enabled: u16, offered: u16, vcpus: Option<u16>) -> QueueUsage {
        QueueUsage {
            offered,
            enabled,
            multiqueue: true,
            vcpus,
        }
    }

    #[test]
    fn idle_pairs_are_told_with_the_command() {
        for (usage, words) in [
            (usage(4, 4, Some(4)), None),
            (usage(0, 4, Some(4)), None),
            (usage(1, 1, None), None),
            (
                usage(1, 4, Some(4)),
                Some(
                    "1 of its 4 queue pairs though it has 4 vCPUs: run `ethtool -L IFACE combined 4`",
                ),
            ),
            (
                usage(2, 8, Some(4)),
                Some("run `ethtool -L IFACE combined 4`"),
            ),
            (
                usage(2, 4, Some(2)),
                Some("one for each of its 2 vCPUs: queues=2 at QEMU's -netdev would do"),
            ),
            (usage(1, 4, None), Some("run `ethtool -L IFACE combined 4`")),
            (
                QueueUsage {
                    multiqueue: false,
                    ..usage(1, 4, Some(4))
                },
                Some("add mq=on"),
            ),
        ] {
            let said = idle_pairs_advice(usage);
            assert_eq!(said.is_some(), words.is_some(), "{usage:?}: {said:?}");
            if let (Some(said), Some(words)) = (said, words) {
                assert!(said.contains(words), "{usage:?}: {said}");
            }
        }
    }

    #[test]
    fn too_few_vectors_are_told_with_the_right_number() {
        for (pairs, have, enough) in [
            (1, 4, true),
            (1, 3, true),
            (1, 2, false),
            (4, 10, true),
            (4, 9, true),
            (4, 8, false),
            (4, 3, false),
            (4, 0, false),
            (4, u32::MAX, true),
        ] {
            let net_device = QemuNetDevice {
                netdev: "net0".into(),
                vectors: have,
                mq: true,
            };
            let said = vectors_advice(usage(pairs, pairs, None), &net_device);
            assert_eq!(said.is_none(), enough, "{pairs} {have}: {said:?}");
            if let Some(said) = said {
                assert!(
                    said.contains(&format!("vectors={}", 2 * pairs + 2)),
                    "{said}"
                );
            }
        }
    }

    #[test]
    fn only_what_has_stood_for_a_while_is_said_and_goes_when_mended() {
        let adviser = Adviser::new("vnet", None, None);
        let start = Instant::now();
        let few = Some(usage(1, 4, Some(4)));
        adviser.update(|| few, start);
        adviser.update(|| few, start + MIN_STABLE / 2);
        assert_eq!(adviser.current(), [""; 0]);
        // Another choice starts the time anew.
        adviser.update(|| Some(usage(2, 4, Some(4))), start + MIN_STABLE / 2);
        adviser.update(|| Some(usage(2, 4, Some(4))), start + MIN_STABLE);
        assert_eq!(adviser.current(), [""; 0]);
        adviser.update(|| Some(usage(2, 4, Some(4))), start + 2 * MIN_STABLE);
        assert_eq!(adviser.current().len(), 1);
        adviser.update(|| Some(usage(4, 4, Some(4))), start + 3 * MIN_STABLE);
        adviser.update(|| Some(usage(4, 4, Some(4))), start + 4 * MIN_STABLE);
        assert_eq!(adviser.current(), [""; 0]);
        adviser.update(|| few, start + 5 * MIN_STABLE);
        adviser.update(|| few, start + 6 * MIN_STABLE);
        assert_eq!(adviser.current().len(), 1);
        adviser.update(|| None, start + 7 * MIN_STABLE);
        assert_eq!(adviser.current(), [""; 0]);
    }
}
