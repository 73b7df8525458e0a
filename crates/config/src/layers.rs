//! From command line and file to the devices that they describe together.
//!
//! What is said of a device, the strongest first: its `--device` (in a file's case the one that
//! names it), the flags beside `--device` or `--config`, its `[[device]]` in the file, the file's
//! `[defaults]`. Without a file a device's own keys are stronger than the flags that stand beside
//! them for all; the file as a whole is weaker than the command line as a whole.

use std::path::Path;
use std::rc::Rc;

use super::device::Described;
use super::file::File;
use super::given::{Place, Settings};
use super::keys::Holder;
use super::problem::{Problem, Problems};
use crate::inline::device_keys;

/// The devices that the flags of one and `--device`s describe.
#[must_use]
pub fn of_command_line(flags: Settings, texts: &[String], found: &mut Problems) -> Vec<Described> {
    if texts.is_empty() {
        let device = found.note(refuse_no_device(&flags)).map(|()| Described {
            place: Place::Flag,
            default_name: "vnet".into(),
            settings: flags,
        });
        return device.into_iter().collect();
    }
    found.note(refuse_beside(&flags, "--device"));
    let common = flags.common();
    let mut devices = Vec::new();
    for (place, own) in inline(texts, found) {
        devices.push(Described {
            place,
            default_name: numbered(devices.len()),
            settings: own.over(&common),
        });
    }
    devices
}

/// The devices of `file`, with what the command line says of them, and those that it adds.
#[must_use]
pub fn of_file(
    path: &Path,
    file: File,
    flags: Settings,
    texts: &[String],
    found: &mut Problems,
) -> Vec<Described> {
    found.note(refuse_beside(&flags, "--config"));
    let (flags, defaults) = (flags.common(), file.defaults.common());
    let mut devices: Vec<Described> = file
        .devices
        .into_iter()
        .enumerate()
        .map(|(at, (place, own))| Described {
            place,
            default_name: numbered(at),
            settings: own,
        })
        .collect();
    let in_file = devices.len();
    let mut overrides = vec![Settings::default(); in_file];
    for (place, own) in inline(texts, found) {
        let named = own.get("name").map(|name| name.text().into_owned());
        let same = |device: &Described| named.as_deref() == Some(&*device.name());
        match devices.iter().take(in_file).position(same) {
            Some(at) if overrides[at].keys().next().is_none() => overrides[at] = own,
            Some(_) => found.add(place.problem(format_args!(
                "another --device has this name already: write all that is said of it into one"
            ))),
            None => devices.push(Described {
                place,
                default_name: numbered(devices.len()),
                settings: own.over(&flags).over(&defaults),
            }),
        }
    }
    for (device, own) in devices.iter_mut().zip(overrides) {
        let in_file = std::mem::take(&mut device.settings).over(&defaults);
        device.settings = own.over(&flags).over(&in_file);
    }
    if devices.is_empty() {
        found.add(Problem::in_line(
            &Rc::from(path),
            1,
            "no device is described: add [[device]], with socket-path and tap below it".into(),
        ));
    }
    devices
}

fn numbered(at: usize) -> String {
    format!("vnet{at}")
}

/// The keys of each `--device`.
fn inline(texts: &[String], found: &mut Problems) -> Vec<(Place, Settings)> {
    let parse = |text: &String| {
        let place = Place::Device(text.as_str().into());
        let keys = found.note(device_keys(text, &place))?;
        Some((place, keys))
    };
    texts.iter().filter_map(parse).collect()
}

fn refuse_no_device(flags: &Settings) -> Result<(), Problem> {
    let describes = |key| flags.get(key).is_some();
    if ["socket-path", "fd", "tap", "uplink"]
        .into_iter()
        .any(describes)
    {
        return Ok(());
    }
    Err(Problem::new(
        "no device is described: give its socket and its uplink, such as --socket-path /run/vnet.sock --tap tap0, or a file that describes devices with --config FILE".into(),
    ))
}

/// Flags that describe one device cannot be common to several.
fn refuse_beside(flags: &Settings, beside: &str) -> Result<(), Problem> {
    match flags.keys().find(|key| key.holder == Holder::Device) {
        None => Ok(()),
        Some(key) => {
            let key = key.name;
            Err(Problem::new(format!(
                "--{key} stands beside {beside}: write it as {key}=... into the --device that it belongs to"
            )))
        }
    }
}
