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
//! Frozen ->                                 maps memory, makes the sessions
//!                              <- Prepared
//! Commit ->                                 starts the vrings
//! ends
//! ```
//!
//! Until it has sent Commit, the old daemon continues as if nothing had been, whatever goes wrong:
//! the new one is gone, refuses, or takes longer than a few seconds. From then on it touches nothing
//! any more. The new daemon starts nothing before it has received Commit.

mod message;
mod parcel;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

pub use message::{
    DeviceImage, DeviceOffer, FORMAT, Frozen, ListenerImage, Offer, PairCounters, SourceImage,
};
pub use parcel::ParcelError;

use message::{FromNew, FromOld};
use parcel::{Packing, Unpacking, receive, send};

/// How long one side waits for the other while devices work.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the old daemon waits while devices are paused.
const FROZEN_PATIENCE: Duration = Duration::from_secs(2);

/// A descriptor of this process.
pub type SharedFd = Arc<OwnedFd>;

/// Why a handover failed. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// A message could not be sent or received.
    #[error(transparent)]
    Parcel(#[from] ParcelError),
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
    /// Greets the new daemon, which has connected. Returns its version, too.
    ///
    /// # Errors
    /// When it is none, or one of another format.
    // syscalls: setsockopt recvfrom sendto sendmsg
    pub fn greet(stream: UnixStream) -> Result<(Self, String), HandoverError> {
        set_patience(&stream, PATIENCE)?;
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
    pub fn freeze(&self, state: Frozen<SharedFd>) -> Result<(), HandoverError> {
        set_patience(&self.0, FROZEN_PATIENCE)?;
        self.send(FromOld::Frozen(state))?;
        self.expect(FromNew::Prepared)
    }

    /// Gives the devices away.
    ///
    /// # Errors
    /// When the new daemon is gone, and does not have them.
    pub fn commit(self) -> Result<(), HandoverError> {
        self.send(FromOld::Commit)
    }

    fn send(&self, message: FromOld<SharedFd>) -> Result<(), HandoverError> {
        let mut packing = Packing::default();
        let message = message.map(|fd| packing.add(fd))?;
        Ok(send(&self.0, &message, &packing)?)
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

/// The new daemon's side.
#[derive(Debug)]
pub struct NewSide(UnixStream);

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
        set_patience(&stream, PATIENCE)?;
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
    pub fn ready(&self) -> Result<Frozen<SharedFd>, HandoverError> {
        self.send(&FromNew::Ready)?;
        match self.receive()? {
            FromOld::Frozen(state) => Ok(state),
            _ => Err(HandoverError::Order),
        }
    }

    /// Says that this daemon has all, and waits until it owns it.
    ///
    /// # Errors
    /// When the old daemon continues instead.
    pub fn prepared(self) -> Result<(), HandoverError> {
        self.send(&FromNew::Prepared)?;
        match self.receive()? {
            FromOld::Commit => Ok(()),
            _ => Err(HandoverError::Order),
        }
    }

    fn send(&self, message: &FromNew) -> Result<(), HandoverError> {
        Ok(send(&self.0, message, &Packing::default())?)
    }

    fn receive(&self) -> Result<FromOld<SharedFd>, HandoverError> {
        let (message, mut unpacking): (FromOld<parcel::Position>, Unpacking) = receive(&self.0)?;
        match message.map(|position| unpacking.take(position).map(Arc::new))? {
            FromOld::Refused { reason } => Err(HandoverError::Refused(reason)),
            message => Ok(message),
        }
    }
}

impl<F> FromOld<F> {
    fn map<G, E>(self, replace: impl FnMut(F) -> Result<G, E>) -> Result<FromOld<G>, E> {
        Ok(match self {
            Self::Offer(offer) => FromOld::Offer(offer.map(replace)?),
            Self::Frozen(state) => FromOld::Frozen(state.map(replace)?),
            Self::Commit => FromOld::Commit,
            Self::Refused { reason } => FromOld::Refused { reason },
        })
    }
}

fn set_patience(stream: &UnixStream, patience: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))
}

#[cfg(test)]
mod tests;
