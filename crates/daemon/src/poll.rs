//! How long a worker looks for frames before it sleeps.
//!
//! Polling pays where frames come sooner than a sleep and a kick would take. What tells is how many
//! of them the looks of late have found: `adaptive` keeps a score of that, which finds raise (many
//! frames at once more than one) and a look in vain lowers by half, and looks on for the score's
//! share of its limit. A few looks in vain, and it is down to a single one; so an idle guest costs
//! nothing, a slow one next to nothing, and a busy one is not slept on.

use std::time::{Duration, Instant};

use crate::config::Poll;

/// The score at which the whole limit is spent.
const FULL: u32 = 256;
/// Frames found at once beyond which more of them say nothing new.
const MANY: usize = 16;
/// Longest time that an `always` worker looks before it takes a breath to look at its events.
const ALWAYS: Duration = Duration::from_millis(100);

/// A worker's polling, with what it has learnt.
#[derive(Debug, Clone, Copy)]
pub struct Polling {
    mode: Poll,
    /// Where the worker stands it may look on; else it sleeps, whatever the mode.
    permitted: bool,
    /// From 0 to [`FULL`].
    score: u32,
}

impl Polling {
    /// Polling as configured, nothing learnt yet.
    #[must_use]
    pub fn new(mode: Poll) -> Self {
        Self {
            mode,
            permitted: true,
            score: 0,
        }
    }

    /// Whether it may look on where it stands now.
    pub fn permit(&mut self, permitted: bool) {
        self.permitted = permitted;
    }

    /// Whether the worker looks at all before it sleeps.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.permitted && self.mode != Poll::Off
    }

    /// Whether the worker never sleeps.
    #[must_use]
    pub fn is_always(&self) -> bool {
        self.permitted && self.mode == Poll::Always
    }

    /// Until when it may look now; `None` when it may not.
    #[must_use]
    pub fn until(&self) -> Option<Instant> {
        match self.mode {
            _ if !self.permitted => None,
            Poll::Off => None,
            Poll::Adaptive(limit) => Some(Instant::now() + limit * self.score / FULL),
            Poll::Always => Some(Instant::now() + ALWAYS),
        }
    }

    /// A look found so many frames.
    pub fn found(&mut self, frames: usize) {
        // At most MANY, which fits.
        let frames = u32::try_from(frames.min(MANY)).unwrap_or(0);
        // From 1/32 to 1/2 of what is missing.
        self.score += ((FULL - self.score) * frames).div_ceil(32);
    }

    /// The time ran out and nothing came.
    pub fn in_vain(&mut self) {
        self.score /= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(50);

    fn looks(polling: &Polling) -> Duration {
        polling
            .until()
            .map_or(Duration::ZERO, |until| until - Instant::now())
    }

    #[test]
    fn finds_raise_it_to_the_limit_and_a_few_looks_in_vain_end_it() {
        let mut polling = Polling::new(Poll::Adaptive(LIMIT));
        assert_eq!(polling.score, 0);
        (0..200).for_each(|_| polling.found(1));
        assert_eq!(polling.score, FULL);
        assert!(looks(&polling) <= LIMIT);
        (0..9).for_each(|_| polling.in_vain());
        assert_eq!(polling.score, 0);
        assert_eq!(looks(&polling), Duration::ZERO);
    }

    #[test]
    fn where_it_is_not_permitted_it_sleeps_at_once() {
        for mode in [Poll::Always, Poll::Adaptive(LIMIT)] {
            let mut polling = Polling::new(mode);
            assert!(polling.is_on() && polling.until().is_some());
            polling.permit(false);
            assert!(!polling.is_on() && !polling.is_always() && polling.until().is_none());
            polling.permit(true);
            assert_eq!(polling.is_always(), mode == Poll::Always);
        }
    }

    #[test]
    fn many_frames_at_once_tell_sooner_than_single_ones() {
        let mut single = Polling::new(Poll::Adaptive(LIMIT));
        let mut many = single;
        (0..4).for_each(|_| single.found(1));
        (0..4).for_each(|_| many.found(64));
        assert!(many.score > 2 * single.score, "{many:?} {single:?}");
        many.found(usize::MAX);
        assert!(many.score <= FULL);
    }
}
