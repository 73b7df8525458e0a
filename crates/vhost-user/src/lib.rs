//! The vhost-user session: one connection of a front-end (usually QEMU) on a unix socket, from its
//! first byte to its last.
//!
//! ```text
//! bytes + fds --wire--> Message --request--> Request --session--> calls of a Backend, a Reply
//! ```
//!
//! Only the next stage uses each stage: [`wire`] handles sockets but no requests, [`request`]
//! handles payloads but no state, and [`session`] handles state but no sockets. What one stage has
//! accepted is not checked again.
//!
//! # Effects of errors
//! - The front-end breaks the protocol itself ([`ProtocolError`]: framing, payload sizes,
//!   descriptors): the session ends, because nothing that follows can be trusted.
//! - A request is well formed but cannot be done ([`RequestError`]): nothing changes, one line is
//!   logged (at most one a second), and the front-end gets a non-zero acknowledgement if it asked
//!   for one. Requests that this back-end does not know or has not offered are refused in the same
//!   way.
//! - A request with a reply of its own cannot be refused without one: GET_VRING_BASE of a vring
//!   that does not exist ends the session, and so does a request such as GET_CONFIG that was not offered,
//!   unless the front-end asked for an acknowledgement.
//! - The front-end does not complete a message, or does not read a reply, within 5 s: the session
//!   ends. An idle front-end is waited for without limit.
//! - The guest's memory is not shared ([`SessionError::NotShared`]): the session ends when the
//!   first vring must start.
//!
//! # One front-end at a time
//! A front-end that connects while another one is served is refused, with a log line. If the other
//! one has disconnected already, the new one waits in the listen backlog until the old session has
//! ended, so that a front-end that is restarted at once is served at its first attempt.
//!
//! # Descriptors
//! A front-end may send any descriptor, and closing one may block. Those that are not kept are
//! closed by the thread `closer` ([`ForeignFd`]).

pub mod backend;
mod backend_error;
mod error;
mod eventfd;
mod foreign_fd;
mod iotlb_message;
mod limits;
pub mod listen;
mod memory_file;
pub mod protocol_features;
pub mod request;
pub mod session;
mod session_log;
pub mod stop;
mod sys;
#[cfg(test)]
mod testing;
mod vring;
pub mod vring_state;
pub mod wire;

pub use backend::{Backend, UnmappedVring, VringStart};
pub use backend_error::BackendError;
pub use error::{DecodeError, ProtocolError, RefusedRequest, RequestError, SessionError};
pub use foreign_fd::{ForeignFd, start_closer};
pub use iotlb_message::IotlbMessage;
pub use session::{
    ImageError, Served, Session, SessionEnd, SessionImage, SessionStart, SuspendedSession, serve,
    serve_from,
};
pub use session_log::SessionLog;
pub use sys::{TakeFdError, peer_pid, peer_uid, take_fd};
pub use vring_state::{InvalidTransition, VringEvent, VringState};
pub use wire::PendingConnections;
