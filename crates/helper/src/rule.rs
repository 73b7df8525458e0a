//! One rule, as the daemon sends it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::raw_path::RawPath;

/// Something that the helper may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rule {
    /// Open queues of TAPs whose name matches this pattern, make them, set their MTU, and bring
    /// them up. A `%d` in the name stands for the number that the kernel chooses.
    Tap(String),
    /// Make those TAPs ports of bridges whose name matches this pattern.
    Bridge(String),
    /// Connect to unix sockets whose path matches this pattern. Its `*` does not stand for `/`.
    Socket(String),
    /// Connect to the unix socket at exactly this path.
    ExactSocket(ExactPath),
    /// Write the CPU masks of interrupts and of network interfaces' queues.
    Affinity,
}

/// The path of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExactPath(RawPath);

impl ExactPath {
    pub(crate) fn as_path(&self) -> &Path {
        self.0.as_path()
    }
}

impl Rule {
    /// The rule that allows connecting to the socket at `path`.
    #[must_use]
    pub fn socket_at(path: &Path) -> Self {
        Self::ExactSocket(ExactPath(path.into()))
    }
}
