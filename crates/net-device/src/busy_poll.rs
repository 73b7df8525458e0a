//! How long a worker polls for frames before it sleeps.
//!
//! Polling is worthwhile if frames arrive sooner than a sleep and a kick would take. The score of
//! `adaptive` tracks how many frames recent polls found: a hit raises it (more for many frames at
//! once than for one), and a miss halves it. The worker polls for the score's share of the time
//! limit. After a few misses that is a single poll, so polling costs nothing for an idle guest and
//! little for a slow one, while the worker of a busy guest does not sleep.

use std::time::{Duration, Instant};

use virtionet_config::PollMode;

/// The score at which the worker polls for the whole time limit.
const MAX_SCORE: u32 = 256;
/// The number of frames found at once above which more frames do not raise the score further.
const MAX_COUNTED_FRAMES: usize = 16;
/// The longest time that an `always` worker polls before it checks its events.
const ALWAYS_INTERVAL: Duration = Duration::from_millis(100);

/// A worker's polling mode and its score.
#[derive(Debug, Clone, Copy)]
pub struct BusyPoll {
    mode: PollMode,
    /// Whether the worker may poll on the CPUs where it runs; otherwise it sleeps, whatever the
    /// mode.
    permitted: bool,
    /// From 0 to [`MAX_SCORE`].
    score: u32,
}

impl BusyPoll {
    /// Polling as configured, with a score of 0.
    #[must_use]
    pub fn new(mode: PollMode) -> Self {
        Self {
            mode,
            permitted: true,
            score: 0,
        }
    }

    /// Sets whether the worker may poll on the CPUs where it runs now.
    pub fn set_permitted(&mut self, permitted: bool) {
        self.permitted = permitted;
    }

    /// Whether the worker polls at all before it sleeps.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.permitted && self.mode != PollMode::Off
    }

    /// Whether the worker never sleeps.
    #[must_use]
    pub fn is_always(&self) -> bool {
        self.permitted && self.mode == PollMode::Always
    }

    /// The time until which the worker polls if it starts now; `None` if it must not poll.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match self.mode {
            _ if !self.permitted => None,
            PollMode::Off => None,
            PollMode::Adaptive(limit) => Some(Instant::now() + limit * self.score / MAX_SCORE),
            PollMode::Always => Some(Instant::now() + ALWAYS_INTERVAL),
        }
    }

    /// Records that a poll found `frames` frames.
    pub fn record_hit(&mut self, frames: usize) {
        // The value is at most MAX_COUNTED_FRAMES, so it fits.
        let frames = u32::try_from(frames.min(MAX_COUNTED_FRAMES)).unwrap_or(0);
        // The score rises by 1/32 to 1/2 of its distance from the maximum.
        self.score += ((MAX_SCORE - self.score) * frames).div_ceil(32);
    }

    /// Records that the deadline passed without frames.
    pub fn record_miss(&mut self) {
        self.score /= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(50);

    fn polling_time(busy_poll: &BusyPoll) -> Duration {
        busy_poll
            .deadline()
            .map_or(Duration::ZERO, |deadline| deadline - Instant::now())
    }

    #[test]
    fn hits_raise_the_score_to_its_limit_and_a_few_misses_end_polling() {
        let mut busy_poll = BusyPoll::new(PollMode::Adaptive(LIMIT));
        assert_eq!(busy_poll.score, 0);
        (0..200).for_each(|_| busy_poll.record_hit(1));
        assert_eq!(busy_poll.score, MAX_SCORE);
        assert!(polling_time(&busy_poll) <= LIMIT);
        (0..9).for_each(|_| busy_poll.record_miss());
        assert_eq!(busy_poll.score, 0);
        assert_eq!(polling_time(&busy_poll), Duration::ZERO);
    }

    #[test]
    fn worker_that_may_not_poll_sleeps_at_once() {
        for mode in [PollMode::Always, PollMode::Adaptive(LIMIT)] {
            let mut busy_poll = BusyPoll::new(mode);
            assert!(busy_poll.is_on() && busy_poll.deadline().is_some());
            busy_poll.set_permitted(false);
            assert!(!busy_poll.is_on() && !busy_poll.is_always() && busy_poll.deadline().is_none());
            busy_poll.set_permitted(true);
            assert_eq!(busy_poll.is_always(), mode == PollMode::Always);
        }
    }

    #[test]
    fn many_frames_at_once_raise_the_score_faster_than_single_ones() {
        let mut single = BusyPoll::new(PollMode::Adaptive(LIMIT));
        let mut many = single;
        (0..4).for_each(|_| single.record_hit(1));
        (0..4).for_each(|_| many.record_hit(64));
        assert!(many.score > 2 * single.score, "{many:?} {single:?}");
        many.record_hit(usize::MAX);
        assert!(many.score <= MAX_SCORE);
    }
}
