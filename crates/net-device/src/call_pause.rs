//! A pause of all calls of a network device, after one of them blocked.
//!
//! A write that blocks costs the calling thread up to 10 ms (see [`call_watchdog`](crate::call_watchdog)),
//! and that thread may serve another guest. Its descriptor is cut off, but a front-end may set another one
//! that blocks, and has one for each vring. With a pause of a second, all of them together cost a thread at
//! most one hundredth of its time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a device makes no calls.
const PAUSE: Duration = Duration::from_secs(1);

/// Whether the calls of a network device pause. All its vrings share it.
#[derive(Debug)]
pub struct CallPause {
    created: Instant,
    /// When the pause ends, in milliseconds after `created`; 0 outside of a pause.
    end: AtomicU64,
}

impl Default for CallPause {
    fn default() -> Self {
        Self {
            created: Instant::now(),
            end: AtomicU64::new(0),
        }
    }
}

impl CallPause {
    /// Begins a pause, because a call blocked.
    #[cold]
    pub fn begin(&self) {
        self.begin_at(self.created.elapsed());
    }

    fn begin_at(&self, now: Duration) {
        let end = milliseconds(now.saturating_add(PAUSE));
        self.end.fetch_max(end, Ordering::Relaxed);
    }

    /// Whether no call may be made now.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.end.load(Ordering::Relaxed) != 0 && !self.remaining().is_zero()
    }

    /// How long no call may be made.
    #[cold]
    pub fn remaining(&self) -> Duration {
        self.remaining_at(self.created.elapsed())
    }

    fn remaining_at(&self, now: Duration) -> Duration {
        let end = self.end.load(Ordering::Relaxed);
        let remaining = end.saturating_sub(milliseconds(now));
        if remaining == 0 && end != 0 {
            // Another pause may have begun meanwhile.
            let _ = self
                .end
                .compare_exchange(end, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
        Duration::from_millis(remaining)
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_lasts_a_second_after_the_last_call_that_blocked() {
        let pause = CallPause::default();
        let at = Duration::from_millis;
        assert_eq!(pause.remaining_at(at(5)), Duration::ZERO);
        assert!(!pause.is_on());
        pause.begin_at(at(5));
        assert_eq!(pause.remaining_at(at(5)), PAUSE);
        pause.begin_at(at(500));
        assert_eq!(pause.remaining_at(at(1005)), at(495));
        assert_eq!(pause.remaining_at(at(1500)), Duration::ZERO);
        pause.begin_at(at(3000));
        assert_eq!(pause.remaining_at(at(3999)), at(1));
    }

    #[test]
    fn pause_is_on_from_the_call_that_blocked() {
        let pause = CallPause::default();
        pause.begin();
        assert!(pause.is_on());
    }
}
