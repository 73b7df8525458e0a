//! The masks of a TAP's queues.

use std::path::Path;

use super::{AffinitySetting, SettingKind, format_mask, read};
use crate::cpuset::CpuSet;

/// Whether the interface in the folder `dir` is the TAP of this index: sysfs shows the interfaces of
/// the network namespace that it was mounted in, which may have another one of that name.
pub(super) fn is_tap(dir: &Path, index: u32) -> bool {
    let number = read(&dir.join("ifindex"));
    dir.join("tun_flags").exists() && number.ok().and_then(|n| n.parse().ok()) == Some(index)
}

/// What the masks of queue `number` should be, where the worker that has it stands on `cpus`.
pub(super) fn masks(dir: &Path, number: usize, cpus: &CpuSet) -> [AffinitySetting; 2] {
    let queues = dir.join("queues");
    let setting = |file: String, kind| AffinitySetting {
        file: queues.join(file),
        value: format_mask(cpus),
        kind,
    };
    [
        setting(format!("tx-{number}/xps_cpus"), SettingKind::Xps),
        setting(format!("rx-{number}/rps_cpus"), SettingKind::Rps),
    ]
}
