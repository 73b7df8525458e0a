//! The XPS and RPS masks of a TAP's queues.

use std::path::Path;

use super::mask::format_mask;
use super::setting::{AffinitySetting, SettingKind};
use crate::cpuset::CpuSet;
use crate::kernel_files::read_text;

/// Whether the interface in folder `dir` is the TAP with this index. Sysfs shows the interfaces of
/// the network namespace that it was mounted in, which may have another interface of the same name.
pub(super) fn is_tap(dir: &Path, index: u32) -> bool {
    let found = read_text(&dir.join("ifindex"));
    dir.join("tun_flags").exists() && found.ok().and_then(|text| text.parse().ok()) == Some(index)
}

/// The masks of queue `number`, for a worker that is pinned to `cpus`.
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
