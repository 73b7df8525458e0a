//! The sandbox of this process. [`virtionet_sandbox`] says what it restricts, and in which order.
//!
//! Each thread calls [`confine_thread`] before anything else. It does nothing before
//! [`confine_process`], so that code under test runs as it is.

use std::path::{Path, PathBuf};
use std::process;
use std::sync::OnceLock;

use virtionet_config::uplink::UplinkConfig;
use virtionet_config::{Config, SandboxMode, Socket};
use virtionet_placement::interrupts::IrqAffinity;
use virtionet_sandbox::{Enforcement, FileRules, LandlockState, Sandbox, SandboxError, ThreadKind};

use crate::logging;

static SANDBOX: OnceLock<Sandbox> = OnceLock::new();

/// Confines the process as `config` asks for. This must happen while it has one thread.
///
/// # Errors
/// When the kernel refuses it.
pub fn confine_process(config: &Config) -> Result<(), SandboxError> {
    let enforcement = match config.sandbox {
        SandboxMode::Off => return Ok(()),
        SandboxMode::On => Enforcement::Deny,
        SandboxMode::Log => Enforcement::Log,
    };
    let sandbox = Sandbox::new(enforcement, file_rules(config))?;
    SANDBOX.get_or_init(|| sandbox).confine_process()
}

/// Confines the calling thread to what a thread of `kind` does. Where the kernel refuses that, the
/// process ends: no thread may run without its sandbox.
pub fn confine_thread(kind: ThreadKind) {
    confine(kind);
}

/// Does so for the main thread, once it has started all others, and logs what the kernel lacks.
pub fn confine_main() {
    match SANDBOX.get().map(Sandbox::enforcement) {
        None => tracing::warn!(
            "the sandbox is off: a fault in this program has all rights of its user; leave --sandbox=off out"
        ),
        Some(Enforcement::Log) => tracing::warn!(
            "the sandbox only logs system calls that it would refuse, as seccomp records of the kernel's log: use --sandbox=on when none is missing"
        ),
        Some(Enforcement::Deny) => {}
    }
    let state = confine(ThreadKind::Main);
    if let Some(text) = state.and_then(landlock_warning) {
        tracing::warn!("{text}");
    }
}

fn confine(kind: ThreadKind) -> Option<LandlockState> {
    let sandbox = SANDBOX.get()?;
    match sandbox.confine_thread(kind) {
        Ok(state) if sandbox.enforcement() == Enforcement::Deny => Some(state),
        Ok(_) => None,
        Err(error) => {
            logging::print_error(&format!("thread {kind}: {error}"));
            process::exit(1);
        }
    }
}

fn landlock_warning(state: LandlockState) -> Option<&'static str> {
    match state {
        LandlockState::On => None,
        LandlockState::Partly => Some(
            "the kernel's Landlock is older than 6.12, so the sandbox limits files less than it could",
        ),
        LandlockState::Off => Some(
            "the kernel has no Landlock, so the sandbox does not limit files: use a kernel with CONFIG_SECURITY_LANDLOCK, and landlock in lsm= of its command line",
        ),
    }
}

/// What the devices of `config` need of files.
fn file_rules(config: &Config) -> FileRules {
    let devices = || config.devices.iter();
    let sockets = devices().filter_map(|device| match &device.socket {
        Socket::Listen { path, .. } => Some(path),
        Socket::Connect { .. } | Socket::Inherited(_) => None,
    });
    let control = config.control.as_ref().map(|control| &control.path);
    let mut socket_folders: Vec<PathBuf> =
        sockets.chain(control).map(|path| folder(path)).collect();
    socket_folders.sort();
    socket_folders.dedup();
    FileRules {
        socket_folders,
        opens_taps: devices().any(|device| match &device.uplink {
            UplinkConfig::Tap(_) => true,
            UplinkConfig::Switch(switch) => switch.tap.is_some(),
            UplinkConfig::Null => false,
        }),
        writes_interrupts: devices().any(|device| device.irq_affinity == IrqAffinity::Apply),
    }
}

/// The directory in which `path` lies.
fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => ".".into(),
        Some(folder) => folder.into(),
        None => "/".into(),
    }
}
