//! The kinds of threads.

use std::fmt;

use rustix::thread::CapabilitySet;

use crate::calls::{self, Call};

/// What a thread is for, which decides what it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ThreadKind {
    /// Waits for signals, and ends the others.
    Main,
    /// Serves the front-end of one device, and starts its workers.
    Session,
    /// Carries the frames of queue pairs.
    Worker,
    /// Carries the frames of a switch's TAP.
    SwitchForwarder,
    /// Places workers, watches uplinks, and starts searches over QMP.
    Placer,
    /// Asks a front-end's monitor.
    Qmp,
    /// Answers HTTP requests.
    Control,
    /// Adds and removes devices while the process runs, and starts their threads.
    Manager,
    /// Writes log lines.
    Log,
    /// Closes descriptors of front-ends.
    Closer,
    /// Interrupts writes that block.
    Watchdog,
    /// Waits for the next daemon.
    Handover,
    /// The only thread but `log` of the helper, a process that keeps capabilities and uses them for
    /// the others.
    Helper,
}

impl ThreadKind {
    /// All kinds.
    pub const ALL: [Self; 13] = [
        Self::Main,
        Self::Session,
        Self::Worker,
        Self::SwitchForwarder,
        Self::Placer,
        Self::Qmp,
        Self::Control,
        Self::Manager,
        Self::Log,
        Self::Closer,
        Self::Watchdog,
        Self::Handover,
        Self::Helper,
    ];

    /// The system calls that it may make.
    #[must_use]
    pub fn calls(self) -> Vec<Call> {
        calls::of_kind(self)
    }

    /// The kinds of threads that it starts after it is confined. Each is confined by its own list
    /// and by that of the thread that starts it.
    #[must_use]
    pub fn starts(self) -> &'static [Self] {
        match self {
            Self::Session => &[Self::Worker],
            Self::Placer => &[Self::Qmp],
            Self::Manager => &[Self::Session],
            _ => &[],
        }
    }

    /// The capabilities that it keeps, as far as the process has them.
    ///
    /// CAP_NET_ADMIN opens queues of a TAP, makes a TAP again that was deleted, sets its MTU, and
    /// writes steering masks. CAP_DAC_OVERRIDE reaches sockets in directories of other users, such
    /// as libvirt's. Only the helper keeps them.
    #[must_use]
    pub fn capabilities(self) -> CapabilitySet {
        match self {
            Self::Helper => CapabilitySet::NET_ADMIN | CapabilitySet::DAC_OVERRIDE,
            _ => CapabilitySet::empty(),
        }
    }
}

impl fmt::Display for ThreadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Main => "main",
            Self::Session => "session",
            Self::Worker => "worker",
            Self::SwitchForwarder => "switch forwarder",
            Self::Placer => "placer",
            Self::Qmp => "qmp",
            Self::Control => "control",
            Self::Manager => "manager",
            Self::Log => "log",
            Self::Closer => "closer",
            Self::Watchdog => "watchdog",
            Self::Handover => "handover",
            Self::Helper => "helper",
        })
    }
}
