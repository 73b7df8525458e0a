//! How long a worker looks for frames before it sleeps.
//!
//! The budget of `adaptive` grows while looking finds frames and halves when it was in vain, down
//! to a single look; so an idle guest costs nothing and a busy one is not slept on.

use std::time::{Duration, Instant};

use crate::config::Poll;

/// Smallest step by which the adaptive budget grows.
const STEP: Duration = Duration::from_micros(5);
/// Longest time that an `always` worker looks before it takes a breath to look at its events.
const ALWAYS: Duration = Duration::from_millis(100);

/// A worker's polling, with what it has learnt.
#[derive(Debug, Clone, Copy)]
pub struct Polling {
    mode: Poll,
    budget: Duration,
}

impl Polling {
    /// Polling as configured, nothing learnt yet.
    #[must_use]
    pub fn new(mode: Poll) -> Self {
        Self { mode, budget: STEP }
    }

    /// Whether the worker looks at all before it sleeps.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.mode != Poll::Off
    }

    /// Whether the worker never sleeps.
    #[must_use]
    pub fn is_always(&self) -> bool {
        self.mode == Poll::Always
    }

    /// Until when it may look now; `None` when it may not.
    #[must_use]
    pub fn until(&self) -> Option<Instant> {
        match self.mode {
            Poll::Off => None,
            Poll::Adaptive(_) => Some(Instant::now() + self.budget),
            Poll::Always => Some(Instant::now() + ALWAYS),
        }
    }

    /// A look found frames.
    pub fn found(&mut self) {
        if let Poll::Adaptive(limit) = self.mode {
            self.budget = (self.budget + STEP).min(limit);
        }
    }

    /// The budget ran out and nothing came.
    pub fn in_vain(&mut self) {
        self.budget /= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adaptive_grows_to_its_limit_and_shrinks_to_nothing() {
        let limit = Duration::from_micros(50);
        let mut polling = Polling::new(Poll::Adaptive(limit));
        (0..100).for_each(|_| polling.found());
        assert_eq!(polling.budget, limit);
        (0..100).for_each(|_| polling.in_vain());
        assert_eq!(polling.budget, Duration::ZERO);
        polling.found();
        assert_eq!(polling.budget, STEP);
    }
}
