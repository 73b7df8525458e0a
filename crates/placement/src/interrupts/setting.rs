//! One file of the kernel and the value that it should hold.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::mask::parse_mask;
use crate::cpuset::CpuSet;

/// A file and the value that it should hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AffinitySetting {
    /// The file.
    pub file: PathBuf,
    /// The value, as the kernel accepts it.
    pub value: String,
    /// What kind of file it is.
    pub kind: SettingKind,
}

/// What a setting configures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SettingKind {
    /// The XPS mask of a TAP queue.
    Xps,
    /// The RPS mask of a TAP queue, which is set only where RPS was on.
    Rps,
    /// The CPU list of this interrupt.
    Irq(u32),
}

impl AffinitySetting {
    /// The shell command that applies this setting.
    #[must_use]
    pub fn command(&self) -> String {
        format!("echo {} > {}", self.value, self.file.display())
    }

    /// Whether a file with the content `text` holds the value. The kernel may write the same CPUs
    /// in another form.
    pub(super) fn matches(&self, text: &str) -> bool {
        let same_cpus = match self.kind {
            SettingKind::Irq(_) => text.parse::<CpuSet>().ok() == self.value.parse::<CpuSet>().ok(),
            _ => parse_mask(text) == parse_mask(&self.value),
        };
        same_cpus || text == self.value
    }

    /// Whether a file with the content `original` should be set at all.
    pub(super) fn applies_to(&self, original: &str) -> bool {
        self.kind != SettingKind::Rps || parse_mask(original).is_none_or(|cpus| !cpus.is_empty())
    }
}
