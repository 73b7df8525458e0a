//! What is wrong with a device now, apart from its placement: shown as warnings for as long as it
//! lasts, and logged once when it begins and once when it ends.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use virtionet_base::RateLimiter;

/// What can be wrong with a device. At most one condition of each kind is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
}

/// The conditions of one device.
#[derive(Debug, Default)]
pub struct Conditions {
    current: Mutex<BTreeMap<ConditionKind, Condition>>,
    /// Of log lines, since a condition may come and go at any rate.
    limiter: RateLimiter,
}

/// A condition that is in force.
#[derive(Debug)]
struct Condition {
    text: String,
    is_logged: bool,
}

impl Conditions {
    /// Enters a condition of `device`, described by one sentence. A line that the limiter
    /// suppresses is logged when the condition is entered again and still in force.
    pub fn set(&self, device: &str, kind: ConditionKind, text: &str) {
        let mut current = self.current.lock();
        let is_known = current.get(&kind).is_some_and(|c| c.text == text);
        if is_known && current.get(&kind).is_some_and(|c| c.is_logged) {
            return;
        }
        let allowed = self.limiter.allow();
        let condition = Condition {
            text: text.to_owned(),
            is_logged: allowed.is_some(),
        };
        current.insert(kind, condition);
        drop(current);
        if let Some(suppressed) = allowed {
            tracing::warn!(suppressed, "{device}: {text}");
        }
    }

    /// Leaves a condition, if it is in force; `text` says so in the log.
    pub fn clear(&self, device: &str, kind: ConditionKind, text: &str) {
        let before = self.current.lock().remove(&kind);
        if before.is_some() {
            tracing::info!("{device}: {text}");
        }
    }

    /// Whether a condition is in force.
    #[must_use]
    pub fn has(&self, kind: ConditionKind) -> bool {
        self.current.lock().contains_key(&kind)
    }

    /// Leaves all conditions that end with the front-end's connection.
    pub fn clear_connection(&self) {
        self.current.lock().retain(|kind, _| match kind {
            ConditionKind::FrontendStopped
            | ConditionKind::Mtu
            | ConditionKind::AddressConflict
            | ConditionKind::MemoryLost
            | ConditionKind::AddressesInvalid => false,
            ConditionKind::Unconnected | ConditionKind::MemoryNotShared | ConditionKind::Uplink => {
                true
            }
        });
    }

    /// The conditions in force, one sentence each.
    #[must_use]
    pub fn current(&self) -> Vec<String> {
        let current = self.current.lock();
        current.values().map(|c| c.text.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_is_in_force_until_it_is_left() {
        let conditions = Conditions::default();
        conditions.set("net0", ConditionKind::Mtu, "too small");
        conditions.set("net0", ConditionKind::Uplink, "gone");
        conditions.set("net0", ConditionKind::Uplink, "down");
        assert_eq!(conditions.current(), ["too small", "down"]);
        conditions.clear_connection();
        assert_eq!(conditions.current(), ["down"]);
        conditions.clear("net0", ConditionKind::Uplink, "up");
        assert!(conditions.current().is_empty());
    }
}
