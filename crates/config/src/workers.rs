//! How queue pairs are distributed over workers, and what that excludes.

use virtionet_placement::CpuSet;

use crate::device::DeviceDescription;
use crate::keys::Key;
use crate::problem::{Problem, ProblemCode, Problems};
use crate::settings::{SettingValue, Settings};
use crate::types::{DeviceConfig, WorkersConfig};

/// The workers of the process. `devices` are all devices with their descriptions.
pub(crate) fn workers(
    process: &Settings,
    devices: &[(&DeviceDescription, DeviceConfig)],
    problems: &mut Problems,
) -> WorkersConfig {
    let Some(value) = process.get(Key::WORKERS) else {
        return WorkersConfig::PerPair;
    };
    let workers = problems.record(parse(value)).unwrap_or_default();
    if workers != WorkersConfig::PerPair {
        check_devices(value, devices, problems);
    }
    workers
}

fn parse(value: &SettingValue) -> Result<WorkersConfig, Problem> {
    let text = value.text();
    let refuse = |why: &str| {
        value.origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{} {why}: write per-pair, or list: and CPUs, such as list:2-3",
                value.origin.set(Key::WORKERS, &text)
            ),
        )
    };
    if text == "per-pair" {
        return Ok(WorkersConfig::PerPair);
    }
    let list = text
        .strip_prefix("list:")
        .ok_or_else(|| refuse("is not known"))?;
    let cpus: CpuSet = list.parse().map_err(|error| {
        value
            .origin
            .problem(ProblemCode::ValueInvalid, format_args!("{error}"))
    })?;
    match cpus.is_empty() {
        true => Err(refuse("names no CPU")),
        false => Ok(WorkersConfig::Shared(cpus)),
    }
}

/// Adds what devices cannot have if they share workers.
fn check_devices(
    workers: &SettingValue,
    devices: &[(&DeviceDescription, DeviceConfig)],
    problems: &mut Problems,
) {
    let shared = workers.origin.set(Key::WORKERS, workers.text());
    for (description, device) in devices {
        let name = &device.name;
        let placement = description.settings.get(Key::PLACEMENT);
        if let Some(value) = placement.filter(|value| !value.may_be_unused) {
            problems.add(value.origin.problem(
                ProblemCode::KeyUnused,
                format_args!(
                    "{} has no effect with {shared}, whose CPUs are those of the workers: leave it out",
                    value.origin.set(Key::PLACEMENT, value.text()),
                ),
            ));
        }
        if device.postcopy {
            problems.add(workers.origin.problem(
                ProblemCode::KeysConflict,
                format_args!(
                    "{shared} is not possible with postcopy of device {name}: its worker waits for pages of the guest, and would not serve other guests meanwhile; leave one of them out"
                ),
            ));
        }
    }
    let Some((_, first)) = devices.first() else {
        return;
    };
    let other = devices.iter().find(|(_, device)| device.poll != first.poll);
    if let Some((_, other)) = other {
        problems.add(workers.origin.problem(
            ProblemCode::KeysConflict,
            format_args!(
                "{shared} is not possible with different poll modes of the devices {} and {}: give all devices the same",
                first.name, other.name
            ),
        ));
    }
}
