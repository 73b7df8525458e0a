//! A limit for log lines that a guest, a front-end or the host can cause as often as they like.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The shortest time between two lines of the same cause.
const INTERVAL: Duration = Duration::from_secs(1);

/// Allows one log line a second, and counts those that it suppresses in between. There is one for
/// each cause; any number of threads may share it.
#[derive(Debug)]
pub struct RateLimiter {
    created: Instant,
    /// Milliseconds after `created` from which the next line is allowed.
    next: AtomicU64,
    suppressed: AtomicU64,
}

impl Default for RateLimiter {
    fn default() -> Self {
        Self::new()
    }
}

impl RateLimiter {
    /// A limiter that allows the first line at once.
    #[must_use]
    pub fn new() -> Self {
        Self {
            created: Instant::now(),
            next: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
        }
    }

    /// `Some` with the number of lines suppressed since the last one if a line may be logged now,
    /// and `None` if this one must be suppressed. If several threads ask at once, one is allowed.
    #[must_use]
    pub fn allow(&self) -> Option<u64> {
        self.allow_at(self.created.elapsed())
    }

    fn allow_at(&self, elapsed: Duration) -> Option<u64> {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let now = milliseconds(elapsed);
        let next = self.next.load(Ordering::Relaxed);
        let after = now.saturating_add(milliseconds(INTERVAL));
        let is_allowed = now >= next
            && self
                .next
                .compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if is_allowed {
            Some(self.suppressed.swap(0, Ordering::Relaxed))
        } else {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_is_allowed_with_the_number_of_suppressed_ones() {
        let limiter = RateLimiter::new();
        let allowed: Vec<_> = [0, 1, 999, 1000, 1001, 1999, 2000, 9000, 9500, 10_000]
            .into_iter()
            .filter_map(|at| Some((at, limiter.allow_at(Duration::from_millis(at))?)))
            .collect();
        assert_eq!(
            allowed,
            [(0, 0), (1000, 2), (2000, 2), (9000, 0), (10_000, 1)]
        );
    }
}
