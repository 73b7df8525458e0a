//! The layers of settings, and the devices that they describe together.
//!
//! The layers of a device are, from the strongest to the weakest:
//!
//! 1. with a file: the `--device` that names the device, the flags, the device's `[[device]]`, the
//!    file's `[defaults]`. The command line as a whole overrides the file as a whole.
//! 2. without a file: the `--device` of the device, the flags.

use std::path::Path;
use std::rc::Rc;

use crate::device::DeviceDescription;
use crate::file::ConfigFile;
use crate::inline::parse_device_keys;
use crate::keys::Key;
use crate::problem::{Problem, ProblemCode, Problems};
use crate::settings::{Origin, Settings};

/// The devices that the flags and the `--device` texts describe, at least one unless `may_be_empty`.
#[must_use]
pub(crate) fn devices_of_command_line(
    flags: Settings,
    texts: &[String],
    may_be_empty: bool,
    problems: &mut Problems,
) -> Vec<DeviceDescription> {
    if texts.is_empty() {
        if may_be_empty && flags.keys().next().is_none() {
            return Vec::new();
        }
        let device = problems
            .record(refuse_no_device(&flags))
            .map(|()| DeviceDescription {
                origin: Origin::Flag,
                default_name: "vnet".into(),
                settings: flags,
            });
        return device.into_iter().collect();
    }
    problems.record(refuse_beside(&flags, "--device"));
    let common = flags.into_common();
    let mut devices = Vec::new();
    for (origin, own) in parse_device_flags(texts, problems) {
        devices.push(DeviceDescription {
            origin,
            default_name: numbered_name(devices.len()),
            settings: own.merged_over(&common),
        });
    }
    devices
}

/// The devices of `file`, with the settings of the command line, and the devices that the command
/// line adds.
#[must_use]
pub(crate) fn devices_of_file(
    file: ConfigFile,
    flags: Settings,
    texts: &[String],
    problems: &mut Problems,
) -> Vec<DeviceDescription> {
    problems.record(refuse_beside(&flags, "--config"));
    let (flags, defaults) = (flags.into_common(), file.defaults.into_common());
    let mut devices: Vec<DeviceDescription> = file
        .devices
        .into_iter()
        .enumerate()
        .map(|(at, (origin, own))| DeviceDescription {
            origin,
            default_name: numbered_name(at),
            settings: own,
        })
        .collect();
    let in_file = devices.len();
    let mut overrides = vec![Settings::default(); in_file];
    for (origin, own) in parse_device_flags(texts, problems) {
        let named = own.get(Key::NAME).map(|name| name.text().into_owned());
        let same = |device: &DeviceDescription| named.as_deref() == Some(&*device.name());
        match devices.iter().take(in_file).position(same) {
            Some(at) if overrides[at].keys().next().is_none() => overrides[at] = own,
            Some(_) => problems.add(origin.problem(
                ProblemCode::DeviceRepeated,
                format_args!(
                    "another --device has the same name: write all keys of a device into one \
                     --device"
                ),
            )),
            None => devices.push(DeviceDescription {
                origin,
                default_name: numbered_name(devices.len()),
                settings: own.merged_over(&flags).merged_over(&defaults),
            }),
        }
    }
    for (device, own) in devices.iter_mut().zip(overrides) {
        let in_file = std::mem::take(&mut device.settings).merged_over(&defaults);
        device.settings = own.merged_over(&flags).merged_over(&in_file);
    }
    devices
}

/// The problem that neither the file at `path` nor the command line describes a device.
#[must_use]
pub(crate) fn no_device_in_file(path: &Path) -> Problem {
    Problem::in_line(
        &Rc::from(path),
        1,
        ProblemCode::DeviceMissing,
        "no device is described: add [[device]], with socket-path and tap below it".into(),
    )
}

fn numbered_name(at: usize) -> String {
    format!("vnet{at}")
}

/// The settings of each `--device`.
fn parse_device_flags(texts: &[String], problems: &mut Problems) -> Vec<(Origin, Settings)> {
    let parse = |text: &String| {
        let origin = Origin::Device(text.as_str().into());
        let keys = problems.record(parse_device_keys(text, &origin))?;
        Some((origin, keys))
    };
    texts.iter().filter_map(parse).collect()
}

fn refuse_no_device(flags: &Settings) -> Result<(), Problem> {
    let is_set = |key| flags.get(key).is_some();
    if [Key::SOCKET_PATH, Key::FD, Key::TAP, Key::UPLINK]
        .into_iter()
        .any(is_set)
    {
        return Ok(());
    }
    Err(Problem::new(
        ProblemCode::DeviceMissing,
        "no device is described: give its socket and its uplink, such as --socket-path \
         /run/vnet.sock --tap tap0, or a file that describes devices with --config FILE"
            .into(),
    ))
}

/// Refuses flags that describe a single device, where there may be several.
fn refuse_beside(flags: &Settings, beside: &str) -> Result<(), Problem> {
    match flags.keys().find(|key| !key.is_common()) {
        None => Ok(()),
        Some(key) => {
            let key = key.name;
            Err(Problem::new(
                ProblemCode::KeyMisplaced,
                format!(
                    "--{key} cannot be used beside {beside}: write it as {key}=... into the \
                     --device that it belongs to"
                ),
            ))
        }
    }
}
