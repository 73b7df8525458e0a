//! Advice about a better use of the guest's queue pairs, with the command that applies it.
//!
//! A driver starts with few queue pairs, and scripts raise their number later. Advice is therefore
//! given only once, and only about a state that has not changed for a while. A back-end does not
//! learn the number of interrupt vectors. If QEMU has a monitor for this daemon, a separate thread
//! asks QEMU for that number, once for each connection.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtionet_base::ReportOnce;
use virtionet_placement::{QemuNetDevice, query_net_device};
use virtionet_sandbox::ThreadKind;

use virtionet_process::sandbox;

/// The time for which the guest's choice must have stayed the same.
const MIN_STABLE: Duration = Duration::from_secs(8);

/// How long QEMU may take to answer, and how often it is asked.
const QMP_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_QMP_ATTEMPTS: u32 = 3;

/// How the guest uses its queue pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueUsage {
    /// The number of queue pairs that the front-end has.
    pub offered: u16,
    /// The number of queue pairs that the driver enabled.
    pub enabled: u16,
    /// Whether the driver accepted VIRTIO_NET_F_MQ.
    pub multiqueue: bool,
    /// The guest's vCPUs, if they are known.
    pub vcpus: Option<u16>,
}

/// The advice for the guest of one device.
#[derive(Debug)]
pub struct Adviser {
    device: String,
    /// QEMU's monitor and the vhost-user socket, which identifies the network device.
    monitor: Option<(PathBuf, PathBuf)>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    usage: Option<(QueueUsage, Instant)>,
    qmp_attempts: u32,
    /// What QEMU answered about its network device.
    net_device: Option<QemuNetDevice>,
    /// Whether a thread is asking QEMU's monitor.
    is_querying: bool,
    current: Vec<String>,
    reports: ReportOnce<String, String>,
}

impl Adviser {
    /// Creates the adviser for `device`. `monitor` is its front-end's monitor and `socket` is the
    /// vhost-user socket, if they are known.
    #[must_use]
    pub fn new(device: &str, monitor: Option<PathBuf>, socket: Option<PathBuf>) -> Self {
        Self {
            device: device.to_owned(),
            monitor: monitor.map(|monitor| (monitor, socket.unwrap_or_default())),
            state: Arc::default(),
        }
    }

    /// The current advice.
    #[must_use]
    pub fn current(&self) -> Vec<String> {
        self.state.lock().current.clone()
    }

    /// Updates the advice. `observe` returns how the guest uses its queue pairs now, or `None`
    /// while it uses none.
    pub fn update(&self, observe: impl FnOnce() -> Option<QueueUsage>, now: Instant) {
        // `observe` is called under the lock, so that the reset for a front-end that disconnects
        // meanwhile comes after it.
        let mut state = self.state.lock();
        let Some(usage) = observe() else {
            // The guest may be rebooting. Advice that stays the same is not logged again.
            let reports = std::mem::take(&mut state.reports);
            let is_querying = state.is_querying;
            *state = State {
                reports,
                is_querying,
                ..State::default()
            };
            return;
        };
        let since = match state.usage {
            Some((before, since)) if before == usage => since,
            _ => now,
        };
        state.usage = Some((usage, since));
        if now.saturating_duration_since(since) < MIN_STABLE {
            return;
        }
        self.query_vectors(&mut state);
        let mut advice: Vec<String> = idle_pairs_advice(usage).into_iter().collect();
        advice.extend(
            state
                .net_device
                .as_ref()
                .and_then(|net_device| vectors_advice(usage, net_device)),
        );
        let (due, _) = state.reports.update(&advice, String::clone, now);
        for line in due {
            tracing::warn!("{}: {line}", self.device);
        }
        state.current = advice;
    }

    /// Forgets the front-end that has disconnected, so that the next one gets all advice again.
    pub fn reset(&self) {
        self.update(|| None, Instant::now());
        self.state.lock().reports = ReportOnce::default();
    }

    /// Asks QEMU about its network device until it has answered.
    fn query_vectors(&self, state: &mut State) {
        let Some((monitor, socket)) = self.monitor.clone() else {
            return;
        };
        if state.net_device.is_some() || state.is_querying || state.qmp_attempts >= MAX_QMP_ATTEMPTS
        {
            return;
        }
        state.is_querying = true;
        state.qmp_attempts += 1;
        let (shared, device) = (Arc::clone(&self.state), self.device.clone());
        let spawned = std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || {
                sandbox::confine_thread(ThreadKind::Qmp);
                let answer = query_net_device(&monitor, &socket, QMP_TIMEOUT);
                let mut state = shared.lock();
                state.is_querying = false;
                match answer {
                    Ok(Some(net_device)) if state.usage.is_some() => {
                        state.net_device = Some(net_device)
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::debug!("{device}: QEMU's network device is not known: {error}")
                    }
                }
            });
        if spawned.is_err() {
            state.is_querying = false;
        }
    }
}

/// The advice about idle queue pairs.
fn idle_pairs_advice(usage: QueueUsage) -> Option<String> {
    let QueueUsage {
        offered, enabled, ..
    } = usage;
    if enabled == 0 || enabled >= offered {
        return None;
    }
    let head = format!("the guest uses {enabled} of its {offered} queue pairs");
    Some(match usage.vcpus {
        _ if !usage.multiqueue => format!(
            "{head}, because its driver was not offered several or does not support them: add mq=on to QEMU's -device virtio-net-pci"
        ),
        Some(vcpus) if enabled >= vcpus => format!(
            "{head}, one for each of its {vcpus} vCPUs: queues={vcpus} at QEMU's -netdev would do; to use all, run `ethtool -L IFACE combined {offered}` in the guest"
        ),
        Some(vcpus) => format!(
            "{head} though it has {vcpus} vCPUs: run `ethtool -L IFACE combined {}` in the guest",
            offered.min(vcpus)
        ),
        None => format!("{head}: run `ethtool -L IFACE combined {offered}` in the guest"),
    })
}

/// The advice where there are too few vectors for each virtqueue to have one of its own. Linux's
/// driver needs none for the control queue, so one less than usual is enough.
fn vectors_advice(usage: QueueUsage, net_device: &QemuNetDevice) -> Option<String> {
    let pairs = u32::from(usage.offered);
    let recommended = 2 * pairs + 2;
    (net_device.vectors.saturating_add(1) < recommended).then(|| {
        format!(
            "the guest's network device (netdev {}) has {} interrupt vectors for {pairs} queue pairs, so queues share one and their interrupts cannot be spread over vCPUs: use vectors={recommended} at QEMU's -device virtio-net-pci",
            net_device.netdev, net_device.vectors
        )
    })
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::atomic::{AtomicU32, Ordering};

    use virtionet_guest::log_lines::with_log;

    use super::*;
    use crate::testing::wait_until;

    /// A QEMU monitor on a socket, which is removed when the value is dropped.
    struct Monitor {
        path: PathBuf,
        listener: UnixListener,
    }

    impl Monitor {
        fn new() -> Self {
            static NUMBER: AtomicU32 = AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("virtionetd-{}-{number}.qmp", std::process::id());
            let path = std::env::temp_dir().join(name);
            let listener = UnixListener::bind(&path).unwrap();
            Self { path, listener }
        }

        /// The advice for a guest whose QEMU has this monitor.
        fn adviser(&self) -> Adviser {
            let socket = Some("/run/vnet.sock".into());
            Adviser::new("vnet", Some(self.path.clone()), socket)
        }

        fn accept(&self) -> UnixStream {
            self.listener.accept().unwrap().0
        }
    }

    impl Drop for Monitor {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Answers on `stream` as QEMU does that has one network device, with this many vectors.
    fn answer(mut stream: &UnixStream, vectors: u32) {
        let devices = r#"[{"name": "nic", "type": "child<virtio-net-pci>"}]"#;
        let vectors = vectors.to_string();
        stream.write_all(b"{\"QMP\": {}}\r\n").unwrap();
        for request in BufReader::new(stream).lines().map_while(Result::ok) {
            let answers = [
                (r#""qmp_capabilities""#, "qmp_capabilities", "{}"),
                (r#""/machine/peripheral""#, "qom-list", devices),
                (r#""/machine/peripheral-anon""#, "qom-list", "[]"),
                (r#""netdev""#, "qom-get", r#""net0""#),
                (r#""vectors""#, "qom-get", &vectors),
                (r#""mq""#, "qom-get", "true"),
            ];
            let matching = answers.iter().find(|(part, ..)| request.contains(part));
            let (_, id, value) = matching.unwrap();
            let line = format!("{{\"return\": {value}, \"id\": \"{id}\"}}\r\n");
            stream.write_all(line.as_bytes()).unwrap();
        }
    }

    fn wait_for_answer(adviser: &Adviser) {
        wait_until("the query has ended", || !adviser.state.lock().is_querying);
    }

    #[test]
    fn vectors_that_qemu_names_lead_to_advice_and_qemu_is_asked_only_once() {
        let monitor = Monitor::new();
        let adviser = monitor.adviser();
        let (start, all) = (Instant::now(), Some(usage(4, 4, Some(4))));
        adviser.update(|| all, start);
        adviser.update(|| all, start + MIN_STABLE);
        answer(&monitor.accept(), 3);
        wait_for_answer(&adviser);
        assert_eq!(adviser.current(), [""; 0], "it comes with the next update");
        let ((), log) = with_log(|| adviser.update(|| all, start + 2 * MIN_STABLE));
        let text =
            "the guest's network device (netdev net0) has 3 interrupt vectors for 4 queue pairs";
        let advice = adviser.current();
        assert!(
            advice.len() == 1 && advice[0].starts_with(text),
            "{advice:?}"
        );
        assert!(
            log.contains(&format!("WARN virtionet_net_device::advice: vnet: {text}")),
            "{log}"
        );
        adviser.update(|| all, start + 3 * MIN_STABLE);
        assert!(!adviser.state.lock().is_querying);
        assert_eq!(adviser.current(), advice);
        // The next front-end may be another QEMU.
        adviser.reset();
        assert_eq!(adviser.current(), [""; 0]);
        adviser.update(|| all, start + 4 * MIN_STABLE);
        adviser.update(|| all, start + 5 * MIN_STABLE);
        answer(&monitor.accept(), 10);
        wait_for_answer(&adviser);
        adviser.update(|| all, start + 6 * MIN_STABLE);
        assert_eq!(adviser.current(), [""; 0], "it has enough vectors");
    }

    #[test]
    fn monitor_that_does_not_answer_is_asked_three_times() {
        let monitor = Monitor::new();
        let adviser = monitor.adviser();
        let (start, few) = (Instant::now(), Some(usage(1, 4, None)));
        adviser.update(|| few, start);
        for turn in 1..=MAX_QMP_ATTEMPTS {
            adviser.update(|| few, start + turn * MIN_STABLE);
            drop(monitor.accept());
            wait_for_answer(&adviser);
        }
        adviser.update(|| few, start + 4 * MIN_STABLE);
        assert!(!adviser.state.lock().is_querying);
        monitor.listener.set_nonblocking(true).unwrap();
        assert!(monitor.listener.accept().is_err());
        // The other advice does not need a monitor.
        assert_eq!(adviser.current().len(), 1);
    }

    #[test]
    fn answer_that_comes_after_the_front_end_has_gone_is_not_used() {
        let monitor = Monitor::new();
        let adviser = monitor.adviser();
        let (start, all) = (Instant::now(), Some(usage(4, 4, Some(4))));
        adviser.update(|| all, start);
        adviser.update(|| all, start + MIN_STABLE);
        let query = monitor.accept();
        // QEMU is not asked again while it is being asked.
        adviser.update(|| all, start + 2 * MIN_STABLE);
        adviser.reset();
        answer(&query, 3);
        wait_for_answer(&adviser);
        adviser.update(|| all, start + 3 * MIN_STABLE);
        adviser.update(|| all, start + 4 * MIN_STABLE);
        assert_eq!(adviser.current(), [""; 0]);
        answer(&monitor.accept(), 10);
        wait_for_answer(&adviser);
        adviser.update(|| all, start + 5 * MIN_STABLE);
        assert_eq!(adviser.current(), [""; 0]);
    }

    fn usage(enabled: u16, offered: u16, vcpus: Option<u16>) -> QueueUsage {
        QueueUsage {
            offered,
            enabled,
            multiqueue: true,
            vcpus,
        }
    }

    #[test]
    fn idle_pairs_lead_to_advice_with_the_command() {
        for (usage, words) in [
            (usage(4, 4, Some(4)), None),
            (usage(0, 4, Some(4)), None),
            (usage(1, 1, None), None),
            (
                usage(1, 4, Some(4)),
                Some(
                    "1 of its 4 queue pairs though it has 4 vCPUs: run `ethtool -L IFACE combined 4`",
                ),
            ),
            (
                usage(2, 8, Some(4)),
                Some("run `ethtool -L IFACE combined 4`"),
            ),
            (
                usage(2, 4, Some(2)),
                Some("one for each of its 2 vCPUs: queues=2 at QEMU's -netdev would do"),
            ),
            (usage(1, 4, None), Some("run `ethtool -L IFACE combined 4`")),
            (
                QueueUsage {
                    multiqueue: false,
                    ..usage(1, 4, Some(4))
                },
                Some("add mq=on"),
            ),
        ] {
            let advice = idle_pairs_advice(usage);
            assert_eq!(advice.is_some(), words.is_some(), "{usage:?}: {advice:?}");
            if let (Some(advice), Some(words)) = (advice, words) {
                assert!(advice.contains(words), "{usage:?}: {advice}");
            }
        }
    }

    #[test]
    fn too_few_vectors_lead_to_advice_with_the_right_number() {
        for (pairs, have, enough) in [
            (1, 4, true),
            (1, 3, true),
            (1, 2, false),
            (4, 10, true),
            (4, 9, true),
            (4, 8, false),
            (4, 3, false),
            (4, 0, false),
            (4, u32::MAX, true),
        ] {
            let net_device = QemuNetDevice {
                netdev: "net0".into(),
                vectors: have,
                mq: true,
            };
            let advice = vectors_advice(usage(pairs, pairs, None), &net_device);
            assert_eq!(advice.is_none(), enough, "{pairs} {have}: {advice:?}");
            if let Some(advice) = advice {
                assert!(
                    advice.contains(&format!("vectors={}", 2 * pairs + 2)),
                    "{advice}"
                );
            }
        }
    }

    #[test]
    fn advice_comes_after_a_while_without_change_and_ends_with_its_cause() {
        let adviser = Adviser::new("vnet", None, None);
        let start = Instant::now();
        let few = Some(usage(1, 4, Some(4)));
        adviser.update(|| few, start);
        adviser.update(|| few, start + MIN_STABLE / 2);
        assert_eq!(adviser.current(), [""; 0]);
        // A different choice restarts the time.
        adviser.update(|| Some(usage(2, 4, Some(4))), start + MIN_STABLE / 2);
        adviser.update(|| Some(usage(2, 4, Some(4))), start + MIN_STABLE);
        assert_eq!(adviser.current(), [""; 0]);
        adviser.update(|| Some(usage(2, 4, Some(4))), start + 2 * MIN_STABLE);
        assert_eq!(adviser.current().len(), 1);
        adviser.update(|| Some(usage(4, 4, Some(4))), start + 3 * MIN_STABLE);
        adviser.update(|| Some(usage(4, 4, Some(4))), start + 4 * MIN_STABLE);
        assert_eq!(adviser.current(), [""; 0]);
        adviser.update(|| few, start + 5 * MIN_STABLE);
        adviser.update(|| few, start + 6 * MIN_STABLE);
        assert_eq!(adviser.current().len(), 1);
        adviser.update(|| None, start + 7 * MIN_STABLE);
        assert_eq!(adviser.current(), [""; 0]);
    }
}
