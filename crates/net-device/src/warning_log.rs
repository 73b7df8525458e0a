//! The current placement warnings of a device, and which of them must be logged.

use std::time::Instant;

use virtionet_base::ReportOnce;
use virtionet_placement::{Warning, WarningKind};

/// The values from which warnings are derived: the generation of the decisions, and the number of
/// queue pairs in use.
pub type WarningBasis = (u32, u32);

/// The placement warnings of one device.
#[derive(Debug, Default)]
pub struct WarningLog {
    current: Vec<Warning>,
    /// The basis of `current`; `None` while one of the warnings waits to be logged.
    basis: Option<WarningBasis>,
    reports: ReportOnce<WarningKind, Warning>,
}

impl WarningLog {
    /// Whether the current warnings are derived from `basis` and all of them have been logged.
    #[must_use]
    pub fn is_current(&self, basis: WarningBasis) -> bool {
        self.basis == Some(basis)
    }

    /// Stores `warnings`, which are derived from `basis` and apply at the time `now`. Returns those
    /// that must be logged.
    pub fn update(
        &mut self,
        basis: WarningBasis,
        warnings: Vec<Warning>,
        now: Instant,
    ) -> Vec<Warning> {
        let (due, is_pending) = self.reports.update(&warnings, Warning::kind, now);
        self.basis = (!is_pending).then_some(basis);
        self.current = warnings;
        due
    }

    /// The current warnings.
    #[must_use]
    pub fn current(&self) -> &[Warning] {
        &self.current
    }

    /// Removes all warnings, because there is no guest. Those that have not changed are not logged
    /// again for the next guest.
    pub fn clear_current(&mut self) {
        self.current.clear();
        self.basis = None;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use virtionet_placement::CpuSet;

    fn few(workers: usize) -> Warning {
        let on = CpuSet::from_iter([0]);
        Warning::FewCpus { workers, on }
    }

    #[test]
    fn warning_that_changed_too_soon_is_logged_later() {
        let mut log = WarningLog::default();
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        assert_eq!(log.update((0, 1), vec![few(2)], at(0)), [few(2)]);
        assert!(log.is_current((0, 1)) && !log.is_current((0, 2)));
        assert_eq!(log.update((1, 1), vec![few(3)], at(700)), []);
        assert_eq!(log.current(), [few(3)]);
        assert!(!log.is_current((1, 1)), "it waits to be logged");
        assert_eq!(log.update((1, 1), vec![few(3)], at(1_200)), [few(3)]);
        assert!(log.is_current((1, 1)));
    }

    #[test]
    fn unchanged_warning_is_not_logged_again_for_a_new_connection() {
        let mut log = WarningLog::default();
        let start = Instant::now();
        assert_eq!(log.update((0, 1), vec![few(3)], start), [few(3)]);
        log.clear_current();
        assert_eq!(log.current(), []);
        let later = start + Duration::from_secs(20);
        assert_eq!(log.update((0, 1), vec![few(3)], later), []);
    }
}
