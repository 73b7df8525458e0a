//! Builds the control API's report of the running devices.

use std::env;
use std::path::Path;
use std::process;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rustix::process::geteuid;
use virtionet_config::Socket;
use virtionet_control::v1 as report;
use virtionet_net_device::net_device::ServedPair;
use virtionet_net_device::vring_slot::VringSlot;
use virtionet_process::logging;
use virtionet_process::panic_policy::contained_panics;
use virtionet_process::sandbox;
use virtionet_uplink::switch::{AddressImage, Switch};
use virtionet_vhost_user::VringState;
use virtionet_vhost_user::protocol_features::names as protocol_names;
use virtionet_virtio_net::DeviceQueue;
use virtionet_virtio_net::stats::{VringStats, WorkerStats, to_u64};
use virtionet_virtqueue::memory::IotlbCounts;

use crate::device_set::DeviceSet;
use crate::helper_process::HelperProcess;
use crate::manager::ChangeQueue;
use crate::served_device::ServedDevice;
use crate::take_over::Predecessor;
use crate::uplinks::Uplinks;

/// All devices of this process, with their configurations, and the process itself.
#[derive(Debug)]
pub struct DeviceRegistry {
    devices: Arc<DeviceSet>,
    helper: Option<Arc<HelperProcess>>,
    /// Where changes are handed in, and the uplinks.
    changes: Option<(ChangeQueue, Arc<Mutex<Uplinks>>)>,
    /// The process, without the handover by which it got its devices.
    process: report::ProcessReport,
    taken_over: OnceLock<report::TakeOverReport>,
}

impl DeviceRegistry {
    /// The registry of a process with these devices, with a helper if there is one, and with a socket
    /// at which the next daemon can take over if there is one.
    #[must_use]
    pub fn new(
        devices: Arc<DeviceSet>,
        helper: Option<Arc<HelperProcess>>,
        handover_socket: Option<&Path>,
    ) -> Self {
        Self {
            devices,
            helper,
            changes: None,
            process: own_process(handover_socket),
            taken_over: OnceLock::new(),
        }
    }

    /// The same registry of a process whose devices can be changed.
    #[must_use]
    pub fn with_changes(self, queue: ChangeQueue, uplinks: Arc<Mutex<Uplinks>>) -> Self {
        Self {
            changes: Some((queue, uplinks)),
            ..self
        }
    }

    /// Notes that this process has got its devices from another one, and serves them from now on.
    pub fn set_predecessor(&self, predecessor: &Predecessor) {
        let paused_for = predecessor.paused_for().as_micros();
        self.taken_over.get_or_init(|| report::TakeOverReport {
            version: predecessor.program().to_owned(),
            paused_us: u64::try_from(paused_for).unwrap_or(u64::MAX),
        });
    }
}

/// This process, as it was started.
// syscalls: getcwd
fn own_process(handover_socket: Option<&Path>) -> report::ProcessReport {
    let text = |path: &Path| path.to_str().map(str::to_owned);
    let arguments = env::args_os().skip(1);
    report::ProcessReport {
        pid: process::id(),
        arguments: arguments
            .map(|argument| argument.into_string().ok())
            .collect(),
        directory: env::current_dir().ok().and_then(|path| text(&path)),
        handover_socket: handover_socket.and_then(text),
        taken_over: None,
    }
}

impl report::ReportSource for DeviceRegistry {
    fn report(&self) -> report::Report {
        report::Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            log_lines_dropped: logging::dropped_lines(),
            panics: contained_panics(),
            rights: Some(rights(self.helper.as_deref())),
            process: Some(report::ProcessReport {
                taken_over: self.taken_over.get().cloned(),
                ..self.process.clone()
            }),
            devices: self
                .devices
                .all()
                .iter()
                .map(|served| device(served))
                .collect(),
        }
    }

    fn health(&self) -> report::Health {
        let mut reasons = Vec::new();
        let helper = self.helper.as_deref();
        if helper.is_some_and(|helper| helper.pid().is_none()) {
            reasons.push(problem(
                None,
                "helper-lost",
                "the helper has ended, so TAPs cannot be opened again: restart virtionetd",
            ));
        }
        for device in self.devices.all() {
            let name = Some(device.name().to_owned());
            if !device.has_thread() {
                let reason = "its front-end has gone and no other one can come: restart virtionetd";
                reasons.push(problem(name, "device-ended", reason));
            } else if !device.net_device.is_uplink_up() {
                let reason = "its uplink carries no frames: see the warnings of the device";
                reasons.push(problem(name, "uplink-down", reason));
            }
        }
        report::Health::with(reasons)
    }

    fn switches(&self) -> Vec<report::SwitchReport> {
        let Some((_, uplinks)) = &self.changes else {
            return Vec::new();
        };
        uplinks.lock().switches().map(switch).collect()
    }

    fn change(&self, request: report::ChangeRequest, reply: report::Reply) {
        if let Some((queue, _)) = &self.changes {
            queue.submit(request, reply);
        }
    }
}

fn problem(device: Option<String>, code: &str, reason: &str) -> report::ReadyProblem {
    report::ReadyProblem {
        device,
        code: code.into(),
        reason: reason.into(),
    }
}

fn switch(switch: &Switch) -> report::SwitchReport {
    let addresses = switch.to_image().addresses.into_iter();
    report::SwitchReport {
        name: switch.name().to_owned(),
        tap: switch.host_tap().map(str::to_owned),
        devices: switch.devices(),
        addresses: addresses
            .map(|AddressImage { mac, device }| report::SwitchAddress {
                mac: mac.map(|byte| format!("{byte:02x}")).join(":"),
                device,
            })
            .collect(),
    }
}

fn rights(helper: Option<&HelperProcess>) -> report::RightsReport {
    let helper_state = match helper.map(HelperProcess::pid) {
        None => report::HelperState::Off,
        Some(Some(_)) => report::HelperState::Running,
        Some(None) => report::HelperState::Lost,
    };
    report::RightsReport {
        sandbox: sandbox::mode_name().to_owned(),
        user: geteuid().as_raw(),
        capabilities: sandbox::capability_names(),
        helper: helper_state,
        helper_pid: helper.and_then(HelperProcess::pid),
    }
}

fn iotlb_report(counts: IotlbCounts) -> report::IotlbReport {
    report::IotlbReport {
        entries: to_u64(counts.entries),
        misses: counts.misses,
        updates: counts.updates,
        invalidations: counts.invalidations,
    }
}

fn device(served: &ServedDevice) -> report::DeviceReport {
    let ServedDevice {
        config, net_device, ..
    } = served;
    let frontend = net_device.frontend();
    // Read the placement before the warnings, so that the warnings apply to the placement shown or
    // to a newer one.
    let pairs = net_device.pairs().map(queue_pair).collect();
    let (socket, role) = match &config.socket {
        Socket::Listen { path, .. } => (path.display().to_string(), report::SocketRole::Server),
        Socket::Connect { path } => (path.display().to_string(), report::SocketRole::Client),
        Socket::Inherited(fd) => (format!("fd:{fd}"), report::SocketRole::Inherited),
    };
    report::DeviceReport {
        name: net_device.name().to_owned(),
        socket,
        role,
        connected: frontend.connected,
        frontend: frontend.connected.then(|| report::FrontendReport {
            pid: frontend.pid.and_then(|pid| i32::try_from(pid).ok()),
            features: names(frontend.features.names()),
            protocol_features: names(protocol_names(frontend.protocol_features)),
            iotlb: frontend
                .memory
                .iotlb()
                .map(|iotlb| iotlb_report(iotlb.counts())),
        }),
        memory: frontend
            .memory
            .regions()
            .map(|region| report::MemoryRegionReport {
                guest_addr: region.guest_addr,
                size: region.size,
                user_addr: region.user_addr,
            })
            .collect(),
        uplink: report::UplinkReport {
            kind: net_device.uplink().kind().to_owned(),
            name: net_device.uplink().name(),
            up: net_device.is_uplink_up(),
        },
        features_compat: Some(config.features_compat.name().to_owned()),
        mtu: frontend.mtu,
        warnings: net_device.warnings(),
        origin: match *served.requested.lock() {
            Some(_) => report::DeviceOrigin::Request,
            None => report::DeviceOrigin::Configuration,
        },
        link: match served.stop.is_held() {
            true => report::LinkState::Down,
            false => report::LinkState::Up,
        },
        revision: served.revision(),
        advice: net_device.advice(),
        interrupts: net_device.interrupts().report(),
        pairs,
    }
}

fn queue_pair(served: &ServedPair) -> report::QueuePairReport {
    let ServedPair { pair, worker, .. } = served;
    let stats = pair.worker_stats();
    let placement = worker.placement();
    let decision = placement.as_ref().map(|placement| &placement.decision);
    report::QueuePairReport {
        pair: pair.index(),
        vcpu: decision.and_then(|d| d.vcpus.first().copied()),
        vcpus: decision.map_or_else(Vec::new, |d| d.vcpus.clone()),
        worker: worker.name().to_owned(),
        tid: placement.as_ref().map(|placement| placement.tid),
        cpus: decision.map_or_else(Vec::new, |d| d.cpus.iter().collect()),
        placement: decision.map_or_else(String::new, |d| d.why.clone()),
        worker_node: placement.as_ref().and_then(|placement| placement.node),
        memory_node: pair.memory_node(),
        worker_counters: report::Counters::new(WorkerStats::NAMES, stats.values()),
        worker_load: report::WorkerLoad::new(
            worker.cycles(),
            stats.busy_cycles.get(),
            stats.busy_frames.get(),
        ),
        rx: vring(pair.rx()),
        tx: vring(pair.tx()),
    }
}

fn vring<Q: DeviceQueue>(slot: &VringSlot<Q>) -> report::VringReport {
    report::VringReport {
        state: match slot.state() {
            VringState::Stopped => report::VringStatus::Stopped,
            VringState::Running => report::VringStatus::Running,
            VringState::Quarantined => report::VringStatus::Quarantined,
        },
        enabled: slot.is_enabled(),
        size: slot.size(),
        counters: report::Counters::new(VringStats::NAMES, slot.stats().values()),
    }
}

fn names<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    names.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use virtionet_config::{DeviceConfig, PollMode, QueuePairCount};
    use virtionet_control::v1::ReportSource;
    use virtionet_net_device::net_device::NetDevice;
    use virtionet_uplink::null::Null;

    use super::*;
    use virtionet_net_device::testing::{net_device, send, two_pairs, with_frontend};

    fn config(socket: Socket) -> DeviceConfig {
        DeviceConfig {
            name: "vnet".into(),
            socket,
            queues: QueuePairCount::AtMost(4),
            uplink: virtionet_config::uplink::UplinkConfig::Null,
            placement: Default::default(),
            irq_affinity: Default::default(),
            qmp: None,
            poll: PollMode::Off,
            features_compat: Default::default(),
            postcopy: false,
        }
    }

    fn set_of(socket: Socket, net_device: &Arc<NetDevice>) -> Arc<DeviceSet> {
        let device = ServedDevice::new(config(socket), None, Arc::clone(net_device)).unwrap();
        let flags = crate::testing::config("--socket-path /s --uplink null");
        Arc::new(DeviceSet::new(vec![Arc::new(device)], Vec::new(), &flags))
    }

    fn path() -> PathBuf {
        "/run/vnet.sock".into()
    }

    #[test]
    fn report_of_a_connected_device_has_its_front_end_memory_and_queue_pairs() {
        let net_device = Arc::new(net_device(4, Null, PollMode::Off));
        let socket = Socket::Connect { path: path() };
        let devices = DeviceRegistry::new(set_of(socket, &net_device), None, None);
        with_frontend(&net_device, &two_pairs(), |frontend| {
            frontend.connection.set_mtu(2000).unwrap();
            frontend.enable(1, false).unwrap();
            send(frontend, 0, 3);
            frontend.connection.get_vring_base(3).unwrap();
            let device = devices.report().devices.remove(0);
            assert_eq!((device.name.as_str(), device.connected), ("vnet", true));
            assert_eq!(device.role, report::SocketRole::Client);
            assert_eq!(device.mtu, Some(2000));
            assert_eq!(
                (device.uplink.kind.as_str(), device.uplink.up),
                ("null", true)
            );
            let seen = device.frontend.unwrap();
            assert_eq!(seen.pid, i32::try_from(process::id()).ok());
            assert!(seen.features.contains(&"MQ".to_owned()), "{seen:?}");
            assert!(!seen.protocol_features.is_empty());
            let region = frontend.ram().regions()[0];
            assert_eq!(device.memory.len(), 1);
            assert_eq!(
                (device.memory[0].guest_addr, device.memory[0].size),
                (region.guest_addr, region.size)
            );
            let [first, second] = &device.pairs[..] else {
                panic!("{:?}", device.pairs);
            };
            assert_eq!((first.pair, first.worker.as_str()), (0, "vnet-q0"));
            assert!(first.tid.is_some());
            assert_eq!(
                (first.tx.state, first.tx.enabled, first.tx.size),
                (report::VringStatus::Running, true, 64)
            );
            assert_eq!(first.tx.counters.get("frames"), Some(3));
            assert_eq!((second.rx.enabled, second.tx.enabled), (false, false));
            assert_eq!(
                (second.tx.state, second.tx.size),
                (report::VringStatus::Stopped, 0)
            );
            // A ring that the guest broke.
            let queue = &mut frontend.pairs[0].tx.queue;
            queue.ring.as_split().unwrap().set_avail_index(1000);
            queue.kick_now().unwrap();
            queue
                .err
                .wait(virtionet_net_device::testing::TIMEOUT)
                .unwrap();
            let broken = devices.report().devices.remove(0).pairs.remove(0).tx;
            assert_eq!(broken.state, report::VringStatus::Quarantined);
        });
        let device = devices.report().devices.remove(0);
        assert!(!device.connected && device.frontend.is_none() && device.memory.is_empty());
        assert_eq!(device.mtu, None);
        // The counters stay, and nothing runs.
        assert_eq!(device.pairs[0].tx.counters.get("frames"), Some(3));
        assert_eq!(device.pairs[0].tx.state, report::VringStatus::Stopped);
        assert_eq!(device.pairs[0].tid, None);
    }

    #[test]
    fn report_names_the_socket_and_the_role_of_the_device() {
        let net_device = Arc::new(net_device(1, Null, PollMode::Off));
        let listen = Socket::Listen {
            path: path(),
            mode: 0o600,
            group: None,
            peer_uid: None,
        };
        for (socket, text, role) in [
            (listen, "/run/vnet.sock", report::SocketRole::Server),
            (
                Socket::Connect { path: path() },
                "/run/vnet.sock",
                report::SocketRole::Client,
            ),
            (Socket::Inherited(5), "fd:5", report::SocketRole::Inherited),
        ] {
            let handover = Some(Path::new("/run/handover"));
            let devices = DeviceRegistry::new(set_of(socket, &net_device), None, handover);
            let report = devices.report();
            assert_eq!(report.version, env!("CARGO_PKG_VERSION"));
            assert_eq!(report.devices[0].socket, text);
            assert_eq!(report.devices[0].role, role);
            let process = report.process.unwrap();
            assert_eq!(process.pid, process::id());
            assert_eq!(process.handover_socket.as_deref(), Some("/run/handover"));
            assert_eq!(process.taken_over, None);
            let arguments: Vec<String> = env::args().skip(1).collect();
            assert_eq!(process.arguments, Some(arguments));
        }
    }
}
