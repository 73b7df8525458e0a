//! The queue pairs of a worker, and how far each of them is served.
//!
//! ```text
//!             open            start              (thread) takes it
//!   Closed ──────────► Open ─────────► Starting ───────────────────► Served
//!     ▲                │ ▲ ▲               │                           │
//!     └────────────────┘ │ └───────────────┘ stop                 stop │
//!            close       │                                             ▼
//!                        └──────────────────────────────────────── Stopping
//!                              (thread) has dropped it
//! ```
//!
//! When the thread ends, what it serves is `Starting` again for the next one, and what it was to drop
//! is `Open`.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::queue_pair::QueuePair;

/// The queue pairs of a worker.
#[derive(Debug, Default)]
pub(super) struct Members(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By position; `None` for a position that is free.
    members: Vec<Option<Member>>,
    /// Whether a thread takes and drops queue pairs, or is about to.
    has_thread: bool,
}

#[derive(Debug)]
struct Member {
    pair: Arc<QueuePair>,
    state: MemberState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MemberState {
    /// It has no descriptors.
    Closed,
    /// It has descriptors, and is not served.
    Open,
    /// The thread is to serve it.
    Starting,
    /// The thread serves it.
    Served,
    /// The thread is to serve it no longer.
    Stopping,
}

/// What changed for the thread.
#[derive(Debug, Default)]
pub(super) struct MemberChanges {
    /// The queue pairs that it serves from now on, with their positions.
    pub(super) taken: Vec<(u16, Arc<QueuePair>)>,
    /// The positions of those that it serves no longer.
    pub(super) dropped: Vec<u16>,
}

impl Members {
    /// Adds a queue pair, which is closed. Returns its position.
    pub(super) fn add(&self, pair: Arc<QueuePair>) -> u16 {
        let member = Some(Member {
            pair,
            state: MemberState::Closed,
        });
        let members = &mut self.0.lock().members;
        let free = members.iter().position(Option::is_none);
        let position = match free {
            Some(position) => {
                members[position] = member;
                position
            }
            None => {
                members.push(member);
                members.len() - 1
            }
        };
        u16::try_from(position).unwrap_or(u16::MAX)
    }

    /// Removes a queue pair that never started.
    pub(super) fn remove(&self, position: u16) {
        if let Some(place) = self.0.lock().members.get_mut(usize::from(position)) {
            *place = None;
        }
    }

    /// The number of queue pairs.
    pub(super) fn count(&self) -> usize {
        self.0.lock().members.iter().flatten().count()
    }

    /// Notes that a queue pair has descriptors.
    pub(super) fn open(&self, position: u16) {
        self.0.lock().change(position, |state| match state {
            MemberState::Closed => MemberState::Open,
            other => other,
        });
    }

    /// Notes that a queue pair that is not served has no descriptors. Returns whether none has.
    pub(super) fn close(&self, position: u16) -> bool {
        let mut all = self.0.lock();
        all.change(position, |_| MemberState::Closed);
        all.members
            .iter()
            .flatten()
            .all(|member| member.state == MemberState::Closed)
    }

    /// Lets the thread serve a queue pair. Returns whether a thread must be started for that.
    pub(super) fn start(&self, position: u16) -> bool {
        let mut all = self.0.lock();
        all.change(position, |state| match state {
            MemberState::Open => MemberState::Starting,
            other => other,
        });
        all.needs_thread()
    }

    /// Lets the thread serve a queue pair no longer.
    pub(super) fn stop(&self, position: u16) {
        self.0.lock().change(position, |state| match state {
            MemberState::Starting => MemberState::Open,
            MemberState::Served => MemberState::Stopping,
            other => other,
        });
    }

    /// Whether the thread neither serves a queue pair, nor is about to end for lack of one. Then its
    /// descriptors may be closed as far as this queue pair is concerned.
    pub(super) fn is_released(&self, position: u16) -> bool {
        let all = self.0.lock();
        let state = all.state(position);
        let is_served =
            state.is_some_and(|state| matches!(state, MemberState::Served | MemberState::Stopping));
        !is_served && (!all.has_thread || all.is_used())
    }

    /// Whether a thread serves a queue pair, and goes on with it, or is about to.
    pub(super) fn will_be_served(&self, position: u16) -> bool {
        let all = self.0.lock();
        let state = all.state(position);
        all.has_thread
            && state
                .is_some_and(|state| matches!(state, MemberState::Starting | MemberState::Served))
    }

    /// Whether there is a thread, or one is about to start.
    pub(super) fn has_thread(&self) -> bool {
        self.0.lock().has_thread
    }

    /// The thread takes what it is to serve. What it is to drop is in the result; it must call
    /// [`Members::confirm_dropped`] afterwards.
    pub(super) fn apply_changes(&self) -> MemberChanges {
        let mut changes = MemberChanges::default();
        for (position, place) in self.0.lock().members.iter_mut().enumerate() {
            let Some(member) = place else { continue };
            let position = u16::try_from(position).unwrap_or(u16::MAX);
            match member.state {
                MemberState::Starting => {
                    member.state = MemberState::Served;
                    changes.taken.push((position, Arc::clone(&member.pair)));
                }
                MemberState::Stopping => changes.dropped.push(position),
                MemberState::Closed | MemberState::Open | MemberState::Served => {}
            }
        }
        changes
    }

    /// The thread uses nothing of the queue pairs at `positions` any more.
    pub(super) fn confirm_dropped(&self, positions: &[u16]) {
        let mut all = self.0.lock();
        for position in positions {
            all.change(*position, |state| match state {
                MemberState::Stopping => MemberState::Open,
                other => other,
            });
        }
    }

    /// Ends the thread's work if there is none. Returns whether the thread must end.
    pub(super) fn end_if_unused(&self) -> bool {
        let mut all = self.0.lock();
        let must_end = !all.is_used();
        if must_end {
            all.end();
        }
        must_end
    }

    /// The thread ends, or could not be started.
    pub(super) fn end(&self) {
        self.0.lock().end();
    }
}

impl State {
    fn change(&mut self, position: u16, next: impl FnOnce(MemberState) -> MemberState) {
        if let Some(Some(member)) = self.members.get_mut(usize::from(position)) {
            member.state = next(member.state);
        }
    }

    fn state(&self, position: u16) -> Option<MemberState> {
        let place = self.members.get(usize::from(position))?;
        place.as_ref().map(|member| member.state)
    }

    /// Whether a thread must be started. The caller starts it.
    fn needs_thread(&mut self) -> bool {
        let is_needed = !self.has_thread && self.is_used();
        self.has_thread |= is_needed;
        is_needed
    }

    /// Whether the thread serves a queue pair, or is to.
    fn is_used(&self) -> bool {
        let mut members = self.members.iter().flatten();
        members.any(|member| matches!(member.state, MemberState::Starting | MemberState::Served))
    }

    fn end(&mut self) {
        self.has_thread = false;
        for member in self.members.iter_mut().flatten() {
            member.state = match member.state {
                MemberState::Served => MemberState::Starting,
                MemberState::Stopping => MemberState::Open,
                other => other,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::waker::Waker;

    fn members(count: u16) -> Members {
        let members = Members::default();
        for n in 0..count {
            let pair = Arc::new(QueuePair::new(n, "test", Waker::default()));
            assert_eq!(members.add(pair), n);
            members.open(n);
        }
        members
    }

    fn taken(changes: &MemberChanges) -> Vec<u16> {
        changes
            .taken
            .iter()
            .map(|(position, _)| *position)
            .collect()
    }

    #[test]
    fn first_queue_pair_that_starts_needs_a_thread_and_the_last_one_that_stops_ends_it() {
        let members = members(2);
        assert!(members.start(0) && !members.start(1) && members.has_thread());
        assert_eq!(taken(&members.apply_changes()), [0, 1]);
        members.stop(0);
        assert!(!members.will_be_served(0) && members.will_be_served(1));
        assert!(!members.is_released(0) && !members.end_if_unused());
        assert_eq!(members.apply_changes().dropped, [0]);
        assert!(!members.is_released(0), "the thread has not dropped it yet");
        members.confirm_dropped(&[0]);
        assert!(members.is_released(0) && !members.is_released(1));
        members.stop(1);
        members.confirm_dropped(&members.apply_changes().dropped);
        assert!(!members.is_released(1), "the thread is about to end");
        assert!(members.end_if_unused() && members.is_released(1));
        assert!(members.start(1), "the next start needs a thread again");
    }

    #[test]
    fn queue_pair_that_starts_while_the_thread_ends_is_served_by_this_or_by_the_next_thread() {
        let members = members(2);
        members.start(0);
        members.apply_changes();
        members.stop(0);
        assert!(!members.start(1));
        assert!(!members.end_if_unused(), "the thread goes on");
        members.end();
        assert!(members.is_released(0) && members.start(1));
        assert_eq!(taken(&members.apply_changes()), [1]);
    }

    #[test]
    fn next_thread_takes_what_the_last_one_served() {
        let members = members(3);
        (0..3).for_each(|n| _ = members.start(n));
        members.apply_changes();
        members.stop(2);
        members.end();
        assert!((0..3).all(|n| members.is_released(n)));
        assert_eq!(taken(&members.apply_changes()), [0, 1]);
    }

    #[test]
    fn closed_queue_pair_does_not_start() {
        let members = members(1);
        members.close(0);
        assert!(!members.start(0) && members.apply_changes().taken.is_empty());
    }

    #[test]
    fn start_that_is_withdrawn_before_the_thread_saw_it_changes_nothing() {
        let members = members(1);
        members.start(0);
        members.stop(0);
        let changes = members.apply_changes();
        assert!(changes.taken.is_empty() && changes.dropped.is_empty());
    }

    #[test]
    fn descriptors_are_needed_until_the_last_queue_pair_is_closed_and_positions_are_used_again() {
        let members = members(2);
        assert!(!members.close(0) && members.close(1));
        members.remove(0);
        assert_eq!(members.count(), 1);
        let pair = Arc::new(QueuePair::new(7, "test", Waker::default()));
        assert_eq!((members.add(pair), members.count()), (0, 2));
    }
}
