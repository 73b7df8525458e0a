//! Writing settings, and restoring the files' earlier content.
//!
//! A file belongs to the device that set it first, so that two devices whose TAPs share a NIC do
//! not overwrite each other's settings. A file that another program has changed since stays as it
//! is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use virtionet_base::rights::with_help;

use super::irqbalance::{self, BanList};
use super::outcome::{SettingOutcome, SettingRefusal};
use super::setting::{AffinitySetting, SettingKind};
use crate::kernel_files::read_text;

/// The files that this process has set, for all its devices. Dropping it restores them.
#[derive(Debug, Default)]
pub struct IrqAffinityManager {
    applied_settings: Mutex<BTreeMap<PathBuf, AppliedSetting>>,
    /// irqbalance's list of banned interrupts, where it is to be changed.
    bans: Option<Mutex<BanList>>,
    /// Whether irqbalance has accepted all interrupts that are set.
    banned: AtomicBool,
}

/// What a manager has set, for the process that continues with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AffinityImage {
    settings: Vec<AppliedSetting>,
    banned: BTreeSet<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct AppliedSetting {
    device: String,
    setting: AffinitySetting,
    /// The content after the write, which may differ from the value: the kernel removes the CPUs of
    /// `isolcpus=` from an RPS mask.
    read_back: String,
    original: String,
}

impl IrqAffinityManager {
    /// A manager that also bans the host's irqbalance, if it runs, from moving the interrupts that
    /// are set.
    #[must_use]
    pub fn with_irqbalance() -> Self {
        let mut manager = Self::default();
        manager.bans = Some(Mutex::new(BanList::new(Path::new(irqbalance::RUN_DIR))));
        manager
    }

    /// What is set, and what was there before.
    #[must_use]
    pub fn to_image(&self) -> AffinityImage {
        AffinityImage {
            settings: self.applied_settings().values().cloned().collect(),
            banned: self.bans().map_or_else(BTreeSet::new, |bans| bans.ours()),
        }
    }

    /// Continues with what another manager has set, as if this one had.
    pub fn inherit(&self, image: AffinityImage) {
        if let Some(mut bans) = self.bans() {
            bans.inherit(image.banned);
        }
        let mut applied_settings = self.applied_settings();
        for applied in image.settings {
            applied_settings.insert(applied.setting.file.clone(), applied);
        }
    }

    fn bans(&self) -> Option<MutexGuard<'_, BanList>> {
        let bans = self.bans.as_ref()?;
        Some(bans.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether irqbalance runs and is banned from moving any of the interrupts that are set.
    #[must_use]
    pub fn is_ignored_by_irqbalance(&self) -> bool {
        self.banned.load(Ordering::Relaxed)
    }

    /// Makes `settings` the settings of `device`, and restores the files that it set before and
    /// that are not among them. Files that already hold their value are not written.
    pub fn reconcile(&self, device: &str, settings: &[AffinitySetting]) -> Vec<SettingOutcome> {
        let mut applied_settings = self.applied_settings();
        restore_dropped(&mut applied_settings, device, settings);
        let outcomes = settings
            .iter()
            .filter_map(|setting| apply_setting(&mut applied_settings, device, setting))
            .collect();
        self.ban(&applied_settings);
        outcomes
    }

    /// The settings that [`reconcile`](Self::reconcile) would apply; writes nothing.
    #[must_use]
    pub fn preview(settings: &[AffinitySetting]) -> Vec<SettingOutcome> {
        let preview = |setting: &AffinitySetting| {
            let original = read_text(&setting.file).ok();
            let wanted = original
                .as_ref()
                .is_none_or(|text| setting.applies_to(text));
            wanted.then(|| SettingOutcome {
                setting: setting.clone(),
                original,
                applied: false,
                why: None,
            })
        };
        settings.iter().filter_map(preview).collect()
    }

    /// Restores all files that `device` set.
    pub fn release(&self, device: &str) {
        self.reconcile(device, &[]);
    }

    /// Bans irqbalance from moving the interrupts that are set.
    fn ban(&self, applied_settings: &BTreeMap<PathBuf, AppliedSetting>) {
        let irq = |applied: &AppliedSetting| match applied.setting.kind {
            SettingKind::Irq(irq) => Some(irq),
            _ => None,
        };
        let irqs = applied_settings.values().filter_map(irq).collect();
        if let Some(mut bans) = self.bans() {
            let is_ignored = bans.set(&irqs);
            self.banned.store(is_ignored, Ordering::Relaxed);
        }
    }

    fn applied_settings(&self) -> MutexGuard<'_, BTreeMap<PathBuf, AppliedSetting>> {
        self.applied_settings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for IrqAffinityManager {
    fn drop(&mut self) {
        let mut all = self.applied_settings();
        all.iter()
            .for_each(|(file, applied)| restore(file, applied));
        all.clear();
        self.ban(&all);
    }
}

fn restore_dropped(
    applied_settings: &mut BTreeMap<PathBuf, AppliedSetting>,
    device: &str,
    settings: &[AffinitySetting],
) {
    applied_settings.retain(|file, applied| {
        let keep = applied.device != device || settings.iter().any(|setting| setting.file == *file);
        if !keep {
            restore(file, applied);
        }
        keep
    });
}

/// A file that no longer exists needs nothing, and an error of the write cannot be handled here.
fn restore(file: &Path, applied: &AppliedSetting) {
    if read_text(file).is_ok_and(|now| applied.setting.matches(&now) || applied.read_back == now) {
        let _ = write(file, &applied.original);
    }
}

fn apply_setting(
    applied_settings: &mut BTreeMap<PathBuf, AppliedSetting>,
    device: &str,
    setting: &AffinitySetting,
) -> Option<SettingOutcome> {
    let outcome = |original, why: Option<SettingRefusal>| SettingOutcome {
        setting: setting.clone(),
        original,
        applied: why.is_none(),
        why,
    };
    let before = applied_settings.get(&setting.file);
    if let Some(other) = before.filter(|applied| applied.device != device) {
        let why = SettingRefusal::OwnedByDevice(other.device.clone());
        return Some(outcome(Some(other.original.clone()), Some(why)));
    }
    let now = match read_text(&setting.file) {
        Ok(now) => now,
        Err(error) => {
            return Some(outcome(
                None,
                Some(SettingRefusal::of(&error, setting.kind)),
            ));
        }
    };
    let original = before.map_or_else(|| now.clone(), |applied| applied.original.clone());
    if !setting.applies_to(&original) {
        return None;
    }
    if !setting.matches(&now)
        && let Err(error) = write(&setting.file, &setting.value)
    {
        let why = SettingRefusal::of(&error, setting.kind);
        return Some(outcome(Some(original), Some(why)));
    }
    let entry = AppliedSetting {
        device: device.to_owned(),
        setting: setting.clone(),
        read_back: read_text(&setting.file).unwrap_or_else(|_| setting.value.clone()),
        original: original.clone(),
    };
    applied_settings.insert(setting.file.clone(), entry);
    Some(outcome(Some(original), None))
}

/// Writes `text` to `file`, by this process's helper if it has one.
fn write(file: &Path, text: &str) -> io::Result<()> {
    with_help(
        || write_own(file, text),
        |helper| helper.write_affinity(file, text),
    )
}

/// Writes `text` to a file of a CPU mask, with the rights of this thread. It is one write, because
/// the kernel parses each write on its own.
///
/// # Errors
/// The kernel's.
// syscalls: openat write
pub fn write_own(file: &Path, text: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(file)
        .and_then(|mut file| io::Write::write_all(&mut file, format!("{text}\n").as_bytes()))
}

#[cfg(test)]
mod tests;
