//! The control API of virtionetd: its types ([`v1`]), the HTTP server on a unix socket (feature
//! `server`) and a client (feature `client`).

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "server")]
pub mod metrics;
#[cfg(feature = "server")]
pub mod server;
pub mod v1;
