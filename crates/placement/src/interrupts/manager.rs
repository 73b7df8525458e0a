//! Writing settings, and putting back what was there before.
//!
//! A file belongs to the device that set it first: two devices whose TAPs share a NIC do not fight
//! over its interrupts. What somebody else has changed since is left as they set it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::irqbalance::{self, BanList};
use super::{AffinitySetting, SettingKind, read};

/// What this process has set, for all its devices. Puts everything back when dropped.
#[derive(Debug, Default)]
pub struct IrqAffinityManager {
    applied_settings: Mutex<BTreeMap<PathBuf, AppliedSetting>>,
    /// irqbalance's ban list; none where that is nobody's business.
    bans: Option<Mutex<BanList>>,
    /// Whether irqbalance was told of all interrupts that are set.
    banned: AtomicBool,
}

#[derive(Debug)]
struct AppliedSetting {
    device: String,
    setting: AffinitySetting,
    /// What the kernel made of its value: of RPS's it keeps no CPU of isolcpus.
    read_back: String,
    original: String,
}

/// What became of a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingOutcome {
    /// The setting.
    pub setting: AffinitySetting,
    /// What the file held before; `None` where it cannot be read.
    pub original: Option<String>,
    /// Whether the file holds it now because of us.
    pub applied: bool,
    /// Why not, where that is not by intent.
    pub why: Option<SettingRefusal>,
}

/// Why a file is not set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingRefusal {
    /// Another device has set it.
    #[error("device {0} has set it")]
    OwnedByDevice(String),
    /// The interrupt's driver keeps its affinity to itself.
    #[error("the NIC's driver manages this interrupt and lets nobody move it")]
    Managed,
    /// The kernel takes no such value.
    #[error(
        "the kernel does not take these CPUs there: they are offline, or isolated, which RPS does not take"
    )]
    InvalidCpus,
    /// This process may not write there.
    #[error("it cannot be written ({0})")]
    Denied(String),
    /// Nothing is there, as when the queue went away meanwhile.
    #[error("it is gone")]
    Gone,
}

impl IrqAffinityManager {
    /// One that also has the host's irqbalance, if it runs, leave alone what is set.
    #[must_use]
    pub fn with_irqbalance() -> Self {
        let mut manager = Self::default();
        manager.bans = Some(Mutex::new(BanList::new(Path::new(irqbalance::RUN_DIR))));
        manager
    }

    /// Whether an irqbalance runs that leaves alone all interrupts that are set.
    #[must_use]
    pub fn is_ignored_by_irqbalance(&self) -> bool {
        self.banned.load(Ordering::Relaxed)
    }

    /// Makes `settings` those of `device`, and puts back what it set before and no longer wants.
    /// Files that hold their value already are not written.
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

    /// What [`IrqAffinityManager::reconcile`] would do, and nothing done.
    #[must_use]
    pub fn preview(settings: &[AffinitySetting]) -> Vec<SettingOutcome> {
        let preview = |setting: &AffinitySetting| {
            let original = read(&setting.file).ok();
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

    /// Puts back all that `device` set.
    pub fn release(&self, device: &str) {
        self.reconcile(device, &[]);
    }

    /// Has irqbalance leave alone the interrupts that are held.
    fn ban(&self, applied_settings: &BTreeMap<PathBuf, AppliedSetting>) {
        let irq = |applied: &AppliedSetting| match applied.setting.kind {
            SettingKind::Irq(irq) => Some(irq),
            _ => None,
        };
        let irqs = applied_settings.values().filter_map(irq).collect();
        if let Some(bans) = &self.bans {
            let is_ignored = bans
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .set(&irqs);
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
    applied_settings.retain(|file, of| {
        let keep = of.device != device || settings.iter().any(|setting| setting.file == *file);
        if !keep {
            restore(file, of);
        }
        keep
    });
}

/// A file that is gone needs nothing, and one that says no now said so before.
fn restore(file: &Path, applied: &AppliedSetting) {
    if read(file).is_ok_and(|now| applied.setting.matches(&now) || applied.read_back == now) {
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
    if let Some(other) = before.filter(|of| of.device != device) {
        let why = SettingRefusal::OwnedByDevice(other.device.clone());
        return Some(outcome(Some(other.original.clone()), Some(why)));
    }
    let now = match read(&setting.file) {
        Ok(now) => now,
        Err(error) => {
            return Some(outcome(
                None,
                Some(SettingRefusal::of(&error, setting.kind)),
            ));
        }
    };
    let original = before.map_or_else(|| now.clone(), |of| of.original.clone());
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
        read_back: read(&setting.file).unwrap_or_else(|_| setting.value.clone()),
        original: original.clone(),
    };
    applied_settings.insert(setting.file.clone(), entry);
    Some(outcome(Some(original), None))
}

/// The kernel's files take one write each.
fn write(file: &Path, text: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(file)
        .and_then(|mut file| io::Write::write_all(&mut file, format!("{text}\n").as_bytes()))
}

impl SettingRefusal {
    fn of(error: &io::Error, kind: SettingKind) -> Self {
        match (error.raw_os_error(), kind) {
            (Some(libc::EIO | libc::EPERM), SettingKind::Irq(_)) => Self::Managed,
            (Some(libc::ENOENT), _) => Self::Gone,
            (Some(libc::EINVAL), _) => Self::InvalidCpus,
            _ => Self::Denied(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::FakeHost;
    use super::*;

    const XPS: &str = "sys/class/net/tap0/queues/tx-0/xps_cpus";
    const RPS: &str = "sys/class/net/tap0/queues/rx-0/rps_cpus";
    const IRQ: &str = "proc/irq/41/smp_affinity_list";

    fn setting(host: &FakeHost, file: &str, value: &str) -> AffinitySetting {
        AffinitySetting {
            file: host.path().join(file),
            value: value.into(),
            kind: match file {
                XPS => SettingKind::Xps,
                RPS => SettingKind::Rps,
                _ => SettingKind::Irq(41),
            },
        }
    }

    fn host(name: &str) -> FakeHost {
        let host = FakeHost::new(name, "0-7");
        for (file, text) in [(XPS, "00000000"), (RPS, "ff"), (IRQ, "0-7")] {
            host.put(file, text);
        }
        host
    }

    #[test]
    fn files_are_set_and_put_back() {
        let host = host("manager-set");
        let manager = IrqAffinityManager::default();
        let settings = [(XPS, "2"), (RPS, "2"), (IRQ, "1")].map(|(f, v)| setting(&host, f, v));
        let outcomes = manager.reconcile("a", &settings);
        let is_ignored: Vec<_> = outcomes
            .iter()
            .map(|o| (o.original.as_deref(), o.applied))
            .collect();
        assert_eq!(
            is_ignored,
            [
                (Some("00000000"), true),
                (Some("ff"), true),
                (Some("0-7"), true)
            ]
        );
        assert_eq!([XPS, RPS, IRQ].map(|f| host.get(f)), ["2", "2", "1"]);
        // A second time keeps the first originals; what is no longer wanted goes back.
        let settings = [(XPS, "4"), (IRQ, "2")].map(|(f, v)| setting(&host, f, v));
        assert!(manager.reconcile("a", &settings).iter().all(|o| o.applied));
        assert_eq!([XPS, RPS, IRQ].map(|f| host.get(f)), ["4", "ff", "2"]);
        manager.release("a");
        let end = ["00000000", "ff", "0-7"];
        assert_eq!([XPS, RPS, IRQ].map(|f| host.get(f)), end);
        manager.reconcile("a", &settings);
        drop(manager);
        assert_eq!([XPS, RPS, IRQ].map(|f| host.get(f)), end);
    }

    #[test]
    fn looking_changes_nothing() {
        let host = host("manager-preview");
        let settings = [(XPS, "2"), (IRQ, "1")].map(|(f, v)| setting(&host, f, v));
        let outcomes = IrqAffinityManager::preview(&settings);
        assert_eq!(outcomes.len(), 2);
        assert!(outcomes.iter().all(|o| !o.applied && o.original.is_some()));
        assert_eq!([XPS, IRQ].map(|f| host.get(f)), ["00000000", "0-7"]);
    }

    #[test]
    fn a_mask_of_rps_is_set_only_where_it_was_on() {
        let host = host("manager-rps");
        host.put(RPS, "00000000,00000000");
        let settings = [setting(&host, RPS, "2")];
        assert_eq!(IrqAffinityManager::preview(&settings), []);
        assert_eq!(IrqAffinityManager::default().reconcile("a", &settings), []);
        assert_eq!(host.get(RPS), "00000000,00000000");
    }

    #[test]
    fn a_file_belongs_to_who_set_it_first() {
        let host = host("manager-two");
        let manager = IrqAffinityManager::default();
        manager.reconcile("a", &[setting(&host, IRQ, "1")]);
        let other = manager.reconcile("b", &[setting(&host, IRQ, "2")]);
        assert_eq!(
            other[0].why,
            Some(SettingRefusal::OwnedByDevice("a".into()))
        );
        assert_eq!(other[0].original.as_deref(), Some("0-7"));
        manager.release("b");
        assert_eq!(host.get(IRQ), "1");
        manager.release("a");
        assert!(manager.reconcile("b", &[setting(&host, IRQ, "2")])[0].applied);
        assert_eq!(host.get(IRQ), "2");
    }

    #[test]
    fn what_somebody_else_set_since_stays() {
        let host = host("manager-since");
        let manager = IrqAffinityManager::default();
        manager.reconcile("a", &[setting(&host, XPS, "2"), setting(&host, IRQ, "1")]);
        host.put(IRQ, "5");
        // The kernel's own way of writing the same is no change.
        host.put(XPS, "00000000,00000002");
        manager.release("a");
        assert_eq!([XPS, IRQ].map(|f| host.get(f)), ["00000000", "5"]);
    }

    #[test]
    fn what_the_kernel_made_of_a_value_is_put_back_as_well() {
        let host = host("manager-read_back");
        let file = host.path().join(RPS);
        let mut applied_settings = BTreeMap::new();
        apply_setting(&mut applied_settings, "a", &setting(&host, RPS, "c")).unwrap();
        // One of its CPUs is isolated: the kernel keeps the other alone.
        host.put(RPS, "8");
        restore(&file, &applied_settings[&file]);
        assert_eq!(host.get(RPS), "8", "not ours");
        applied_settings.get_mut(&file).unwrap().read_back = "8".into();
        restore(&file, &applied_settings[&file]);
        assert_eq!(host.get(RPS), "ff");
    }

    #[test]
    fn each_refusal_has_its_reason() {
        let io = io::Error::from_raw_os_error;
        for (errno, kind, refusal) in [
            (libc::EIO, SettingKind::Irq(1), SettingRefusal::Managed),
            (libc::EPERM, SettingKind::Irq(1), SettingRefusal::Managed),
            (libc::ENOENT, SettingKind::Xps, SettingRefusal::Gone),
            (libc::EINVAL, SettingKind::Rps, SettingRefusal::InvalidCpus),
            (
                libc::EACCES,
                SettingKind::Irq(1),
                SettingRefusal::Denied(io(libc::EACCES).to_string()),
            ),
            (
                libc::EROFS,
                SettingKind::Rps,
                SettingRefusal::Denied(io(libc::EROFS).to_string()),
            ),
            (
                libc::EPERM,
                SettingKind::Xps,
                SettingRefusal::Denied(io(libc::EPERM).to_string()),
            ),
        ] {
            assert_eq!(SettingRefusal::of(&io(errno), kind), refusal);
        }
        let host = host("manager-gone");
        let outcome =
            IrqAffinityManager::default().reconcile("a", &[setting(&host, "absent", "1")]);
        assert_eq!(
            (outcome[0].applied, &outcome[0].why),
            (false, &Some(SettingRefusal::Gone))
        );
        // A folder in the file's place can be neither read nor written.
        let outcome = IrqAffinityManager::default().reconcile("a", &[setting(&host, "sys", "1")]);
        assert!(matches!(outcome[0].why, Some(SettingRefusal::Denied(_))));
    }

    /// An interrupt of this machine that hardly ever comes (a virtio device's configuration changes)
    /// is moved and put back at once.
    #[test]
    fn a_real_interrupt_is_set_and_put_back() {
        let quiet = |irq: &u32| {
            let handlers = fs::read_dir(format!("/proc/irq/{irq}")).ok();
            handlers
                .into_iter()
                .flatten()
                .flatten()
                .any(|entry| entry.file_name().to_string_lossy().ends_with("-config"))
        };
        let Some(irq) = (1..1000).find(quiet) else {
            eprintln!("skipped: this machine has no such interrupt");
            return;
        };
        let file = PathBuf::from(format!("/proc/irq/{irq}/smp_affinity_list"));
        let before = read(&file).unwrap();
        let setting = AffinitySetting {
            file: file.clone(),
            value: "0".into(),
            kind: SettingKind::Irq(irq),
        };
        let manager = IrqAffinityManager::default();
        let outcome = manager.reconcile("a", &[setting]);
        if let Some(why) = &outcome[0].why {
            eprintln!("skipped: interrupt {irq}: {why}");
            return;
        }
        assert_eq!(read(&file).unwrap(), "0");
        drop(manager);
        assert_eq!(read(&file).unwrap(), before);
    }
}
