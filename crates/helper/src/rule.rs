//! One rule, as the daemon sends it.

use std::path::Path;

use serde::{Deserialize, Serialize};
use virtionet_base::Pattern;

use crate::raw_path::RawPath;

/// Something that the helper may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rule {
    /// Open queues of the TAP of exactly this name, make it, set its MTU, and bring it up. A `%d`
    /// in the name stands for the number that the kernel chooses.
    Tap(String),
    /// The same for all TAPs whose name matches.
    Taps(#[serde(with = "as_text")] Pattern),
    /// Make those TAPs ports of the bridge of exactly this name.
    Bridge(String),
    /// Make them ports of all bridges whose name matches.
    Bridges(#[serde(with = "as_text")] Pattern),
    /// Connect to the unix socket at exactly this path.
    Socket(SocketPath),
    /// Connect to all unix sockets whose path matches.
    Sockets(#[serde(with = "as_text")] Pattern),
    /// Remove the socket file at exactly this path.
    OwnSocket(SocketPath),
    /// Make sockets, and remove them, at all paths that match.
    OwnSockets(#[serde(with = "as_text")] Pattern),
    /// Write the CPU masks of interrupts and of network interfaces' queues.
    Affinity,
}

/// The path of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketPath(RawPath);

impl SocketPath {
    pub(crate) fn as_path(&self) -> &Path {
        self.0.as_path()
    }
}

impl Rule {
    /// The rule that allows connecting to the socket at `path`.
    #[must_use]
    pub fn socket_at(path: &Path) -> Self {
        Self::Socket(SocketPath(path.into()))
    }

    /// The rule that allows removing the file of the socket at `path`, which the daemon made.
    #[must_use]
    pub fn own_socket_at(path: &Path) -> Self {
        Self::OwnSocket(SocketPath(path.into()))
    }
}

/// A pattern in a message is its text.
mod as_text {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};
    use virtionet_base::Pattern;

    pub(super) fn serialize<S: Serializer>(pattern: &Pattern, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(pattern)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Pattern, D::Error> {
        let text = String::deserialize(from)?;
        let pattern = text.parse();
        pattern.map_err(|error| D::Error::custom(format_args!("{text}: {error}")))
    }
}
