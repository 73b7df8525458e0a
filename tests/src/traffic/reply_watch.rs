//! When a reply has arrived, by a thread of its own that waits for it. The thread has a real-time priority:
//! that of the driver may not run for milliseconds after the reply is there.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use nix::unistd::gettid;
use rustix::event::{PollFd, PollFlags, poll};

use crate::sched::set_real_time;

/// The thread.
#[derive(Debug)]
pub struct ReplyWatch {
    sockets: Sender<OwnedFd>,
    arrivals: Receiver<Result<Instant>>,
}

impl ReplyWatch {
    /// Starts the thread, which ends when this is dropped.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start() -> Result<Self> {
        let (sockets, receiver) = channel::<OwnedFd>();
        let (sender, arrivals) = channel();
        thread::Builder::new()
            .name("replies".into())
            .spawn(move || {
                let priority = set_real_time(gettid().as_raw());
                for socket in receiver {
                    let readable = poll(&mut [PollFd::new(&socket, PollFlags::IN)], None);
                    let arrival = match (&priority, readable) {
                        (Ok(()), Ok(_)) => Ok(Instant::now()),
                        (priority, readable) => Err(anyhow!("{priority:?}, {readable:?}")),
                    };
                    _ = sender.send(arrival);
                }
            })?;
        Ok(Self { sockets, arrivals })
    }

    /// Waits from now on until `socket` is readable.
    ///
    /// # Errors
    /// When the thread has ended, or there are no descriptors left.
    pub fn expect(&self, socket: &UnixStream) -> Result<()> {
        let sent = self.sockets.send(socket.try_clone()?.into());
        sent.map_err(|_| anyhow!("the thread has ended"))
    }

    /// When the socket became readable, if it did.
    ///
    /// # Errors
    /// When the thread could not wait.
    pub fn arrival(&self) -> Result<Option<Instant>> {
        match self.arrivals.try_recv() {
            Ok(arrival) => arrival.map(Some),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => bail!("the thread has ended"),
        }
    }
}
