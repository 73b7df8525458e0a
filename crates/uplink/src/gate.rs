//! Keeps a flood of failures from becoming a flood of log lines.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Lets one line a second pass.
#[derive(Debug)]
pub(crate) struct Gate {
    made: Instant,
    /// Milliseconds after `made` from which a line may pass again.
    next: AtomicU64,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self {
            made: Instant::now(),
            next: AtomicU64::new(0),
        }
    }

    /// Whether a line may be written now. Of several threads that ask at once, one hears yes.
    pub(crate) fn passes(&self) -> bool {
        self.passes_at(self.made.elapsed().as_millis())
    }

    fn passes_at(&self, millis: u128) -> bool {
        let now = u64::try_from(millis).unwrap_or(u64::MAX);
        let next = self.next.load(Ordering::Relaxed);
        now >= next
            && self
                .next
                .compare_exchange(
                    next,
                    now.saturating_add(1000),
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                )
                .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second() {
        let gate = Gate::new();
        let times = [0, 1, 999, 1000, 1001, 1999, 2000, 9000, 9500, 10_000];
        let passed: Vec<u128> = times.into_iter().filter(|&at| gate.passes_at(at)).collect();
        assert_eq!(passed, [0, 1000, 2000, 9000, 10_000]);
    }
}
