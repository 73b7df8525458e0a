//! Keeps the host's interrupts and steering masks of one device on the CPUs of its workers.
//!
//! The data path does not depend on this module. From time to time the module compares the CPUs of
//! the workers and the queues that the kernel has attached with their last state, and writes only
//! what changed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_base::ReportOnce;
use virtionet_control::v1 as report;
use virtionet_placement::CpuSet;
use virtionet_placement::interrupts::{
    DesiredSettings, IrqAffinity, IrqAffinityManager, KernelPaths, SettingKind, SettingOutcome,
    SettingRefusal, TapWorkers, desired_settings, irqbalance_hint,
};
use virtionet_virtio_net::uplink::HostInterface;

/// The time after which the bridge's interfaces are read again, because a NIC may join the bridge
/// at any time.
const RESCAN_INTERVAL: Duration = Duration::from_secs(5);

/// The host's interrupts and steering masks that belong to one device.
#[derive(Debug)]
pub struct Interrupts {
    device: String,
    mode: IrqAffinity,
    roots: KernelPaths,
    irq_manager: Arc<IrqAffinityManager>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    input: Option<AffinityInput>,
    scanned_at: Option<Instant>,
    desired_settings: DesiredSettings,
    outcomes: Vec<SettingOutcome>,
    notes: Vec<String>,
    reports: ReportOnce<String, LogLine>,
    /// Whether a line changed too soon after the last one and must still be logged.
    is_report_pending: bool,
}

/// A line for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LogLine {
    text: String,
    /// Whether the line is a warning.
    is_warning: bool,
}

/// The values from which the settings are derived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AffinityInput {
    /// The uplink's interface and its queues.
    pub interface: HostInterface,
    /// By queue pair: the CPUs of its worker; empty while it has none.
    pub workers: Vec<CpuSet>,
}

impl Interrupts {
    /// The settings of `device`. All devices of the process share `irq_manager`.
    #[must_use]
    pub fn new(device: &str, mode: IrqAffinity, irq_manager: Arc<IrqAffinityManager>) -> Self {
        Self::with_roots(device, mode, irq_manager, KernelPaths::default())
    }

    /// The settings of a device that changes none.
    #[must_use]
    pub fn off(device: &str) -> Self {
        Self::new(device, IrqAffinity::Off, Arc::default())
    }

    fn with_roots(
        device: &str,
        mode: IrqAffinity,
        irq_manager: Arc<IrqAffinityManager>,
        roots: KernelPaths,
    ) -> Self {
        Self {
            device: device.to_owned(),
            mode,
            roots,
            irq_manager,
            state: Mutex::default(),
        }
    }

    /// Warns that the device's queues are not queues of an interface of the host.
    pub fn warn_if_unsupported(&self, uplink: &str) {
        if self.mode != IrqAffinity::Off {
            tracing::warn!(
                "{}: --irq-affinity {} does nothing with uplink {uplink}, whose queues the host does not know; give the device a TAP of its own, or leave the flag out",
                self.device,
                self.mode
            );
        }
    }

    /// Reconciles the settings with what `observe` returns, which is `None` if no front-end uses
    /// the device or its uplink is not an interface of the host.
    pub fn reconcile(&self, observe: impl FnOnce() -> Option<AffinityInput>) {
        if self.mode == IrqAffinity::Off {
            return;
        }
        // `observe` is called under the lock, so that the thread that observed first also writes
        // first.
        let mut state = self.state.lock();
        let input = observe();
        let fresh = state
            .scanned_at
            .is_some_and(|at| at.elapsed() < RESCAN_INTERVAL);
        if state.input == input && (fresh || input.is_none()) {
            if state.is_report_pending {
                self.log_new_lines(&mut state);
            }
            return;
        }
        // A file that another device had set may be free now.
        let held = |outcome: &SettingOutcome| {
            matches!(outcome.why, Some(SettingRefusal::OwnedByDevice(_)))
        };
        let changed = state.input != input || state.outcomes.iter().any(held);
        let desired_settings = input
            .as_ref()
            .map(|input| desired_settings(&self.roots, &tap_workers(input)));
        let desired_settings = desired_settings.unwrap_or_default();
        state.scanned_at = Some(Instant::now());
        state.input = input;
        if changed || desired_settings != state.desired_settings {
            state.outcomes = match self.mode {
                IrqAffinity::Apply => self
                    .irq_manager
                    .reconcile(&self.device, &desired_settings.settings),
                _ => IrqAffinityManager::preview(&desired_settings.settings),
            };
            state.notes = self.notes(&desired_settings, &state.outcomes);
            state.desired_settings = desired_settings;
            self.log_new_lines(&mut state);
        }
    }

    /// Restores all files that the device set.
    pub fn release(&self) {
        self.reconcile(|| None);
    }

    /// The settings that were made, or that mode `print` would make.
    #[must_use]
    pub fn report(&self) -> report::InterruptReport {
        let state = self.state.lock();
        let setting = |outcome: &SettingOutcome| report::SettingReport {
            file: outcome.setting.file.display().to_string(),
            value: outcome.setting.value.clone(),
            original: outcome.original.clone(),
            applied: outcome.applied,
            command: outcome.setting.command(),
            refused: outcome.why.as_ref().map(ToString::to_string),
        };
        report::InterruptReport {
            mode: self.mode.to_string(),
            settings: state.outcomes.iter().map(setting).collect(),
            notes: state.notes.clone(),
        }
    }

    /// Notes on what an administrator should know or do.
    fn notes(
        &self,
        desired_settings: &DesiredSettings,
        outcomes: &[SettingOutcome],
    ) -> Vec<String> {
        let mut notes = desired_settings.notes.clone();
        let denied =
            |outcome: &&SettingOutcome| matches!(outcome.why, Some(SettingRefusal::Denied(_)));
        if let Some(first) = outcomes.iter().find(denied) {
            // Without numbers, which change while queue pairs start: it is logged when it changes.
            notes.push(format!(
                "interrupt and steering masks cannot be set, such as {} ({}); run virtionetd as root with /sys and /proc/irq writable, or use --irq-affinity=print and run its commands as root",
                first.setting.file.display(),
                first.why.as_ref().map(ToString::to_string).unwrap_or_default(),
            ));
        }
        let irqs = |which: fn(&SettingOutcome) -> bool| -> Vec<u32> {
            outcomes
                .iter()
                .filter(|outcome| which(outcome))
                .filter_map(|outcome| match outcome.setting.kind {
                    SettingKind::Irq(irq) => Some(irq),
                    _ => None,
                })
                .collect()
        };
        let managed = irqs(|outcome| outcome.why == Some(SettingRefusal::Managed));
        if !managed.is_empty() {
            notes.push(format!(
                "the NIC's driver manages the affinity of interrupts {managed:?}, so it cannot be changed; pin vCPUs to the CPUs of these interrupts instead"
            ));
        }
        let set = irqs(|outcome| outcome.why.is_none());
        if !(self.mode == IrqAffinity::Apply && self.irq_manager.is_ignored_by_irqbalance()) {
            notes.extend(irqbalance_hint(&self.roots.proc, &set));
        }
        notes
    }

    /// Logs the settings and notes that are new.
    fn log_new_lines(&self, state: &mut State) {
        // Without a front-end nothing is set. For the next one, only lines that differ are logged.
        state.is_report_pending = false;
        if state.input.is_none() {
            return;
        }
        let print = self.mode == IrqAffinity::Print;
        let reported = state.outcomes.iter().filter(|o| print || o.applied);
        let mut lines: Vec<String> = reported.map(|o| o.setting.command()).collect();
        if !print && !lines.is_empty() {
            lines = vec![format!(
                "{} interrupt and steering masks are on the workers' CPUs: {}",
                lines.len(),
                lines.join("; ")
            )];
        }
        let line = |is_warning| move |text| LogLine { text, is_warning };
        let mut lines: Vec<LogLine> = lines.into_iter().map(line(false)).collect();
        lines.extend(state.notes.iter().cloned().map(line(true)));
        let kind = |line: &LogLine| line.text.clone();
        let (due, is_pending) = state.reports.update(&lines, kind, Instant::now());
        state.is_report_pending = is_pending;
        for LogLine { text, is_warning } in due {
            match is_warning {
                true => tracing::warn!("{}: {text}", self.device),
                false => tracing::info!("{}: {text}", self.device),
            }
        }
    }
}

fn tap_workers(input: &AffinityInput) -> TapWorkers {
    let of = |pair: &u16| input.workers.get(usize::from(*pair)).cloned();
    TapWorkers {
        name: input.interface.name.clone(),
        index: input.interface.index,
        queues: input
            .interface
            .queues
            .iter()
            .map(|pair| of(pair).unwrap_or_default())
            .collect(),
        workers: input.workers.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    /// A TAP of two queues and online CPUs 0-3, in a folder that is removed when the value is
    /// dropped.
    struct FakeHost(PathBuf);

    impl FakeHost {
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("irq-{}-{name}", std::process::id()));
            let host = Self(root);
            host.put("sys/devices/system/cpu/online", "0-3");
            host.put("sys/class/net/tap0/ifindex", "5");
            host.put("sys/class/net/tap0/tun_flags", "0x5102");
            for queue in 0..2 {
                host.put(&xps(queue), "0");
                host.put(&rps(queue), "f");
            }
            host
        }

        fn put(&self, file: &str, text: &str) {
            let file = self.0.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }

        fn get(&self, file: &str) -> String {
            let text = fs::read_to_string(self.0.join(file)).unwrap();
            text.trim_end().to_owned()
        }

        fn interrupts(&self, mode: IrqAffinity) -> Interrupts {
            self.with_manager("vnet", mode, Arc::default())
        }

        fn with_manager(
            &self,
            device: &str,
            mode: IrqAffinity,
            irq_manager: Arc<IrqAffinityManager>,
        ) -> Interrupts {
            let roots = KernelPaths {
                sys: self.0.join("sys"),
                proc: self.0.join("proc"),
            };
            Interrupts::with_roots(device, mode, irq_manager, roots)
        }
    }

    impl Drop for FakeHost {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(Path::new(&self.0));
        }
    }

    fn xps(queue: u32) -> String {
        format!("sys/class/net/tap0/queues/tx-{queue}/xps_cpus")
    }

    fn rps(queue: u32) -> String {
        format!("sys/class/net/tap0/queues/rx-{queue}/rps_cpus")
    }

    fn input(queues: &[u16], workers: &[&str]) -> Option<AffinityInput> {
        Some(AffinityInput {
            interface: HostInterface {
                name: "tap0".into(),
                index: 5,
                changes: 0,
                queues: queues.to_vec(),
            },
            workers: workers.iter().map(|list| list.parse().unwrap()).collect(),
        })
    }

    #[test]
    fn masks_match_workers_and_queues_and_are_restored() {
        let host = FakeHost::new("apply");
        let it = host.interrupts(IrqAffinity::Apply);
        let files = [xps(0), rps(0), xps(1), rps(1)];
        let now = || files.each_ref().map(|file| host.get(file));
        for (queues, workers, expected) in [
            (&[0, 1][..], ["1", "2"], ["2", "2", "4", "4"]),
            (&[1, 0], ["1", "2"], ["4", "4", "2", "2"]),
            (&[1, 0], ["1", "3"], ["8", "8", "2", "2"]),
            (&[1], ["1", "3"], ["8", "8", "0", "f"]),
            (&[1, 0], ["", "0-3"], ["0", "f", "0", "f"]),
            (&[0, 1], ["0", "1"], ["1", "1", "2", "2"]),
        ] {
            it.reconcile(|| input(queues, &workers));
            assert_eq!(now(), expected, "{queues:?} {workers:?}");
        }
        let report = it.report();
        assert_eq!((report.mode.as_str(), report.settings.len()), ("apply", 4));
        assert!(report.settings.iter().all(|setting| setting.applied));
        assert_eq!(report.settings[1].original.as_deref(), Some("f"));
        it.release();
        assert_eq!(now(), ["0", "f", "0", "f"]);
        assert_eq!(it.report().settings, []);
    }

    #[test]
    fn nothing_is_written_while_nothing_changes() {
        let host = FakeHost::new("still");
        let it = host.interrupts(IrqAffinity::Apply);
        it.reconcile(|| input(&[0], &["1"]));
        host.put(&xps(0), "f");
        it.reconcile(|| input(&[0], &["1"]));
        assert_eq!(host.get(&xps(0)), "f");
        it.reconcile(|| input(&[0], &["2"]));
        assert_eq!(host.get(&xps(0)), "4");
    }

    #[test]
    fn setting_of_another_device_is_made_once_it_is_free() {
        let host = FakeHost::new("held");
        let irq_manager = Arc::new(IrqAffinityManager::default());
        let two = ["a", "b"];
        let two = two.map(|it| host.with_manager(it, IrqAffinity::Apply, Arc::clone(&irq_manager)));
        let [first, second] = two;
        first.reconcile(|| input(&[0], &["1"]));
        second.reconcile(|| input(&[0], &["2"]));
        assert_eq!(host.get(&xps(0)), "2");
        assert!(second.report().settings[0].refused.is_some());
        first.release();
        assert_eq!(host.get(&xps(0)), "0");
        second.state.lock().scanned_at = Instant::now().checked_sub(RESCAN_INTERVAL);
        second.reconcile(|| input(&[0], &["2"]));
        assert_eq!(host.get(&xps(0)), "4");
        assert!(second.report().settings[0].applied);
    }

    #[test]
    fn modes_print_and_off_change_nothing() {
        let host = FakeHost::new("print");
        for (mode, settings) in [(IrqAffinity::Print, 4), (IrqAffinity::Off, 0)] {
            let it = host.interrupts(mode);
            it.reconcile(|| input(&[0, 1], &["1", "2"]));
            assert_eq!(
                (host.get(&xps(0)), host.get(&rps(1))),
                ("0".into(), "f".into())
            );
            let report = it.report();
            assert_eq!(report.settings.len(), settings);
            assert!(report.settings.iter().all(|setting| !setting.applied));
            if let Some(first) = report.settings.first() {
                let file = host.0.join(xps(0));
                assert_eq!(first.command, format!("echo 2 > {}", file.display()));
            }
        }
    }

    #[test]
    fn setting_that_cannot_be_made_is_noted_with_a_remedy() {
        let host = FakeHost::new("denied");
        let dir = host.0.join(xps(0));
        fs::remove_file(&dir).unwrap();
        // A folder in place of the file cannot be written, even by root.
        fs::create_dir(&dir).unwrap();
        let it = host.interrupts(IrqAffinity::Apply);
        it.reconcile(|| input(&[0, 1], &["1", "2"]));
        let report = it.report();
        assert_eq!(report.notes.len(), 1);
        assert!(
            report.notes[0].starts_with("interrupt and steering masks cannot be set")
                && report.notes[0].contains("--irq-affinity=print"),
            "{:?}",
            report.notes
        );
        assert!(report.settings[0].refused.is_some() && !report.settings[0].applied);
        assert_eq!(host.get(&xps(1)), "4");
    }
}
