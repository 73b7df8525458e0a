//! The sandbox of this process. [`virtionet_sandbox`] says what it restricts, and in which order.
//!
//! Each thread calls [`confine_thread`] before anything else. It does nothing before [`prepare`],
//! so that code under test runs as it is.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::OnceLock;

use rustix::thread::{CapabilitySet, capabilities};
use virtionet_config::uplink::UplinkConfig;
use virtionet_config::{AllowAdd, Config, SandboxMode};
use virtionet_placement::interrupts::IrqAffinity;
use virtionet_sandbox::{
    AddedFiles, Enforcement, FileRules, Identity, LandlockState, Sandbox, SandboxError, ThreadKind,
    namespaces,
};

use crate::identity::{self, IdentityError};
use crate::logging;

static CONFINEMENT: OnceLock<Confinement> = OnceLock::new();

/// What the process gives up once it has opened what it needs.
#[derive(Debug)]
struct Confinement {
    /// As whom it runs then.
    identity: Option<Identity>,
    sandbox: Option<Sandbox>,
}

/// Why the process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// Its user cannot be changed.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The kernel refuses the sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl ConfineError {
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Identity(error) => error.code(),
            Self::Sandbox(error) => error.code(),
        }
    }
}

/// Prepares what `config` asks for, and gives up nothing yet but the view of the host's mounts.
/// This must happen while the process has one thread.
///
/// # Errors
/// When there is no such user, or no filter for this machine.
pub fn prepare(config: &Config) -> Result<(), ConfineError> {
    let identity = identity::resolve(&config.identity)?;
    let sandbox = new_sandbox(config.sandbox, file_rules(config))?;
    if config.sandbox == SandboxMode::On {
        // Where that is not allowed, the process has no right to mount anything either.
        let _ = namespaces::enter();
    }
    CONFINEMENT.get_or_init(|| Confinement { identity, sandbox });
    Ok(())
}

/// Prepares the sandbox of the helper, which keeps its user. It removes `sockets` at the end, makes
/// those of devices that are added in the directories `added`, and writes CPU masks with `affinity`.
///
/// # Errors
/// When there is no filter for this machine.
pub fn prepare_helper<'a>(
    mode: SandboxMode,
    sockets: impl Iterator<Item = &'a Path>,
    added: Vec<PathBuf>,
    affinity: bool,
) -> Result<(), SandboxError> {
    let files = FileRules {
        socket_folders: folders(sockets),
        opens_taps: false,
        writes_interrupts: affinity,
        added: AddedFiles {
            socket_folders: added,
            ..AddedFiles::default()
        },
    };
    let sandbox = new_sandbox(mode, files)?;
    CONFINEMENT.get_or_init(|| Confinement {
        identity: None,
        sandbox,
    });
    Ok(())
}

fn new_sandbox(mode: SandboxMode, files: FileRules) -> Result<Option<Sandbox>, SandboxError> {
    let enforcement = match mode {
        SandboxMode::Off => return Ok(None),
        SandboxMode::On => Enforcement::Deny,
        SandboxMode::Log => Enforcement::Log,
    };
    Sandbox::new(enforcement, files).map(Some)
}

/// Makes the calling thread, and those that it will start, one of the configured user, and
/// restricts it in what no thread of the process does from then on.
///
/// # Errors
/// When the kernel refuses it.
pub fn confine_process() -> Result<(), ConfineError> {
    let Some(Confinement { identity, sandbox }) = CONFINEMENT.get() else {
        return Ok(());
    };
    if let Some(identity) = identity {
        let uid = identity.uid;
        let refused = |source| IdentityError::Refused { uid, source };
        identity.assume().map_err(refused)?;
    }
    if let Some(sandbox) = sandbox {
        sandbox.confine_process()?;
    }
    Ok(())
}

/// Confines the calling thread, which was started before the process was confined. Where the kernel
/// refuses that, the process ends.
pub fn confine_early_thread(kind: ThreadKind) {
    if let Err(error) = confine_process() {
        end(kind, &error);
    }
    confine(kind);
}

/// Confines the thread that writes the log, which is started first.
pub fn confine_log() {
    confine_early_thread(ThreadKind::Log);
}

/// Confines the calling thread to what a thread of `kind` does. Where the kernel refuses that, the
/// process ends: no thread may run without its sandbox.
pub fn confine_thread(kind: ThreadKind) {
    confine(kind);
}

/// Does so for the main thread, once it has started all others, and logs what the kernel lacks.
pub fn confine_main() {
    match sandbox().map(Sandbox::enforcement) {
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
    let sandbox = sandbox()?;
    match sandbox.confine_thread(kind) {
        Ok(state) if sandbox.enforcement() == Enforcement::Deny => Some(state),
        Ok(_) => None,
        Err(error) => end(kind, &error),
    }
}

fn sandbox() -> Option<&'static Sandbox> {
    CONFINEMENT.get()?.sandbox.as_ref()
}

fn end(kind: ThreadKind, error: &dyn Error) -> ! {
    logging::print_error(&format!("thread {kind}: {error}"));
    process::exit(1);
}

/// The mode of the sandbox, as `--sandbox` spells it.
#[must_use]
pub fn mode_name() -> &'static str {
    match sandbox().map(Sandbox::enforcement) {
        None => "off",
        Some(Enforcement::Deny) => "on",
        Some(Enforcement::Log) => "log",
    }
}

/// The capabilities that the calling thread has.
// syscalls: capget
#[must_use]
pub fn capability_names() -> Vec<String> {
    let held = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted);
    held.iter_names()
        .map(|(name, _)| format!("CAP_{name}"))
        .collect()
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
    let allowed = config.allow_add.as_ref();
    FileRules {
        socket_folders: folders(config.own_sockets()),
        added: AddedFiles {
            socket_folders: allowed.map(AllowAdd::socket_folders).unwrap_or_default(),
            state_folder: allowed.and(config.state_folder.clone()),
            config_folder: config.file.as_deref().map(folder),
        },
        opens_taps: allowed.is_some_and(|allowed| !allowed.taps.is_empty())
            || devices().any(|device| match &device.uplink {
                UplinkConfig::Tap(_) => true,
                UplinkConfig::Switch(switch) => switch.tap.is_some(),
                UplinkConfig::Null => false,
            }),
        writes_interrupts: devices().any(|device| device.irq_affinity == IrqAffinity::Apply),
    }
}

/// The directories in which `paths` lie.
fn folders<'a>(paths: impl Iterator<Item = &'a Path>) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = paths.map(folder).collect();
    folders.sort();
    folders.dedup();
    folders
}

/// The directory in which `path` lies.
fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => ".".into(),
        Some(folder) => folder.into(),
        None => "/".into(),
    }
}
