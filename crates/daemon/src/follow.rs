//! Following the guests: one thread for all devices that looks, while a front-end is connected,
//! whether vCPUs were pinned elsewhere, CPUs went offline or came back, or the cpuset changed; and
//! has the workers go after them. Without a front-end it sleeps.
//!
//! The kernel tells nobody when a thread's affinity changes, so there is nothing to wait for. A look
//! costs some microseconds: see [`virtionet_placement::Watch`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::card::Card;
use crate::host::Host;

/// Time between two looks: with it a worker follows its vCPU well within a second.
const PERIOD: Duration = Duration::from_millis(250);
const STACK: usize = 256 * 1024;

/// Starts the thread, which ends when `stop` is readable.
///
/// # Errors
/// When the kernel refuses a thread.
pub fn start<T: Send + 'static>(
    cards: Vec<Arc<Card>>,
    host: Arc<Host>,
    stop: Arc<OwnedFd>,
    ended: T,
) -> io::Result<JoinHandle<T>> {
    std::thread::Builder::new()
        .name("placer".into())
        .stack_size(STACK)
        .spawn(move || {
            while wait(&cards, &host, stop.as_fd()) {
                host.look();
                cards.iter().for_each(|card| card.look());
            }
            ended
        })
}

/// Waits for the next look; false when there is to be none.
fn wait(cards: &[Arc<Card>], host: &Host, stop: BorrowedFd<'_>) -> bool {
    let busy = cards.iter().any(|card| card.is_followed());
    let timeout = busy.then(|| Timespec::try_from(PERIOD).ok()).flatten();
    let mut fds = [
        PollFd::from_borrowed_fd(stop, PollFlags::IN),
        PollFd::from_borrowed_fd(host.bell(), PollFlags::IN),
    ];
    // Interrupted: one look more.
    let _ = poll(&mut fds, timeout.as_ref());
    if !fds[1].revents().is_empty() {
        host.silence_bell();
    }
    fds[0].revents().is_empty()
}
