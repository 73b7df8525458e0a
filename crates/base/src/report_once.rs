//! Reports of conditions: each once, and again only when it has changed.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// The shortest time between two reports of the same kind.
const INTERVAL: Duration = Duration::from_secs(1);

/// Decides which of the conditions in force are to be reported. `K` is the kind of a condition, of
/// which one is in force at a time, and `V` is the condition with its values.
///
/// A condition is reported when it comes into force and when its values change, at most once a
/// second for each kind. One that ended is reported when it comes into force again.
#[derive(Debug)]
pub struct ReportOnce<K, V> {
    /// What was last reported of each kind, and when; `None` after the condition has ended.
    last: HashMap<K, (Option<V>, Instant)>,
}

impl<K, V> Default for ReportOnce<K, V> {
    fn default() -> Self {
        Self {
            last: HashMap::new(),
        }
    }
}

impl<K: Eq + Hash, V: Clone + PartialEq> ReportOnce<K, V> {
    /// The conditions among `in_force` that are to be reported at `now`, and whether one of them
    /// has changed too soon, so that it must be asked about again.
    pub fn update(&mut self, in_force: &[V], kind: impl Fn(&V) -> K, now: Instant) -> (Vec<V>, bool) {
        for (last_kind, (reported, _)) in &mut self.last {
            if !in_force.iter().any(|value| kind(value) == *last_kind) {
                *reported = None;
            }
        }
        // One that ended longer ago is reported like one that never was, so forget it.
        self.last
            .retain(|_, (reported, when)| reported.is_some() || now < *when + INTERVAL);
        let mut due = Vec::new();
        let mut is_pending = false;
        for value in in_force {
            match self.last.get(&kind(value)) {
                Some((Some(reported), _)) if reported == value => {}
                Some((_, when)) if now < *when + INTERVAL => is_pending = true,
                _ => {
                    self.last.insert(kind(value), (Some(value.clone()), now));
                    due.push(value.clone());
                }
            }
        }
        (due, is_pending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A condition of kind `.0` with the value `.1`.
    type Condition = (char, u32);

    #[test]
    fn a_condition_is_reported_once_and_again_when_it_changes_or_returns() {
        let mut reports = ReportOnce::<char, Condition>::default();
        let start = Instant::now();
        let steps: [(u64, &[Condition], &[Condition], bool); 7] = [
            (0, &[('f', 2), ('u', 0)], &[('f', 2), ('u', 0)], false),
            (500, &[('f', 2), ('u', 0)], &[], false),
            // It changes too soon, and is reported later.
            (700, &[('f', 3), ('u', 0)], &[], true),
            (1_200, &[('f', 3), ('u', 0)], &[('f', 3)], false),
            // It ends, and is reported when it returns.
            (2_500, &[('u', 0)], &[], false),
            (2_600, &[('f', 3), ('u', 0)], &[('f', 3)], false),
            (9_000, &[('f', 3), ('u', 0)], &[], false),
        ];
        for (at, in_force, due, is_pending) in steps {
            let now = start + Duration::from_millis(at);
            let update = reports.update(in_force, |condition| condition.0, now);
            assert_eq!(update, (due.to_vec(), is_pending), "{at} ms");
        }
    }
}
