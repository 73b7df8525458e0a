//! Frames that another thread has for a receiveq.

use std::time::Duration;

use virtionet_virtio_net::RxQueue;
use virtionet_virtio_net::stats::to_u64;
use virtionet_virtio_net::uplink::TxFrame;

use super::VringSlot;

/// The time for which a push waits for a vring before it looks whether only the worker may push.
const PUSH_WAIT: Duration = Duration::from_millis(1);

/// What became of frames that another thread pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// The guest has them, or they were dropped and counted; this many descriptors were read.
    Done(usize),
    /// The vring does not run. They were dropped and counted.
    NotRunning,
    /// Pages of the guest's memory may be missing, so that only its worker may push them.
    InPostcopy,
}

impl VringSlot<RxQueue> {
    /// Gives `frames` to the guest, or drops and counts them. The driver is interrupted at the end of
    /// the calling thread's turn.
    ///
    /// `is_in_postcopy` is asked while the calling thread waits for the vring: it must be true before
    /// the vring gets memory of which pages may be missing.
    ///
    /// `release` is called between copying and publishing (see [`RxQueue::push_releasing`]), or not at
    /// all.
    pub fn push(
        &self,
        frames: &[TxFrame<'_>],
        is_in_postcopy: impl Fn() -> bool,
        release: &mut dyn FnMut(),
    ) -> Pushed {
        let mut contents = loop {
            if is_in_postcopy() {
                return Pushed::InPostcopy;
            }
            // The lock is held for a turn, or for as long as a page is missing.
            if let Some(contents) = self.contents.lock_for_turn_within(PUSH_WAIT) {
                break contents;
            }
        };
        if contents.is_in_postcopy() {
            return Pushed::InPostcopy;
        }
        let mut was_tried = false;
        let (outcome, notification) = self.process_locked(&mut contents, |queue, enabled| {
            was_tried = enabled;
            match enabled {
                true => queue
                    .push_releasing(frames, release)
                    .map(|pushed| (pushed.descriptors_read, pushed.should_call)),
                false => Ok((0, false)),
            }
        });
        // The queue itself counts what it drops.
        if !was_tried {
            let is_untranslated = contents
                .vring
                .as_ref()
                .is_some_and(|vring| vring.untranslated.is_some());
            let stats = self.stats();
            let counter = match is_untranslated && self.is_enabled() {
                true => &stats.dropped_untranslated,
                false => &stats.dropped_disabled,
            };
            counter.add(to_u64(frames.len()));
        }
        contents.end_turn();
        if let Some(notification) = notification {
            notification.deliver_after_turn();
        }
        outcome.map_or(Pushed::NotRunning, Pushed::Done)
    }
}
