//! Which warnings are in force, and which of them the log has told: each once, and again only when
//! it has changed, a second later at the earliest.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use virtionet_placement::{Warning, WarningKind};

const REPEAT_INTERVAL: Duration = Duration::from_secs(1);

/// What warnings follow from: the generation of decisions, and the number of pairs in use.
pub type WarningState = (u32, u32);

/// See the module.
#[derive(Debug, Default)]
pub struct ReportOnce {
    current: Vec<Warning>,
    /// The generation of decisions and the number of pairs that they are of; `None`: one of them
    /// waits to be told.
    of: Option<WarningState>,
    /// What was said last of each kind (`None`: it has ceased since), and when.
    last: HashMap<WarningKind, (Option<Warning>, Instant)>,
}

impl ReportOnce {
    /// Whether there is nothing to be told beyond what was, as long as `state` is what it is.
    #[must_use]
    pub fn is_current(&self, state: WarningState) -> bool {
        self.of == Some(state)
    }

    /// `warnings` follow from `state` and are in force `now`; those to be told.
    pub fn update(
        &mut self,
        state: WarningState,
        warnings: Vec<Warning>,
        now: Instant,
    ) -> Vec<Warning> {
        for (kind, (said, _)) in &mut self.last {
            if !warnings.iter().any(|warning| warning.kind() == *kind) {
                *said = None;
            }
        }
        let mut unreported = Vec::new();
        self.of = Some(state);
        for warning in &warnings {
            match self.last.get(&warning.kind()) {
                Some((Some(said), _)) if said == warning => {}
                Some((_, when)) if now < *when + REPEAT_INTERVAL => self.of = None,
                _ => {
                    let said = (Some(warning.clone()), now);
                    self.last.insert(warning.kind(), said);
                    unreported.push(warning.clone());
                }
            }
        }
        self.current = warnings;
        unreported
    }

    /// Those in force.
    #[must_use]
    pub fn current(&self) -> &[Warning] {
        &self.current
    }

    /// None is in force while there is no guest; the next one is not told again what was told.
    pub fn clear_current(&mut self) {
        self.current.clear();
        self.of = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtionet_placement::CpuSet;

    fn few(workers: usize) -> Warning {
        let on = CpuSet::from_iter([0]);
        Warning::FewCpus { workers, on }
    }

    fn unknown() -> Warning {
        let why = String::from("why");
        Warning::Unknown { why }
    }

    #[test]
    fn each_is_told_once_and_again_when_it_changed() {
        let mut reported = ReportOnce::default();
        let began = Instant::now();
        let steps = [
            (0, vec![few(2), unknown()], vec![few(2), unknown()]),
            (500, vec![few(2), unknown()], vec![]),
            // Changed, but too soon; then it is told.
            (700, vec![few(3), unknown()], vec![]),
            (1_200, vec![few(3), unknown()], vec![few(3)]),
            // One that ceased is told when it comes again.
            (2_500, vec![unknown()], vec![]),
            (2_600, vec![few(3), unknown()], vec![few(3)]),
            (9_000, vec![few(3), unknown()], vec![]),
        ];
        for (at, warnings, unreported) in steps {
            let now = began + Duration::from_millis(at.into());
            assert_eq!(
                reported.update((at, 1), warnings.clone(), now),
                unreported,
                "{at}"
            );
            assert_eq!(reported.current(), warnings);
            assert_eq!(reported.is_current((at, 1)), at != 700, "{at}: one waits");
            assert!(!reported.is_current((at, 2)));
        }
        reported.clear_current();
        assert_eq!(reported.current(), []);
        let later = began + Duration::from_secs(20);
        assert_eq!(
            reported.update((0, 1), vec![few(3)], later),
            [],
            "another connection"
        );
    }
}
