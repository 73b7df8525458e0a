//! The requests that change the daemon, their answers, and the answers about its health, its version
//! and its switches.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A change that a client asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct ChangeRequest {
    /// The change.
    pub change: Change,
    /// Who asks for it.
    pub peer: Peer,
    /// When it is carried out.
    pub condition: Condition,
}

/// The process that asks for a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its user.
    pub uid: u32,
    /// Its number, if the kernel reports it.
    pub pid: Option<i32>,
}

/// For the log.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "user {}, process {pid}", self.uid),
            None => write!(f, "user {}", self.uid),
        }
    }
}

/// When a change is carried out (RFC 9110, section 13).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Condition {
    /// In any case.
    #[default]
    Always,
    /// If the device has this revision (If-Match).
    Revision(u64),
    /// If there is a device (If-Match: *).
    Exists,
    /// If there is no device (If-None-Match: *).
    Absent,
}

/// A change.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Adds a device with these values of the keys of a `[[device]]`.
    Add(BTreeMap<String, Value>),
    /// Removes the device of this name.
    Remove(String),
    /// Changes settings of the device of this name.
    Set(String, DeviceSettings),
    /// Reads the configuration again, and applies the differences, unless `dry_run` is set.
    Reload {
        /// Only reports the differences.
        dry_run: bool,
    },
}

/// Settings of a device that can be changed while it works. What is missing stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSettings {
    /// Whether the link is up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkState>,
}

/// The state of a device's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// Front-ends are served.
    #[default]
    Up,
    /// The connection with the front-end is closed, and none is accepted or made.
    Down,
}

impl fmt::Display for LinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

/// What a change did.
#[derive(Debug, Clone, PartialEq)]
pub struct Changed {
    /// Whether a device was added.
    pub is_created: bool,
    /// The answer.
    pub body: Value,
    /// The revision of the device that was changed, if it is still there.
    pub revision: Option<u64>,
}

/// What a reload does, or would do: the names of devices.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// Whether nothing was changed, because only the differences were asked for.
    pub dry_run: bool,
    /// Those that are added.
    pub added: Vec<String>,
    /// Those that are removed.
    pub removed: Vec<String>,
    /// Those that are removed, and added with their new configuration.
    pub changed: Vec<String>,
    /// Those that stay as they are.
    pub unchanged: Vec<String>,
}

/// Receives the result of a change.
pub type Reply = Box<dyn FnOnce(Result<Changed, Refusal>) + Send>;

/// Why a request is refused. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// A stable name of the cause, for programs.
    pub code: Cow<'static, str>,
    /// What happened, and what to do: one sentence.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    #[must_use]
    pub fn new(status: u16, code: impl Into<Cow<'static, str>>, message: String) -> Self {
        Self {
            status,
            code: code.into(),
            message,
        }
    }
}

/// The answer to a request that is refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReport {
    /// What happened, and what to do: one sentence.
    pub error: String,
    /// A stable name of the cause, for programs.
    #[serde(default)]
    pub code: String,
}

/// The answer to `GET /v1/health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Whether the daemon works: it is true in every answer.
    pub live: bool,
    /// Whether all devices can be served.
    pub ready: bool,
    /// Why it is not ready.
    pub reasons: Vec<ReadyProblem>,
}

impl Default for Health {
    fn default() -> Self {
        Self::with(Vec::new())
    }
}

impl Health {
    /// The health of a daemon with these problems.
    #[must_use]
    pub fn with(reasons: Vec<ReadyProblem>) -> Self {
        Self {
            live: true,
            ready: reasons.is_empty(),
            reasons,
        }
    }
}

/// Why the daemon is not ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyProblem {
    /// The device that is concerned; `None` for the whole process.
    pub device: Option<String>,
    /// A stable name of the cause, for programs.
    pub code: String,
    /// What is wrong, and what to do: one sentence.
    pub reason: String,
}

/// The answer to `GET /v1/version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// The versions of the API that it answers.
    pub api: Vec<String>,
}

/// A switch of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchReport {
    /// Its name.
    pub name: String,
    /// The host's TAP, if that is a port.
    pub tap: Option<String>,
    /// The devices that have ports.
    pub devices: Vec<String>,
    /// The addresses that it has learned and not forgotten.
    pub addresses: Vec<SwitchAddress>,
}

/// An address that a switch has learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchAddress {
    /// The MAC address, such as `52:54:00:00:00:01`.
    pub mac: String,
    /// The device behind the port; `None` for the host.
    pub device: Option<String>,
}
