//! From the command line, and the file that it names, to a [`Config`].

use std::path::Path;

use crate::arguments::Arguments;
use crate::device::{DeviceDescription, check_path};
use crate::file;
use crate::keys::Key;
use crate::layers;
use crate::ownership::ResourceOwners;
use crate::problem::{ConfigError, Problems};
use crate::settings::{Origin, SettingValue, Settings};
use crate::types::Config;

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
    let mut control = arguments
        .control
        .map(|path| SettingValue::new(path, &Origin::Flag));
    let flags = arguments.settings;
    let texts = &arguments.devices;
    let descriptions = match arguments.config {
        None => layers::devices_of_command_line(flags, texts, &mut problems),
        Some(path) => {
            let (in_file, descriptions) = devices_with_file(&path, flags, texts, &mut problems);
            control = control.or(in_file);
            descriptions
        }
    };
    let mut owners = ResourceOwners::default();
    let control_path = control.as_ref().and_then(|value| {
        let path = problems.record(check_path(Key::CONTROL, value))?;
        owners.add_control(&path, value);
        Some(path)
    });
    let mut devices = Vec::new();
    for description in &descriptions {
        if let Some(device) = description.resolve(&mut problems) {
            owners.add(description, &device, &mut problems);
            devices.push(device);
        }
    }
    problems.into_result()?;
    Ok(Config {
        devices,
        control: control_path,
        verbosity: arguments.verbosity,
    })
}

/// The control socket in the file at `path`, and the devices of that file and the command line.
fn devices_with_file(
    path: &Path,
    flags: Settings,
    texts: &[String],
    problems: &mut Problems,
) -> (Option<SettingValue>, Vec<DeviceDescription>) {
    let mut file = file::read(path, problems);
    let control = file.control.take();
    // Syntax errors hide devices and keys, so that further problems would be misleading.
    let descriptions = match file.is_complete {
        true => layers::devices_of_file(path, file, flags, texts, problems),
        false => Vec::new(),
    };
    (control, descriptions)
}
