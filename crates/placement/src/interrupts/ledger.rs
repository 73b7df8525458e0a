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

use super::irqbalance::{self, Bans};
use super::{Kind, Setting, read};

/// What this process has set, for all its devices. Puts everything back when dropped.
#[derive(Debug, Default)]
pub struct Ledger {
    held: Mutex<BTreeMap<PathBuf, Held>>,
    /// irqbalance's ban list; none where that is nobody's business.
    bans: Option<Mutex<Bans>>,
    /// Whether irqbalance was told of all interrupts that are set.
    banned: AtomicBool,
}

#[derive(Debug)]
struct Held {
    device: String,
    setting: Setting,
    /// What the kernel made of its value: of RPS's it keeps no CPU of isolcpus.
    made: String,
    original: String,
}

/// What became of a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The setting.
    pub setting: Setting,
    /// What the file held before; `None` where it cannot be read.
    pub original: Option<String>,
    /// Whether the file holds it now because of us.
    pub applied: bool,
    /// Why not, where that is not by intent.
    pub why: Option<Refusal>,
}

/// Why a file is not set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another device has set it.
    #[error("device {0} has set it")]
    Held(String),
    /// The interrupt's driver keeps its affinity to itself.
    #[error("the NIC's driver manages this interrupt and lets nobody move it")]
    Managed,
    /// The kernel takes no such value.
    #[error(
        "the kernel does not take these CPUs there: they are offline, or isolated, which RPS does not take"
    )]
    Unsuited,
    /// This process may not write there.
    #[error("it cannot be written ({0})")]
    Denied(String),
    /// Nothing is there, as when the queue went away meanwhile.
    #[error("it is gone")]
    Gone,
}

impl Ledger {
    /// One that also has the host's irqbalance, if it runs, leave alone what is set.
    #[must_use]
    pub fn with_irqbalance() -> Self {
        let mut ledger = Self::default();
        ledger.bans = Some(Mutex::new(Bans::new(Path::new(irqbalance::FOLDER))));
        ledger
    }

    /// Whether an irqbalance runs that leaves alone all interrupts that are set.
    #[must_use]
    pub fn is_left_alone(&self) -> bool {
        self.banned.load(Ordering::Relaxed)
    }

    /// Makes `settings` those of `device`, and puts back what it set before and no longer wants.
    /// Files that hold their value already are not written.
    pub fn follow(&self, device: &str, settings: &[Setting]) -> Vec<Outcome> {
        let mut held = self.held();
        put_back_but(&mut held, device, settings);
        let outcomes = settings
            .iter()
            .filter_map(|setting| follow(&mut held, device, setting))
            .collect();
        self.ban(&held);
        outcomes
    }

    /// What [`Ledger::follow`] would do, and nothing done.
    #[must_use]
    pub fn look(settings: &[Setting]) -> Vec<Outcome> {
        let look = |setting: &Setting| {
            let original = read(&setting.file).ok();
            let wanted = original.as_ref().is_none_or(|text| setting.applies(text));
            wanted.then(|| Outcome {
                setting: setting.clone(),
                original,
                applied: false,
                why: None,
            })
        };
        settings.iter().filter_map(look).collect()
    }

    /// Puts back all that `device` set.
    pub fn release(&self, device: &str) {
        self.follow(device, &[]);
    }

    /// Has irqbalance leave alone the interrupts that are held.
    fn ban(&self, held: &BTreeMap<PathBuf, Held>) {
        let irq = |held: &Held| match held.setting.kind {
            Kind::Irq(irq) => Some(irq),
            _ => None,
        };
        let irqs = held.values().filter_map(irq).collect();
        if let Some(bans) = &self.bans {
            let told = bans
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .set(&irqs);
            self.banned.store(told, Ordering::Relaxed);
        }
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        let mut all = self.held();
        all.iter().for_each(|(file, held)| put_back(file, held));
        all.clear();
        self.ban(&all);
    }
}

fn put_back_but(held: &mut BTreeMap<PathBuf, Held>, device: &str, settings: &[Setting]) {
    held.retain(|file, of| {
        let keep = of.device != device || settings.iter().any(|setting| setting.file == *file);
        if !keep {
            put_back(file, of);
        }
        keep
    });
}

/// A file that is gone needs nothing, and one that says no now said so before.
fn put_back(file: &Path, held: &Held) {
    if read(file).is_ok_and(|now| held.setting.is(&now) || held.made == now) {
        let _ = write(file, &held.original);
    }
}

fn follow(held: &mut BTreeMap<PathBuf, Held>, device: &str, setting: &Setting) -> Option<Outcome> {
    let outcome = |original, why: Option<Refusal>| Outcome {
        setting: setting.clone(),
        original,
        applied: why.is_none(),
        why,
    };
    let before = held.get(&setting.file);
    if let Some(other) = before.filter(|of| of.device != device) {
        let why = Refusal::Held(other.device.clone());
        return Some(outcome(Some(other.original.clone()), Some(why)));
    }
    let now = match read(&setting.file) {
        Ok(now) => now,
        Err(error) => return Some(outcome(None, Some(Refusal::of(&error, setting.kind)))),
    };
    let original = before.map_or_else(|| now.clone(), |of| of.original.clone());
    if !setting.applies(&original) {
        return None;
    }
    if !setting.is(&now)
        && let Err(error) = write(&setting.file, &setting.value)
    {
        let why = Refusal::of(&error, setting.kind);
        return Some(outcome(Some(original), Some(why)));
    }
    let entry = Held {
        device: device.to_owned(),
        setting: setting.clone(),
        made: read(&setting.file).unwrap_or_else(|_| setting.value.clone()),
        original: original.clone(),
    };
    held.insert(setting.file.clone(), entry);
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

impl Refusal {
    fn of(error: &io::Error, kind: Kind) -> Self {
        match (error.raw_os_error(), kind) {
            (Some(libc::EIO | libc::EPERM), Kind::Irq(_)) => Self::Managed,
            (Some(libc::ENOENT), _) => Self::Gone,
            (Some(libc::EINVAL), _) => Self::Unsuited,
            _ => Self::Denied(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Host;
    use super::*;

    const XPS: &str = "sys/class/net/tap0/queues/tx-0/xps_cpus";
    const RPS: &str = "sys/class/net/tap0/queues/rx-0/rps_cpus";
    const IRQ: &str = "proc/irq/41/smp_affinity_list";

    fn setting(host: &Host, file: &str, value: &str) -> Setting {
        Setting {
            file: host.path().join(file),
            value: value.into(),
            kind: match file {
                XPS => Kind::Xps,
                RPS => Kind::Rps,
                _ => Kind::Irq(41),
            },
        }
    }

    fn host(name: &str) -> Host {
        let host = Host::new(name, "0-7");
        for (file, text) in [(XPS, "00000000"), (RPS, "ff"), (IRQ, "0-7")] {
            host.put(file, text);
        }
        host
    }

    #[test]
    fn files_are_set_and_put_back() {
        let host = host("ledger-set");
        let ledger = Ledger::default();
        let settings = [(XPS, "2"), (RPS, "2"), (IRQ, "1")].map(|(f, v)| setting(&host, f, v));
        let outcomes = ledger.follow("a", &settings);
        let told: Vec<_> = outcomes
            .iter()
            .map(|o| (o.original.as_deref(), o.applied))
            .collect();
        assert_eq!(
            told,
            [
                (Some("00000000"), true),
                (Some("ff"), true),
                (Some("0-7"), true)
            ]
        );
        assert_eq!([XPS, RPS, IRQ].map(|f| host.get(f)), ["2", "2", "1"]);
        // A second time keeps the first originals; what is no longer wanted goes back.
        let settings = [(XPS, "4"), (IRQ, "2")].map(|(f, v)| setting(&host, f, v));
        assert!(ledger.follow("a", &settings).iter().all(|o| o.applied));
        assert_eq!([XPS, RPS, IRQ].map(|f| host.get(f)), ["4", "ff", "2"]);
        ledger.release("a");
        let end = ["00000000", "ff", "0-7"];
        assert_eq!([XPS, RPS, IRQ].map(|f| host.get(f)), end);
        ledger.follow("a", &settings);
        drop(ledger);
        assert_eq!([XPS, RPS, IRQ].map(|f| host.get(f)), end);
    }

    #[test]
    fn looking_changes_nothing() {
        let host = host("ledger-look");
        let settings = [(XPS, "2"), (IRQ, "1")].map(|(f, v)| setting(&host, f, v));
        let outcomes = Ledger::look(&settings);
        assert_eq!(outcomes.len(), 2);
        assert!(outcomes.iter().all(|o| !o.applied && o.original.is_some()));
        assert_eq!([XPS, IRQ].map(|f| host.get(f)), ["00000000", "0-7"]);
    }

    #[test]
    fn a_mask_of_rps_is_set_only_where_it_was_on() {
        let host = host("ledger-rps");
        host.put(RPS, "00000000,00000000");
        let settings = [setting(&host, RPS, "2")];
        assert_eq!(Ledger::look(&settings), []);
        assert_eq!(Ledger::default().follow("a", &settings), []);
        assert_eq!(host.get(RPS), "00000000,00000000");
    }

    #[test]
    fn a_file_belongs_to_who_set_it_first() {
        let host = host("ledger-two");
        let ledger = Ledger::default();
        ledger.follow("a", &[setting(&host, IRQ, "1")]);
        let other = ledger.follow("b", &[setting(&host, IRQ, "2")]);
        assert_eq!(other[0].why, Some(Refusal::Held("a".into())));
        assert_eq!(other[0].original.as_deref(), Some("0-7"));
        ledger.release("b");
        assert_eq!(host.get(IRQ), "1");
        ledger.release("a");
        assert!(ledger.follow("b", &[setting(&host, IRQ, "2")])[0].applied);
        assert_eq!(host.get(IRQ), "2");
    }

    #[test]
    fn what_somebody_else_set_since_stays() {
        let host = host("ledger-since");
        let ledger = Ledger::default();
        ledger.follow("a", &[setting(&host, XPS, "2"), setting(&host, IRQ, "1")]);
        host.put(IRQ, "5");
        // The kernel's own way of writing the same is no change.
        host.put(XPS, "00000000,00000002");
        ledger.release("a");
        assert_eq!([XPS, IRQ].map(|f| host.get(f)), ["00000000", "5"]);
    }

    #[test]
    fn what_the_kernel_made_of_a_value_is_put_back_as_well() {
        let host = host("ledger-made");
        let file = host.path().join(RPS);
        let mut held = BTreeMap::new();
        follow(&mut held, "a", &setting(&host, RPS, "c")).unwrap();
        // One of its CPUs is isolated: the kernel keeps the other alone.
        host.put(RPS, "8");
        put_back(&file, &held[&file]);
        assert_eq!(host.get(RPS), "8", "not ours");
        held.get_mut(&file).unwrap().made = "8".into();
        put_back(&file, &held[&file]);
        assert_eq!(host.get(RPS), "ff");
    }

    #[test]
    fn each_refusal_has_its_reason() {
        let io = io::Error::from_raw_os_error;
        for (errno, kind, refusal) in [
            (libc::EIO, Kind::Irq(1), Refusal::Managed),
            (libc::EPERM, Kind::Irq(1), Refusal::Managed),
            (libc::ENOENT, Kind::Xps, Refusal::Gone),
            (libc::EINVAL, Kind::Rps, Refusal::Unsuited),
            (
                libc::EACCES,
                Kind::Irq(1),
                Refusal::Denied(io(libc::EACCES).to_string()),
            ),
            (
                libc::EROFS,
                Kind::Rps,
                Refusal::Denied(io(libc::EROFS).to_string()),
            ),
            (
                libc::EPERM,
                Kind::Xps,
                Refusal::Denied(io(libc::EPERM).to_string()),
            ),
        ] {
            assert_eq!(Refusal::of(&io(errno), kind), refusal);
        }
        let host = host("ledger-gone");
        let outcome = Ledger::default().follow("a", &[setting(&host, "absent", "1")]);
        assert_eq!(
            (outcome[0].applied, &outcome[0].why),
            (false, &Some(Refusal::Gone))
        );
        // A folder in the file's place can be neither read nor written.
        let outcome = Ledger::default().follow("a", &[setting(&host, "sys", "1")]);
        assert!(matches!(outcome[0].why, Some(Refusal::Denied(_))));
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
        let setting = Setting {
            file: file.clone(),
            value: "0".into(),
            kind: Kind::Irq(irq),
        };
        let ledger = Ledger::default();
        let outcome = ledger.follow("a", &[setting]);
        if let Some(why) = &outcome[0].why {
            eprintln!("skipped: interrupt {irq}: {why}");
            return;
        }
        assert_eq!(read(&file).unwrap(), "0");
        drop(ledger);
        assert_eq!(read(&file).unwrap(), before);
    }
}
