//! The vhost-user session: one front-end (QEMU, as a rule) on one unix socket, from its first byte
//! to its last.
//!
//! ```text
//! bytes + fds --wire--> Message --request--> Request --session--> calls of a Backend, a Reply
//! ```
//!
//! Each stage is used by the next and by nothing else: [`wire`] handles sockets but no requests,
//! [`request`] handles payloads but no state, [`session`] handles state but no sockets. What a
//! stage accepted is never checked again.
//!
//! # What an error does
//! - The protocol itself is broken ([`ProtocolError`]: framing, payload sizes, descriptors): the
//!   session ends, since nothing that follows can be believed.
//! - A request is well formed but cannot be done ([`RequestError`]): nothing changes, one line is
//!   logged (at most one a second), and the front-end gets a non-zero acknowledgement if it asked
//!   for one. Requests that this back-end does not know or has not offered are refused alike.
//! - A request that needs an answer of its own (GET_VRING_BASE) cannot be refused: it ends the
//!   session.
//! - The guest's memory is not shared ([`SessionError::NotShared`]): the session ends when the
//!   first vring is to start.
//!
//! # One front-end at a time
//! A second client of a busy socket waits in the listen backlog: a front-end that reconnects may
//! come before the end of its old connection has been seen, and must not be turned away.

pub mod backend;
mod backend_error;
mod error;
mod eventfd;
mod limits;
pub mod listen;
pub mod protocol_features;
pub mod request;
pub mod session;
mod sys;
#[cfg(test)]
mod testing;
mod vring;
pub mod vring_state;
pub mod wire;

pub use backend::{Backend, UnmappedVring, VringStart};
pub use backend_error::BackendError;
pub use error::{DecodeError, ProtocolError, RefusedRequest, RequestError, SessionError};
pub use session::{Session, SessionEnd, serve};
pub use sys::{TakeFdError, peer_pid, take_fd};
pub use vring_state::{InvalidTransition, VringEvent, VringState};
