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
//!   for one. Requests that this back-end does not support or has not offered are refused in the
//!   same way.
//! - A request with a reply of its own (GET_VRING_BASE) cannot be refused, so it ends the session.
//! - The guest's memory is not shared ([`SessionError::NotShared`]): the session ends when the
//!   first vring must start.
//!
//! # One front-end at a time
//! A second client of a busy socket waits in the listen backlog. A front-end that reconnects may
//! connect before the end of its old connection is detected, so it must not be refused.

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
