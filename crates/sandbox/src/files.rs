//! Files, limited by Landlock (landlock(7)). Rules are for what a thread opens from now on, not for
//! what is open already, nor for connecting to a unix socket.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use crate::ThreadKind;

/// The version of Landlock whose rights are limited, as far as the kernel has them.
const NEWEST: ABI = ABI::V6;

/// The files of this process that depend on its configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileRules {
    /// The directories in which sockets were created that are removed at the end.
    pub socket_folders: Vec<PathBuf>,
    /// Whether queues of a TAP are opened.
    pub opens_taps: bool,
    /// Whether CPU masks of interrupts and queues are written.
    pub writes_interrupts: bool,
    /// The files of devices that are added later.
    pub added: AddedFiles,
}

/// What is needed to add devices while the process runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddedFiles {
    /// The directories in which their sockets are made, and removed.
    pub socket_folders: Vec<PathBuf>,
    /// The directory of their crash records.
    pub state_folder: Option<PathBuf>,
    /// The directory of the configuration file, which is read again.
    pub config_folder: Option<PathBuf>,
}

/// How far the files of a thread are limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LandlockState {
    /// Not at all: the kernel has no Landlock, or it is not asked for.
    Off,
    /// An old kernel lacks some rights; those that it has are limited.
    Partly,
    /// Completely.
    On,
}

/// What a thread does with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileUse {
    /// Reads it, or lists the directory and all below.
    Read,
    /// Writes it, or the files below.
    Write,
    /// Reads and writes the device, ioctls included.
    Device,
    /// Removes sockets from the directory.
    Remove,
    /// Makes sockets in the directory.
    MakeSocket,
    /// Makes, reads and writes the files of the directory.
    Keep,
}

impl FileUse {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Read => AccessFs::ReadFile | AccessFs::ReadDir,
            Self::Write => AccessFs::WriteFile | AccessFs::Truncate,
            Self::Device => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
            Self::Remove => AccessFs::RemoveFile.into(),
            Self::MakeSocket => AccessFs::MakeSock.into(),
            Self::Keep => {
                AccessFs::MakeReg | AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate
            }
        }
    }
}

/// The files that a thread of `kind` uses; `None` if it has those of the thread that starts it.
fn files_of(kind: ThreadKind, rules: &FileRules) -> Option<Vec<(PathBuf, FileUse)>> {
    let mut files: Vec<(PathBuf, FileUse)> = Vec::new();
    let mut add = |paths: &[&str], file_use| {
        files.extend(paths.iter().map(|path| (PathBuf::from(path), file_use)));
    };
    match kind {
        // They are started while front-ends are served, which may hold all descriptors that the
        // process can have, and a rule set takes one.
        ThreadKind::Worker | ThreadKind::Qmp => return None,
        ThreadKind::Session | ThreadKind::Placer | ThreadKind::Manager => {
            add(&["/proc", "/sys"], FileUse::Read);
            if rules.opens_taps {
                add(&["/dev/net/tun"], FileUse::Device);
            }
            if rules.writes_interrupts {
                add(&["/run/irqbalance"], FileUse::Read);
                add(&["/proc/irq", "/sys/devices"], FileUse::Write);
            }
        }
        ThreadKind::Control => add(&["/proc", "/sys"], FileUse::Read),
        ThreadKind::Helper => {
            if rules.writes_interrupts {
                add(&["/proc/irq", "/sys/devices"], FileUse::Write);
            }
        }
        ThreadKind::Main
        | ThreadKind::SwitchForwarder
        | ThreadKind::Log
        | ThreadKind::Closer
        | ThreadKind::Handover
        | ThreadKind::Watchdog => {}
    }
    let AddedFiles {
        socket_folders: added,
        state_folder,
        config_folder,
    } = &rules.added;
    if matches!(
        kind,
        ThreadKind::Main | ThreadKind::Session | ThreadKind::Manager | ThreadKind::Helper
    ) {
        let folders = rules.socket_folders.iter().chain(added);
        files.extend(folders.map(|folder| (folder.clone(), FileUse::Remove)));
    }
    if matches!(kind, ThreadKind::Manager | ThreadKind::Helper) {
        files.extend(
            added
                .iter()
                .map(|folder| (folder.clone(), FileUse::MakeSocket)),
        );
    }
    if kind == ThreadKind::Manager {
        files.extend(
            state_folder
                .iter()
                .map(|folder| (folder.clone(), FileUse::Keep)),
        );
        files.extend(
            config_folder
                .iter()
                .map(|folder| (folder.clone(), FileUse::Read)),
        );
    }
    Some(files)
}

/// Limits the calling thread to the files of `kind`.
pub(crate) fn restrict(kind: ThreadKind, rules: &FileRules) -> Result<LandlockState, RulesetError> {
    let Some(files) = files_of(kind, rules) else {
        // The rules of the thread that starts it hold.
        return Ok(LandlockState::On);
    };
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?
        // The process has set it already, and not every thread may set it again.
        .no_new_privs(false);
    for (path, file_use) in files {
        ruleset = allow(ruleset, &path, file_use)?;
    }
    Ok(state(&ruleset.restrict_self()?))
}

/// Adds a rule; a path that does not exist needs none.
fn allow(
    ruleset: RulesetCreated,
    path: &Path,
    file_use: FileUse,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(fd) => ruleset.add_rule(PathBeneath::new(fd, file_use.rights())),
        Err(_) => Ok(ruleset),
    }
}

fn state(status: &RestrictionStatus) -> LandlockState {
    match status.ruleset {
        RulesetStatus::FullyEnforced => LandlockState::On,
        RulesetStatus::PartiallyEnforced => LandlockState::Partly,
        RulesetStatus::NotEnforced => LandlockState::Off,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_configuration_asks_for_can_be_written() {
        let writable = |kind, rules: &FileRules| {
            let files = files_of(kind, rules).unwrap_or_default();
            let written = files
                .into_iter()
                .filter(|(_, file_use)| *file_use != FileUse::Read);
            written.map(|(path, _)| path).collect::<Vec<_>>()
        };
        let none = FileRules::default();
        let all = FileRules {
            socket_folders: vec!["/run/vnet".into()],
            opens_taps: true,
            writes_interrupts: true,
            added: AddedFiles {
                socket_folders: vec!["/run/added".into()],
                state_folder: Some("/run/state".into()),
                config_folder: Some("/etc/vnet".into()),
            },
        };
        for kind in ThreadKind::ALL {
            assert_eq!(writable(kind, &none), [""; 0].map(PathBuf::from), "{kind}");
            let expected: &[&str] = match kind {
                ThreadKind::Main => &["/run/vnet", "/run/added"],
                ThreadKind::Session => &[
                    "/dev/net/tun",
                    "/proc/irq",
                    "/sys/devices",
                    "/run/vnet",
                    "/run/added",
                ],
                ThreadKind::Manager => &[
                    "/dev/net/tun",
                    "/proc/irq",
                    "/sys/devices",
                    "/run/vnet",
                    "/run/added",
                    "/run/added",
                    "/run/state",
                ],
                ThreadKind::Placer => &["/dev/net/tun", "/proc/irq", "/sys/devices"],
                ThreadKind::Helper => &[
                    "/proc/irq",
                    "/sys/devices",
                    "/run/vnet",
                    "/run/added",
                    "/run/added",
                ],
                _ => &[],
            };
            let expected: Vec<PathBuf> = expected.iter().map(PathBuf::from).collect();
            assert_eq!(writable(kind, &all), expected, "{kind}");
        }
    }
}
