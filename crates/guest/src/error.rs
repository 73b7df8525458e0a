//! One error for everything above the rings.

use std::io;
use std::path::PathBuf;

use crate::driver::{DeviceFault, DriverVirtqueueError};
use crate::memory::RamError;

/// What kept a card from working.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A ring.
    #[error(transparent)]
    Ring(#[from] DriverVirtqueueError),
    /// What the device put into a ring is wrong.
    #[error(transparent)]
    Device(#[from] DeviceFault),
    /// An eventfd or the socket.
    #[error("{what}: {source}; see whether the back-end still runs")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nobody listens.
    #[error("cannot connect to {}: {source}; start the back-end first", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The back-end ended the connection.
    #[error("the back-end hung up before it answered request {0}; look at its log")]
    HungUp(u32),
    /// The back-end did not answer in time.
    #[error("the back-end did not answer request {0} in time; see whether it hangs")]
    TimedOut(u32),
    /// A reply that does not fit its request.
    #[error("the back-end's reply to request {request} is wrong ({what}); look at its log")]
    Reply {
        /// Request code.
        request: u32,
        /// What is wrong with it.
        what: String,
    },
    /// The back-end answered an acknowledged request with an error.
    #[error("the back-end refused request {request} with {code}; look at its log")]
    Refused {
        /// Request code.
        request: u32,
        /// Value of the acknowledgement.
        code: u64,
    },
    /// The back-end has fewer queue pairs than asked for.
    #[error("the back-end has {has} queue pairs and {wanted} are wanted; ask for fewer")]
    Pairs {
        /// Pairs wanted.
        wanted: u16,
        /// Pairs that the back-end has.
        has: u64,
    },
    /// Features that the card needs and the back-end lacks.
    #[error("the back-end does not offer the feature bits {0:#x}; do not require them")]
    Features(u64),
    /// A frame that does not fit a TX slot.
    #[error("a frame of {len} bytes does not fit a TX slot of {slot}; make tx_slot larger")]
    FrameTooLong {
        /// Bytes of the frame and its header.
        len: usize,
        /// Bytes of a slot.
        slot: usize,
    },
    /// RX buffers or TX slots that make no sense.
    #[error("{0}; change the queue configuration")]
    Config(&'static str),
    /// Something awaited did not come.
    #[error("waited {waited:?} for {what} and got {got} of {wanted}; see the device's counters")]
    Waited {
        /// How long.
        waited: std::time::Duration,
        /// For what.
        what: &'static str,
        /// How many came.
        got: usize,
        /// How many were wanted.
        wanted: usize,
    },
}

impl Error {
    /// For `map_err`: an I/O error and what was being done.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}
