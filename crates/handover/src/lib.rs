//! How a daemon hands its devices over to the next one, without a disconnect: the front-ends'
//! connections, the guests' memory, the vrings, the queues of TAPs, the tables of switches, the
//! counters.
//!
//! ```text
//! old daemon                                new daemon
//!                              <- Hello     version
//! Offer ->                                  opens nothing that the offer has; confines itself
//!                              <- Ready
//! stops all workers and sessions
//! State ->                                 maps memory, makes the sessions
//!                              <- Prepared
//! Commit ->                                 starts the vrings, tells the service manager
//!                              <- Serving
//! ends
//! ```
//!
//! Until it has sent Commit, the old daemon continues as if nothing had been, whatever goes wrong:
//! the new one is gone, refuses, or takes longer than a few seconds. From then on it touches nothing
//! any more. The new daemon starts nothing before it has received Commit. The old one ends only when
//! the new one serves, because a service manager must know its new main process before the old one
//! ends; but it does not depend on that.

mod message;
mod message_io;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

pub use message::{
    DeviceImage, DeviceOffer, FORMAT, HandoverState, ListenerImage, Offer, PairCounters,
    SourceImage,
};
pub use message_io::MessageError;

use message::{FromNew, FromOld};
use message_io::{OutgoingDescriptors, ReceivedDescriptors, receive, send};

/// How long one side waits for the other while devices work.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the old daemon waits while devices are paused.
const PAUSED_TIMEOUT: Duration = Duration::from_secs(2);

/// A descriptor of this process.
pub type SharedFd = Arc<OwnedFd>;

/// Why a handover failed. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// A message could not be sent or received.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The socket cannot be prepared.
    #[error("the connection with the other process fails: {0}")]
    Socket(#[from] io::Error),
    /// The other process refuses.
    #[error("the other process refuses: {0}")]
    Refused(String),
    /// The two versions do not know each other.
    #[error("the new daemon hands over in format {new}, and this one in {old}; restart instead", old = FORMAT)]
    Format {
        /// The format of the new daemon.
        new: u32,
    },
    /// The other process sent a message out of order.
    #[error("the other process sent a message out of order; is it virtionetd?")]
    Order,
}

/// The old daemon's side.
#[derive(Debug)]
pub struct OldSide(UnixStream);

impl OldSide {
    /// Accepts the new daemon, which has connected. Returns its version, too.
    ///
    /// # Errors
    /// When it is none, or one of another format.
    // syscalls: setsockopt recvfrom sendto sendmsg
    pub fn accept(stream: UnixStream) -> Result<(Self, String), HandoverError> {
        set_timeouts(&stream, ANSWER_TIMEOUT)?;
        let side = Self(stream);
        match side.receive()? {
            FromNew::Hello { format, program } if format == FORMAT => Ok((side, program)),
            FromNew::Hello { format, .. } => {
                let error = HandoverError::Format { new: format };
                side.refuse(&error.to_string());
                Err(error)
            }
            _ => Err(HandoverError::Order),
        }
    }

    /// Tells the new daemon that it cannot take over.
    pub fn refuse(&self, reason: &str) {
        let reason = reason.to_owned();
        // It may be gone already.
        let _ = self.send(FromOld::Refused { reason });
    }

    /// Sends the offer and waits until the new daemon is ready for the state.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn offer(&self, offer: Offer<SharedFd>) -> Result<(), HandoverError> {
        self.send(FromOld::Offer(offer))?;
        self.expect(FromNew::Ready)
    }

    /// Sends the state of the devices, which are paused, and waits until the new daemon has made
    /// its own of it.
    ///
    /// # Errors
    /// When it does not.
    pub fn send_state(&self, state: HandoverState<SharedFd>) -> Result<(), HandoverError> {
        set_timeouts(&self.0, PAUSED_TIMEOUT)?;
        self.send(FromOld::State(state))?;
        self.expect(FromNew::Prepared)
    }

    /// Gives the devices away.
    ///
    /// # Errors
    /// When the new daemon is gone, and does not have them.
    pub fn commit(self) -> Result<HandedOver, HandoverError> {
        self.send(FromOld::Commit)?;
        Ok(HandedOver(self.0))
    }

    fn send(&self, message: FromOld<SharedFd>) -> Result<(), HandoverError> {
        let mut descriptors = OutgoingDescriptors::default();
        let message = message.map(|fd| descriptors.add(fd))?;
        Ok(send(&self.0, &message, &descriptors)?)
    }

    fn receive(&self) -> Result<FromNew, HandoverError> {
        match receive(&self.0)?.0 {
            FromNew::Refused { reason } => Err(HandoverError::Refused(reason)),
            message => Ok(message),
        }
    }

    fn expect(&self, expected: FromNew) -> Result<(), HandoverError> {
        match self.receive()? == expected {
            true => Ok(()),
            false => Err(HandoverError::Order),
        }
    }
}

/// The old daemon's side after the commit. It owns nothing any more.
#[derive(Debug)]
pub struct HandedOver(UnixStream);

impl HandedOver {
    /// Waits until the new daemon serves the devices or is gone, for at most 2 s.
    // syscalls: recvfrom
    pub fn wait_until_served(self) {
        // Nothing depends on what it says: it owns the devices.
        let _ = receive::<FromNew>(&self.0);
    }
}

/// The new daemon's side.
#[derive(Debug)]
pub struct NewSide(UnixStream);

/// The new daemon's side after the commit. It owns the devices.
#[derive(Debug)]
pub struct TakenOver(UnixStream);

impl TakenOver {
    /// Tells the old daemon, which is waiting to end, that this one serves the devices.
    // syscalls: sendto
    pub fn serving(self) {
        // One of an earlier version has ended already.
        let _ = send(&self.0, &FromNew::Serving, &OutgoingDescriptors::default());
    }
}

impl NewSide {
    /// Asks the old daemon, to which `stream` is connected, for its offer. `program` is the version
    /// of this daemon.
    ///
    /// # Errors
    /// When there is no daemon that offers something.
    // syscalls: setsockopt sendto recvfrom recvmsg
    pub fn hello(
        stream: UnixStream,
        program: &str,
    ) -> Result<(Self, Offer<SharedFd>), HandoverError> {
        set_timeouts(&stream, ANSWER_TIMEOUT)?;
        let side = Self(stream);
        side.send(&FromNew::Hello {
            format: FORMAT,
            program: program.to_owned(),
        })?;
        match side.receive()? {
            FromOld::Offer(offer) => Ok((side, offer)),
            _ => Err(HandoverError::Order),
        }
    }

    /// Tells the old daemon that its devices are not taken.
    pub fn refuse(&self, reason: &str) {
        let reason = reason.to_owned();
        // It notices as well when this process ends.
        let _ = self.send(&FromNew::Refused { reason });
    }

    /// Says that this daemon is ready, and returns the state.
    ///
    /// # Errors
    /// When the old daemon continues instead.
    pub fn ready(&self) -> Result<HandoverState<SharedFd>, HandoverError> {
        self.send(&FromNew::Ready)?;
        match self.receive()? {
            FromOld::State(state) => Ok(state),
            _ => Err(HandoverError::Order),
        }
    }

    /// Says that this daemon has all, and waits until it owns it.
    ///
    /// # Errors
    /// When the old daemon continues instead.
    pub fn prepared(self) -> Result<TakenOver, HandoverError> {
        self.send(&FromNew::Prepared)?;
        match self.receive()? {
            FromOld::Commit => Ok(TakenOver(self.0)),
            _ => Err(HandoverError::Order),
        }
    }

    fn send(&self, message: &FromNew) -> Result<(), HandoverError> {
        Ok(send(&self.0, message, &OutgoingDescriptors::default())?)
    }

    fn receive(&self) -> Result<FromOld<SharedFd>, HandoverError> {
        let (message, mut descriptors): (FromOld<message_io::Position>, ReceivedDescriptors) =
            receive(&self.0)?;
        match message.map(|position| descriptors.take(position).map(Arc::new))? {
            FromOld::Refused { reason } => Err(HandoverError::Refused(reason)),
            message => Ok(message),
        }
    }
}

impl<F> FromOld<F> {
    fn map<G, E>(self, replace: impl FnMut(F) -> Result<G, E>) -> Result<FromOld<G>, E> {
        Ok(match self {
            Self::Offer(offer) => FromOld::Offer(offer.map(replace)?),
            Self::State(state) => FromOld::State(state.map(replace)?),
            Self::Commit => FromOld::Commit,
            Self::Refused { reason } => FromOld::Refused { reason },
        })
    }
}

fn set_timeouts(stream: &UnixStream, timeout: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))
}

#[cfg(test)]
mod tests;
