//! The daemon's configuration, read from flags, `--device` and a file into one typed [`Config`].
//!
//! ```text
//! keys (the table) ──> arguments (flags), inline (--device), file (TOML)
//!                               │ settings: each value with its origin
//!                               v
//!                      layers: which layer overrides which, by device
//!                               v
//!                      device, socket_file: values become types; ownership: no resource has two owners;
//!                      workers: what sharing them excludes
//!                               v
//!                      Config
//! ```
//!
//! Reading a configuration opens no file except the configuration file itself.

mod allow_add;
mod arguments;
pub mod cli;
mod device;
mod file;
#[cfg(test)]
mod file_tests;
mod inline;
mod keys;
mod layers;
mod ownership;
mod problem;
mod requested;
mod resolve;
mod rights;
mod settings;
mod socket_file;
#[cfg(test)]
mod tests;
mod types;
pub mod uplink;
mod value_kind;
mod workers;

pub use cli::Command;
pub use keys::Key;
pub use problem::{ConfigError, Problem, ProblemCode};
pub use requested::{GivenValue, Requested};
pub use types::{
    AllowAdd, Config, ControlSocket, DeviceConfig, FeaturesVersion, HelperConfig, IdentityConfig,
    PollMode, QueuePairCount, SandboxMode, Socket, WorkersConfig,
};
