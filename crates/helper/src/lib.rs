//! The helper: a process that keeps the rights which the daemon gives up.
//!
//! ```text
//!  virtionetd                                 virtionetd: helper
//!  reads what guests and front-ends write     reads only what virtionetd asks
//!  no capability                              CAP_NET_ADMIN, CAP_DAC_OVERRIDE
//!
//!  session, placer ── Client ── request ──>   serve: Rules allow it? ── the kernel
//!                           <── reply ──
//! ```
//!
//! The two share one socketpair, on which each message is a packet (`protocol.rs`). The daemon first
//! sends its [`Rule`]s, which follow from its configuration, and then [`Hello::Serve`]. From then
//! on the rules cannot change, and everything that arrives is a request that is checked against
//! them: a daemon that is taken over by a guest gains no more than what its configuration names.
//!
//! The helper ends when the daemon closes its end. A daemon whose helper has ended goes on without.

mod client;
mod protocol;
mod raw_path;
mod rule;
mod rules;
mod server;

pub use client::Client;
pub use protocol::Hello;
pub use rule::{Rule, SocketPath};
pub use server::{Server, take_rules};
