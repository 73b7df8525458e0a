//! The error type of everything above the virtqueues.

use std::io;
use std::path::PathBuf;

use crate::fault::{DeviceFault, DriverVirtqueueError};
use crate::memory::RamError;

/// Why the driver or the front-end cannot continue.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Guest memory could not be made or accessed.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A virtqueue could not be made or used.
    #[error(transparent)]
    Ring(#[from] DriverVirtqueueError),
    /// The device wrote something invalid into a virtqueue.
    #[error(transparent)]
    Device(#[from] DeviceFault),
    /// An operation on an eventfd or on the socket failed.
    #[error("{what}: {source}; check whether the back-end still runs")]
    Io {
        /// The operation that failed.
        what: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// Nothing listens on the socket.
    #[error("cannot connect to {}: {source}; start the back-end first", path.display())]
    Connect {
        /// The path of the socket.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The back-end closed the connection.
    #[error("the back-end closed the connection before it answered request {0}; read its log")]
    HungUp(u32),
    /// The back-end did not answer in time.
    #[error("the back-end did not answer request {0} in time; check whether it hangs")]
    TimedOut(u32),
    /// A reply does not match its request.
    #[error("the back-end's reply to request {request} is wrong ({what}); read its log")]
    Reply {
        /// The code of the request.
        request: u32,
        /// What is wrong with the reply.
        what: String,
    },
    /// The back-end acknowledged a request with an error.
    #[error("the back-end refused request {request} with {code}; read its log")]
    Refused {
        /// The code of the request.
        request: u32,
        /// The value of the acknowledgement, which is not 0.
        code: u64,
    },
    /// The back-end has fewer queue pairs than requested.
    #[error("the back-end has {has} queue pairs and {wanted} are requested; request fewer")]
    Pairs {
        /// The number of queue pairs requested.
        wanted: u16,
        /// The number of queue pairs that the back-end has.
        has: u64,
    },
    /// The back-end does not offer required feature bits.
    #[error("the back-end does not offer the feature bits {0:#x}; do not require them")]
    Features(u64),
    /// A frame does not fit a TX slot.
    #[error("a frame of {len} bytes does not fit a TX slot of {slot}; make tx_slot larger")]
    FrameTooLong {
        /// The size of the frame and its header in bytes.
        len: usize,
        /// The size of a slot in bytes.
        slot: usize,
    },
    /// A configuration or an argument is not possible.
    #[error("{0}; change the queue configuration")]
    Config(&'static str),
    /// Something did not happen in time.
    #[error("waited {waited:?} for {what} and got {got} of {wanted}; read the device's counters")]
    Waited {
        /// The time limit.
        waited: std::time::Duration,
        /// What was waited for.
        what: &'static str,
        /// How many there were.
        got: usize,
        /// How many were expected.
        wanted: usize,
    },
}

impl Error {
    /// For `map_err`: makes the error of the operation `what`.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}
