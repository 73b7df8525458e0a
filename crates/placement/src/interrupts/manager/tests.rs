//! The manager on fake files, and on one real interrupt.

use super::*;
use crate::interrupts::testing::FakeHost;

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
fn files_are_set_and_restored() {
    let host = host("manager-set");
    let manager = IrqAffinityManager::default();
    let settings = [(XPS, "2"), (RPS, "2"), (IRQ, "1")].map(|(f, v)| setting(&host, f, v));
    let outcomes = manager.reconcile("a", &settings);
    let results: Vec<_> = outcomes
        .iter()
        .map(|o| (o.original.as_deref(), o.applied))
        .collect();
    assert_eq!(
        results,
        [
            (Some("00000000"), true),
            (Some("ff"), true),
            (Some("0-7"), true)
        ]
    );
    assert_eq!([XPS, RPS, IRQ].map(|f| host.get(f)), ["2", "2", "1"]);
    // A second call keeps the first originals, and restores what is no longer desired.
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
fn preview_writes_nothing() {
    let host = host("manager-preview");
    let settings = [(XPS, "2"), (IRQ, "1")].map(|(f, v)| setting(&host, f, v));
    let outcomes = IrqAffinityManager::preview(&settings);
    assert_eq!(outcomes.len(), 2);
    assert!(outcomes.iter().all(|o| !o.applied && o.original.is_some()));
    assert_eq!([XPS, IRQ].map(|f| host.get(f)), ["00000000", "0-7"]);
}

#[test]
fn rps_mask_is_set_only_where_rps_was_on() {
    let host = host("manager-rps");
    host.put(RPS, "00000000,00000000");
    let settings = [setting(&host, RPS, "2")];
    assert_eq!(IrqAffinityManager::preview(&settings), []);
    assert_eq!(IrqAffinityManager::default().reconcile("a", &settings), []);
    assert_eq!(host.get(RPS), "00000000,00000000");
}

#[test]
fn file_belongs_to_the_device_that_set_it_first() {
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
fn file_that_another_program_changed_is_not_restored() {
    let host = host("manager-since");
    let manager = IrqAffinityManager::default();
    manager.reconcile("a", &[setting(&host, XPS, "2"), setting(&host, IRQ, "1")]);
    host.put(IRQ, "5");
    // The same CPUs in the kernel's own form are no change.
    host.put(XPS, "00000000,00000002");
    manager.release("a");
    assert_eq!([XPS, IRQ].map(|f| host.get(f)), ["00000000", "5"]);
}

#[test]
fn value_that_the_kernel_changed_is_restored_too() {
    let host = host("manager-read-back");
    let file = host.path().join(RPS);
    let mut applied_settings = BTreeMap::new();
    apply_setting(&mut applied_settings, "a", &setting(&host, RPS, "c")).unwrap();
    // One of the CPUs is isolated, so the kernel keeps only the other.
    host.put(RPS, "8");
    restore(&file, &applied_settings[&file]);
    assert_eq!(
        host.get(RPS),
        "8",
        "a value that the manager did not read back was written by another program"
    );
    applied_settings.get_mut(&file).unwrap().read_back = "8".into();
    restore(&file, &applied_settings[&file]);
    assert_eq!(host.get(RPS), "ff");
}

#[test]
fn file_that_is_missing_or_a_folder_is_not_set() {
    let host = host("manager-gone");
    let outcome = IrqAffinityManager::default().reconcile("a", &[setting(&host, "absent", "1")]);
    assert_eq!(
        (outcome[0].applied, &outcome[0].why),
        (false, &Some(SettingRefusal::Gone))
    );
    // A folder in place of the file can be neither read nor written.
    let outcome = IrqAffinityManager::default().reconcile("a", &[setting(&host, "sys", "1")]);
    assert!(matches!(outcome[0].why, Some(SettingRefusal::Denied(_))));
}

/// Uses a rare interrupt of this machine: that of a virtio device's configuration changes.
#[test]
fn real_interrupt_is_set_and_restored() {
    let is_config_interrupt = |irq: &u32| {
        let handlers = fs::read_dir(format!("/proc/irq/{irq}")).ok();
        handlers
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().ends_with("-config"))
    };
    let Some(irq) = (1..1000).find(is_config_interrupt) else {
        eprintln!("skipped: this machine has no such interrupt");
        return;
    };
    let file = PathBuf::from(format!("/proc/irq/{irq}/smp_affinity_list"));
    let before = read_text(&file).unwrap();
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
    assert_eq!(read_text(&file).unwrap(), "0");
    drop(manager);
    assert_eq!(read_text(&file).unwrap(), before);
}

#[test]
fn manager_that_inherits_restores_what_was_there_before_the_first_one() {
    let host = host("manager-inherit");
    let first = IrqAffinityManager::default();
    let settings = [(XPS, "2"), (IRQ, "1")].map(|(f, v)| setting(&host, f, v));
    first.reconcile("a", &settings);
    let second = IrqAffinityManager::default();
    second.inherit(first.to_image());
    // The first one ends without any more writes.
    std::mem::forget(first);
    let settings = [(XPS, "4")].map(|(f, v)| setting(&host, f, v));
    second.reconcile("a", &settings);
    assert_eq!([XPS, IRQ].map(|f| host.get(f)), ["4", "0-7"]);
    drop(second);
    assert_eq!([XPS, IRQ].map(|f| host.get(f)), ["00000000", "0-7"]);
}
