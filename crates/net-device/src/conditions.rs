//! What is wrong with a device now, apart from its placement: shown as warnings for as long as it
//! lasts, and logged once when it begins and once when it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use parking_lot::Mutex;
use virtionet_base::ReportOnce;

/// What can be wrong with a device. At most one condition of each kind is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConditionKind {
    /// There is no connection to the front-end's socket.
    Unconnected,
    /// The last session ended because the guest's memory is not shared.
    MemoryNotShared,
    /// The front-end's process is stopped.
    FrontendStopped,
    /// The uplink does not take the MTU that the front-end set.
    Mtu,
    /// The uplink is gone or down.
    Uplink,
    /// Another device of the switch uses the same MAC address.
    AddressConflict,
    /// A page of the guest's memory is gone.
    MemoryLost,
    /// The guest uses memory that is not shared.
    AddressesInvalid,
    /// The progress of a packed vring is lost.
    BaseImplausible,
    /// The progress of packed vrings is not recorded.
    NoCrashRecord,
    /// The front-end was offered features that the device no longer offers.
    FeaturesKept,
}

/// The conditions that end with the front-end's connection.
const OF_THE_CONNECTION: [ConditionKind; 7] = [
    ConditionKind::FrontendStopped,
    ConditionKind::Mtu,
    ConditionKind::AddressConflict,
    ConditionKind::MemoryLost,
    ConditionKind::AddressesInvalid,
    ConditionKind::BaseImplausible,
    ConditionKind::FeaturesKept,
];

/// The conditions of one device. Each is logged when it begins, at most once a second for each
/// kind, and its end is logged if its beginning was.
#[derive(Debug, Default)]
pub struct Conditions(Mutex<ConditionState>);

#[derive(Debug, Default)]
struct ConditionState {
    current: BTreeMap<ConditionKind, String>,
    logged: BTreeSet<ConditionKind>,
    reports: ReportOnce<ConditionKind, (ConditionKind, String)>,
}

impl Conditions {
    /// Enters a condition of `device`, described by one sentence.
    pub fn set(&self, device: &str, kind: ConditionKind, text: &str) {
        let lines = self.0.lock().set(kind, text, Instant::now());
        log(device, &lines);
    }

    /// Leaves a condition, if it is in force; `text` says so in the log.
    pub fn clear(&self, device: &str, kind: ConditionKind, text: &str) {
        let (lines, is_end_logged) = self.0.lock().clear(&[kind], Instant::now());
        log(device, &lines);
        if is_end_logged {
            tracing::info!("{device}: {text}");
        }
    }

    /// Whether a condition is in force.
    #[must_use]
    pub fn has(&self, kind: ConditionKind) -> bool {
        self.0.lock().current.contains_key(&kind)
    }

    /// Leaves all conditions that end with the front-end's connection.
    pub fn clear_connection(&self, device: &str) {
        let (lines, _) = self.0.lock().clear(&OF_THE_CONNECTION, Instant::now());
        log(device, &lines);
    }

    /// The conditions in force, one sentence each.
    #[must_use]
    pub fn current(&self) -> Vec<String> {
        self.0.lock().current.values().cloned().collect()
    }
}

fn log(device: &str, lines: &[String]) {
    lines
        .iter()
        .for_each(|line| tracing::warn!("{device}: {line}"));
}

impl ConditionState {
    /// Enters a condition. Returns the lines to be logged.
    fn set(&mut self, kind: ConditionKind, text: &str, now: Instant) -> Vec<String> {
        self.current.insert(kind, text.to_owned());
        self.take_lines(now)
    }

    /// Leaves conditions. Returns the lines to be logged, and whether the end is to be logged, too.
    fn clear(&mut self, kinds: &[ConditionKind], now: Instant) -> (Vec<String>, bool) {
        let before = self.current.len();
        self.current.retain(|kind, _| !kinds.contains(kind));
        if self.current.len() == before {
            return (Vec::new(), false);
        }
        let was_logged = kinds.iter().filter(|kind| self.logged.remove(kind)).count() > 0;
        (self.take_lines(now), was_logged)
    }

    /// The lines of all conditions that are due, among them those that came too soon before.
    fn take_lines(&mut self, now: Instant) -> Vec<String> {
        let present: Vec<_> = self.current.clone().into_iter().collect();
        let (due, _) = self.reports.update(&present, |(kind, _)| *kind, now);
        self.logged.extend(due.iter().map(|(kind, _)| *kind));
        due.into_iter().map(|(_, text)| text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn condition_is_in_force_until_it_is_left() {
        let conditions = Conditions::default();
        conditions.set("net0", ConditionKind::Mtu, "too small");
        conditions.set("net0", ConditionKind::Uplink, "gone");
        conditions.set("net0", ConditionKind::Uplink, "down");
        assert_eq!(conditions.current(), ["too small", "down"]);
        conditions.clear_connection("net0");
        assert_eq!(conditions.current(), ["down"]);
        conditions.clear("net0", ConditionKind::Uplink, "up");
        assert!(conditions.current().is_empty());
    }

    /// As a front-end can cause by SET_MTU.
    #[test]
    fn condition_that_comes_and_goes_is_logged_at_most_once_a_second() {
        let mut state = ConditionState::default();
        let start = Instant::now();
        let mut lines = 0;
        for millis in 0..1900 {
            let now = start + Duration::from_millis(millis);
            lines += state.set(ConditionKind::Mtu, "too small", now).len();
            lines += usize::from(state.clear(&[ConditionKind::Mtu], now).1);
        }
        assert_eq!(lines, 4, "two beginnings and two ends");
    }

    #[test]
    fn condition_that_lasts_is_logged_once() {
        let mut state = ConditionState::default();
        let start = Instant::now();
        let lines = (0..40).map(|quarter| {
            let now = start + Duration::from_millis(250 * quarter);
            state.set(ConditionKind::Uplink, "gone", now).len()
        });
        assert_eq!(lines.sum::<usize>(), 1);
    }
}
