//! Reports of conditions, each once and again only after it has changed.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// The shortest time between two reports of the same kind.
const INTERVAL: Duration = Duration::from_secs(1);

/// Selects the present conditions that are to be reported. `K` is the kind of a condition; at most
/// one condition of each kind is present at a time. `V` is the condition with its values.
///
/// A condition is reported when it begins and when its values change, but at most once a second for
/// each kind. A condition that has ended is reported again when it begins again.
#[derive(Debug)]
pub struct ReportOnce<K, V> {
    /// The last report of each kind and its time. The report is `None` if the condition has ended
    /// since.
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
    /// Returns the conditions of `present` that are to be reported at the time `now`, and whether
    /// another one has changed less than a second after its last report, so that the caller must
    /// call again.
    pub fn update(
        &mut self,
        present: &[V],
        kind: impl Fn(&V) -> K,
        now: Instant,
    ) -> (Vec<V>, bool) {
        for (last_kind, (reported, _)) in &mut self.last {
            if !present.iter().any(|value| kind(value) == *last_kind) {
                *reported = None;
            }
        }
        // A condition that ended longer ago is reported like one that never occurred, so remove it.
        self.last
            .retain(|_, (reported, when)| reported.is_some() || now < *when + INTERVAL);
        let mut due = Vec::new();
        let mut is_pending = false;
        for value in present {
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

    /// A condition: its kind and its value.
    type Condition = (char, u32);

    #[test]
    fn condition_is_reported_once_and_again_after_a_change_or_an_end() {
        let mut reports = ReportOnce::<char, Condition>::default();
        let start = Instant::now();
        let steps: [(u64, &[Condition], &[Condition], bool); 7] = [
            (0, &[('f', 2), ('u', 0)], &[('f', 2), ('u', 0)], false),
            (500, &[('f', 2), ('u', 0)], &[], false),
            // The change comes within a second of the last report, so it is reported later.
            (700, &[('f', 3), ('u', 0)], &[], true),
            (1_200, &[('f', 3), ('u', 0)], &[('f', 3)], false),
            // The condition ends, and is reported when it begins again.
            (2_500, &[('u', 0)], &[], false),
            (2_600, &[('f', 3), ('u', 0)], &[('f', 3)], false),
            (9_000, &[('f', 3), ('u', 0)], &[], false),
        ];
        for (at, present, due, is_pending) in steps {
            let now = start + Duration::from_millis(at);
            let update = reports.update(present, |condition| condition.0, now);
            assert_eq!(update, (due.to_vec(), is_pending), "{at} ms");
        }
    }
}
