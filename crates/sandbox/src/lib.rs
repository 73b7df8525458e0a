//! Least privilege: what each kind of thread may ask of the kernel.
//!
//! A fault in the code that reads what guests and front-ends write must not become a fault of the
//! host. So each thread gives up what it does not need, before it reads the first byte of theirs:
//!
//! | what | limited by | where |
//! |---|---|---|
//! | system calls and their arguments | a seccomp filter for each [`ThreadKind`] | [`calls`] |
//! | files | Landlock rules, where the kernel has Landlock | [`files`] |
//! | capabilities | none remain, but to the helper | [`capabilities`] |
//! | user and groups | those that are configured | [`Identity`] |
//! | mounts, System V IPC | namespaces of its own, where allowed | [`namespaces`] |
//! | new privileges by executing a program, core dumps | `no_new_privs`, not dumpable | [`Sandbox::confine_process`] |
//!
//! # Order
//!
//! All of it belongs to a thread, and a new thread inherits it from the thread that starts it. A
//! restriction can be added and never taken back. So a program
//!
//! 1. opens what it needs, and reads nothing that others control meanwhile;
//! 2. calls [`Identity::assume`] and [`Sandbox::confine_process`] in its main thread, from which
//!    all other threads inherit them; a thread that was started before calls them itself;
//! 3. calls [`Sandbox::confine_thread`] as the first act of every thread, with the thread's kind;
//! 4. calls it in the main thread as well, once all others are started.
//!
//! A thread that is started by a confined one is confined by both lists. The list of a kind that
//! starts threads therefore contains what those may do ([`ThreadKind::starts`]).
//!
//! # What happens to a forbidden call
//!
//! It fails with EPERM, as libraries expect it where a right is missing, and the thread continues.
//! The calls in [`calls::never_used`] end the process instead: no library tries them, so that one
//! of them means that foreign code runs. The kernel notes both in its log. In
//! [`Enforcement::Log`] a call is noted and carried out, and files and capabilities are not
//! limited, because the kernel could not carry on there.

pub mod calls;
pub mod capabilities;
pub mod files;
mod filter;
mod identity;
pub mod namespaces;
mod sys;
mod thread_kind;

use std::io;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::set_no_new_privs;
use seccompiler::BpfProgram;

pub use files::{AddedFiles, FileRules, LandlockState};
pub use identity::Identity;
pub use thread_kind::ThreadKind;

/// What happens to a call that a thread may not make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enforcement {
    /// It fails, or ends the process.
    Deny,
    /// The kernel logs it and carries it out. This finds out what a list lacks.
    Log,
}

/// The sandbox of a process.
#[derive(Debug)]
pub struct Sandbox {
    enforcement: Enforcement,
    files: FileRules,
    /// What holds for all threads: the calls that are never used, and clone3(2).
    process_filters: [BpfProgram; 2],
    /// One for each of [`ThreadKind::ALL`], in that order.
    thread_filters: Vec<BpfProgram>,
}

impl Sandbox {
    /// Prepares the filters of all kinds of threads, and restricts nothing yet.
    ///
    /// # Errors
    /// When this machine's architecture has no filters.
    pub fn new(enforcement: Enforcement, files: FileRules) -> Result<Self, SandboxError> {
        let thread_filters = ThreadKind::ALL
            .iter()
            .map(|kind| filter::allow_only(&kind.calls(), enforcement));
        Ok(Self {
            enforcement,
            files,
            process_filters: filter::process_wide(enforcement)?,
            thread_filters: thread_filters.collect::<Result<_, _>>()?,
        })
    }

    /// What happens to a call that is not listed.
    #[must_use]
    pub fn enforcement(&self) -> Enforcement {
        self.enforcement
    }

    /// Restricts the calling thread, and those that it will start, in what no thread of the process
    /// does from then on.
    ///
    /// # Errors
    /// When the kernel has no seccomp filters, or refuses them.
    // syscalls: prctl(PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE) seccomp
    pub fn confine_process(&self) -> Result<(), SandboxError> {
        set_no_new_privs(true).map_err(|error| SandboxError::NoNewPrivileges(error.into()))?;
        set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(|error| SandboxError::Dumpable(error.into()))?;
        let [never_used, no_clone3] = &self.process_filters;
        // The C library tries clone3(2) whenever it starts a thread, so that is no news.
        sys::install(no_clone3, false)
            .and_then(|()| sys::install(never_used, true))
            .map_err(SandboxError::Install)
    }

    /// Restricts the calling thread to what a thread of `kind` does. The result says how far files
    /// are limited.
    ///
    /// # Errors
    /// When the kernel refuses it. The thread must not go on then.
    // syscalls: capget capset landlock_create_ruleset landlock_add_rule landlock_restrict_self
    // syscalls: seccomp
    pub fn confine_thread(&self, kind: ThreadKind) -> Result<LandlockState, SandboxError> {
        let mut landlock = LandlockState::Off;
        if self.enforcement == Enforcement::Deny {
            landlock = files::restrict(kind, &self.files)?;
            capabilities::keep_only(kind.capabilities()).map_err(SandboxError::Capabilities)?;
        }
        let index = ThreadKind::ALL.iter().position(|other| *other == kind);
        match index.and_then(|index| self.thread_filters.get(index)) {
            Some(filter) => sys::install(filter, true).map_err(SandboxError::Install)?,
            None => return Err(SandboxError::Install(io::ErrorKind::NotFound.into())),
        }
        Ok(landlock)
    }
}

/// Why a process or a thread cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A filter cannot be made.
    #[error(
        "the seccomp filter cannot be made ({0}); start with --sandbox=off and please report this as a bug"
    )]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel refuses a filter.
    #[error(
        "the kernel refuses a seccomp filter ({0}); use a kernel with CONFIG_SECCOMP_FILTER, or start with --sandbox=off"
    )]
    Install(#[source] io::Error),
    /// The kernel refuses no_new_privs.
    #[error("the kernel refuses no_new_privs ({0}); start with --sandbox=off")]
    NoNewPrivileges(#[source] io::Error),
    /// The process stays dumpable.
    #[error("core dumps of this process cannot be forbidden ({0}); start with --sandbox=off")]
    Dumpable(#[source] io::Error),
    /// Capabilities cannot be given up.
    #[error("capabilities cannot be given up ({0}); start with --sandbox=off")]
    Capabilities(#[source] io::Error),
    /// Landlock refuses its rules.
    #[error(
        "Landlock refuses the rules for files ({0}); start with --sandbox=off and please report this as a bug"
    )]
    Landlock(#[from] landlock::RulesetError),
}

impl SandboxError {
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Filter(_) => "sandbox-filter-invalid",
            Self::Install(_) => "sandbox-filter-refused",
            Self::NoNewPrivileges(_) | Self::Dumpable(_) => "sandbox-process-not-confined",
            Self::Capabilities(_) => "sandbox-capabilities-kept",
            Self::Landlock(_) => "sandbox-landlock-refused",
        }
    }
}
