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
use virtionet_placement::{GuestCard, guest_card};

use crate::card::{Card, is_live};

/// How long the guest's choice must have stood.
const SETTLED: Duration = Duration::from_secs(8);

/// How long QEMU may take to answer, and how often it is tried.
const PATIENCE: Duration = Duration::from_secs(2);
const TRIES: u32 = 3;

/// What the guest does with its queue pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// Pairs that the front-end has.
    pub offered: u16,
    /// Pairs that the driver enabled.
    pub enabled: u16,
    /// Whether the driver took the feature of several pairs.
    pub multiqueue: bool,
    /// The guest's vCPUs, where they are known.
    pub vcpus: Option<u16>,
}

impl Use {
    /// How the guest of `card` uses it now; `None` while it uses no pair at all.
    #[must_use]
    pub fn of(card: &Card) -> Option<Self> {
        let link = card.link();
        let live = || card.pairs().filter(|pair| is_live(pair));
        // Between them, the pairs in use have all vCPUs.
        let vcpus: BTreeSet<u32> = live()
            .filter_map(|pair| pair.placed())
            .flat_map(|placed| placed.decision.vcpus)
            .collect();
        let enabled = u16::try_from(live().count()).unwrap_or(u16::MAX);
        (link.connected && enabled > 0).then(|| Self {
            offered: link.pairs,
            enabled,
            multiqueue: link.features.names().contains(&"MQ"),
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
    usage: Option<(Use, Instant)>,
    asked: u32,
    /// What QEMU said of its card.
    card: Option<GuestCard>,
    /// Somebody is with QEMU's monitor.
    asking: bool,
    current: Vec<String>,
    told: Vec<String>,
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

    /// Notes what `look` says that the guest does now; `None` while it uses no pair at all.
    pub fn look(&self, look: impl FnOnce() -> Option<Use>, now: Instant) {
        // Looked at under the lock: a front-end that goes meanwhile is forgotten after it.
        let mut state = self.state.lock();
        let Some(usage) = look() else {
            // The guest boots again, perhaps: what was said is not said again.
            let told = std::mem::take(&mut state.told);
            let asking = state.asking;
            *state = State {
                told,
                asking,
                ..State::default()
            };
            return;
        };
        let since = match state.usage {
            Some((before, since)) if before == usage => since,
            _ => now,
        };
        state.usage = Some((usage, since));
        if now.saturating_duration_since(since) < SETTLED {
            return;
        }
        self.ask(&mut state);
        let mut advice: Vec<String> = pairs(usage).into_iter().collect();
        advice.extend(state.card.as_ref().and_then(|card| vectors(usage, card)));
        for line in advice.iter().filter(|line| !state.told.contains(line)) {
            tracing::warn!("{}: {line}", self.device);
        }
        if advice != state.current {
            state.told.clone_from(&advice);
            state.current = advice;
        }
    }

    /// The front-end has gone: the next one is told all anew.
    pub fn forget(&self) {
        self.look(|| None, Instant::now());
        self.state.lock().told.clear();
    }

    /// Has QEMU asked for its card, until it has said.
    fn ask(&self, state: &mut State) {
        let Some((monitor, socket)) = self.monitor.clone() else {
            return;
        };
        if state.card.is_some() || state.asking || state.asked >= TRIES {
            return;
        }
        state.asking = true;
        state.asked += 1;
        let (shared, device) = (Arc::clone(&self.state), self.device.clone());
        let asked = std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || {
                let answer = guest_card(&monitor, &socket, PATIENCE);
                let mut state = shared.lock();
                state.asking = false;
                match answer {
                    Ok(Some(card)) if state.usage.is_some() => state.card = Some(card),
                    Ok(_) => {}
                    Err(error) => tracing::debug!("{device}: QEMU's card is not known: {error}"),
                }
            });
        if asked.is_err() {
            state.asking = false;
        }
    }
}

/// What to do about pairs that lie idle.
fn pairs(usage: Use) -> Option<String> {
    let Use {
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
fn vectors(usage: Use, card: &GuestCard) -> Option<String> {
    let pairs = u32::from(usage.offered);
    let plenty = 2 * pairs + 2;
    (card.vectors.saturating_add(1) < plenty).then(|| {
        format!(
            "the guest's card (netdev {}) has {} interrupt vectors for {pairs} queue pairs, so queues share one and their interrupts cannot be spread over vCPUs: use vectors={plenty} at QEMU's -device virtio-net-pci",
            card.netdev, card.vectors
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(enabled: u16, offered: u16, vcpus: Option<u16>) -> Use {
        Use {
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
                Use {
                    multiqueue: false,
                    ..usage(1, 4, Some(4))
                },
                Some("add mq=on"),
            ),
        ] {
            let said = pairs(usage);
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
            let card = GuestCard {
                netdev: "net0".into(),
                vectors: have,
                mq: true,
            };
            let said = vectors(usage(pairs, pairs, None), &card);
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
        adviser.look(|| few, start);
        adviser.look(|| few, start + SETTLED / 2);
        assert_eq!(adviser.current(), [""; 0]);
        // Another choice starts the time anew.
        adviser.look(|| Some(usage(2, 4, Some(4))), start + SETTLED / 2);
        adviser.look(|| Some(usage(2, 4, Some(4))), start + SETTLED);
        assert_eq!(adviser.current(), [""; 0]);
        adviser.look(|| Some(usage(2, 4, Some(4))), start + 2 * SETTLED);
        assert_eq!(adviser.current().len(), 1);
        adviser.look(|| Some(usage(4, 4, Some(4))), start + 3 * SETTLED);
        adviser.look(|| Some(usage(4, 4, Some(4))), start + 4 * SETTLED);
        assert_eq!(adviser.current(), [""; 0]);
        adviser.look(|| few, start + 5 * SETTLED);
        adviser.look(|| few, start + 6 * SETTLED);
        assert_eq!(adviser.current().len(), 1);
        adviser.look(|| None, start + 7 * SETTLED);
        assert_eq!(adviser.current(), [""; 0]);
    }
}
