//! A rate limit for log lines that a guest, a front-end or the host could cause at any rate.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The shortest time between two log lines of the same cause.
const INTERVAL: Duration = Duration::from_secs(1);

/// Allows one log line a second and counts those that it suppresses in between. Each cause has a
/// limiter of its own, which several threads may share.
#[derive(Debug)]
pub struct RateLimiter {
    created: Instant,
    /// When the next line is allowed, in milliseconds after `created`.
    next: AtomicU64,
    /// The number of lines suppressed since the last allowed one.
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

    /// Whether a line may be logged now. Returns the number of lines suppressed since the last
    /// allowed one, or `None` if this line must be suppressed. Of several concurrent calls at most
    /// one succeeds.
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
    fn lines_within_a_second_are_suppressed_and_counted() {
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
