//! From the command line, and the file that it names, to a [`Config`].

use std::path::{Path, PathBuf};

use crate::allow_add::allow_add;
use crate::arguments::Arguments;
use crate::device::DeviceDescription;
use crate::file;
use crate::keys::Key;
use crate::layers;
use crate::ownership::ResourceOwners;
use crate::problem::{ConfigError, Problem, ProblemCode, Problems};
use crate::rights::{helper, identity, sandbox_mode};
use crate::settings::{Origin, SettingValue, Settings};
use crate::socket_file::{check_path, socket_group, socket_mode};
use crate::types::{Config, ControlSocket};
use crate::workers::workers;

impl Config {
    /// Reads the configuration file at `path`, with no flags beside it. Nothing but that file is
    /// opened.
    ///
    /// # Errors
    /// All problems of the file.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        resolve(Arguments {
            config: Some(path.into()),
            ..Arguments::default()
        })
    }
}

/// Resolves `arguments`, together with the file that they name. Nothing but that file is opened.
///
/// # Errors
/// All conflicts and unusable values.
pub(crate) fn resolve(arguments: Arguments) -> Result<Config, ConfigError> {
    let mut problems = Problems::default();
    let mut process = arguments.process;
    let flags = arguments.settings;
    let texts = &arguments.devices;
    let may_be_empty = process.get(Key::ALLOW_ADD).is_some();
    let descriptions = match &arguments.config {
        None => layers::devices_of_command_line(flags, texts, may_be_empty, &mut problems),
        Some(path) => {
            let (in_file, descriptions) =
                devices_with_file(path, flags, texts, may_be_empty, &mut problems);
            process = process.merged_over(&in_file);
            descriptions
        }
    };
    let mut owners = ResourceOwners::default();
    let control = resolve_control(&process, &mut owners, &mut problems);
    let control_read_only = resolve_read_only(&process, &mut owners, &mut problems);
    let handover = resolve_handover(&process, &mut owners, &mut problems);
    let allow_add = problems.record(allow_add(&process));
    if arguments.take_over && process.get(Key::HANDOVER_SOCKET).is_none() {
        problems.add(Origin::Flag.problem(
            ProblemCode::KeyUnused,
            format_args!(
                "--take-over has no effect without the socket of the daemon that runs: add \
                 --handover-socket=PATH"
            ),
        ));
    }
    let state_folder = problems.record(state_folder(&process));
    let sandbox = problems.record(sandbox_mode(&process));
    let identity = problems.record(identity(&process));
    let helper = problems.record(helper(&process));
    let mut devices = Vec::new();
    for description in &descriptions {
        if let Some(device) = description.resolve(&mut problems) {
            owners.add(description, &device, &mut problems);
            devices.push((description, device));
        }
    }
    let workers = workers(&process, &devices, &mut problems);
    problems.into_result()?;
    Ok(Config {
        devices: devices.into_iter().map(|(_, device)| device).collect(),
        file: arguments.config,
        allow_add: allow_add.flatten(),
        control,
        control_read_only,
        handover,
        take_over: arguments.take_over,
        state_folder: state_folder.flatten(),
        workers,
        sandbox: sandbox.unwrap_or_default(),
        identity: identity.unwrap_or_default(),
        helper: helper.unwrap_or_default(),
        verbosity: arguments.verbosity,
    })
}

/// The control socket; `None` where none is configured or it has problems.
fn resolve_control<'a>(
    process: &'a Settings,
    owners: &mut ResourceOwners<'a>,
    problems: &mut Problems,
) -> Option<ControlSocket> {
    let mode = problems.record(socket_mode(process, Key::CONTROL_MODE, Key::CONTROL_GROUP));
    let group = problems.record(socket_group(process, Key::CONTROL_GROUP));
    let Some(value) = process.get(Key::CONTROL) else {
        for key in [Key::CONTROL_MODE, Key::CONTROL_GROUP] {
            if let Some(value) = process.get(key) {
                problems.add(control_missing(key, value));
            }
        }
        return None;
    };
    let path = problems.record(check_path(Key::CONTROL, value))?;
    owners.add_process_socket(Key::CONTROL, &path, value, problems);
    Some(ControlSocket {
        path,
        mode: mode?,
        group: group?,
    })
}

/// The read-only control socket; `None` where none is configured or it has problems.
fn resolve_read_only<'a>(
    process: &'a Settings,
    owners: &mut ResourceOwners<'a>,
    problems: &mut Problems,
) -> Option<ControlSocket> {
    let (key, group_key) = (Key::CONTROL_READ_ONLY, Key::CONTROL_READ_ONLY_GROUP);
    let group = problems.record(socket_group(process, group_key));
    let Some(value) = process.get(key) else {
        if let Some(value) = process.get(group_key) {
            problems.add(value.origin.problem(
                ProblemCode::KeyUnused,
                format_args!(
                    "{} has no effect without such a socket: add {}, or leave {} out",
                    value.origin.set(group_key, value.text()),
                    value.origin.set(key, "PATH"),
                    value.origin.key(group_key),
                ),
            ));
        }
        return None;
    };
    let path = problems.record(check_path(key, value))?;
    owners.add_process_socket(key, &path, value, problems);
    let group = group?;
    Some(ControlSocket {
        path,
        mode: if group.is_some() { 0o660 } else { 0o600 },
        group,
    })
}

/// The socket of the handover; `None` where none is configured or it has problems.
fn resolve_handover<'a>(
    process: &'a Settings,
    owners: &mut ResourceOwners<'a>,
    problems: &mut Problems,
) -> Option<PathBuf> {
    let value = process.get(Key::HANDOVER_SOCKET)?;
    let path = problems.record(check_path(Key::HANDOVER_SOCKET, value))?;
    owners.add_process_socket(Key::HANDOVER_SOCKET, &path, value, problems);
    Some(path)
}

/// The folder for what must outlive the process; `None` where it is not set.
///
/// # Errors
/// When it is empty.
fn state_folder(process: &Settings) -> Result<Option<PathBuf>, Problem> {
    let Some(value) = process.get(Key::STATE_DIR) else {
        return Ok(None);
    };
    if value.value.is_empty() {
        return Err(value.origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{} is empty: write the path of a folder, or leave it out",
                value.origin.key(Key::STATE_DIR)
            ),
        ));
    }
    Ok(Some(value.path().to_owned()))
}

/// The problem that `key` describes a control socket, and that there is none.
fn control_missing(key: Key, value: &SettingValue) -> Problem {
    let origin = &value.origin;
    origin.problem(
        ProblemCode::KeyUnused,
        format_args!(
            "{} has no effect without a control socket: add {}, or leave {} out",
            origin.set(key, value.text()),
            origin.set(Key::CONTROL, "PATH"),
            origin.key(key),
        ),
    )
}

/// The settings of the process in the file at `path`, and the devices of that file and the command
/// line.
fn devices_with_file(
    path: &Path,
    flags: Settings,
    texts: &[String],
    may_be_empty: bool,
    problems: &mut Problems,
) -> (Settings, Vec<DeviceDescription>) {
    let mut file = file::read(path, problems);
    let process = std::mem::take(&mut file.process);
    // Syntax errors hide devices and keys, so that further problems would be misleading.
    let descriptions = match file.is_complete {
        true => layers::devices_of_file(file, flags, texts, problems),
        false => return (process, Vec::new()),
    };
    if descriptions.is_empty() && !may_be_empty && process.get(Key::ALLOW_ADD).is_none() {
        problems.add(layers::no_device_in_file(path));
    }
    (process, descriptions)
}
