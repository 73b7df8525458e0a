//! Builds the control API's report of the running devices.

use std::sync::Arc;

use virtionet_config::{DeviceConfig, Socket};
use virtionet_control::v1 as report;
use virtionet_vhost_user::VringState;
use virtionet_vhost_user::protocol_features::names as protocol_names;
use virtionet_virtio_net::DeviceQueue;
use virtionet_virtio_net::stats::{VringStats, WorkerStats};

use crate::logging;
use crate::net_device::{NetDevice, ServedPair};
use crate::panic_policy::contained_panics;
use crate::vring_slot::VringSlot;

/// All devices of this process, with their configurations.
#[derive(Debug)]
pub struct DeviceRegistry(pub Vec<(DeviceConfig, Arc<NetDevice>)>);

impl report::ReportSource for DeviceRegistry {
    fn report(&self) -> report::Report {
        report::Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            log_lines_dropped: logging::dropped_lines(),
            panics: contained_panics(),
            devices: self
                .0
                .iter()
                .map(|(c, net_device)| device(c, net_device))
                .collect(),
        }
    }
}

fn device(config: &DeviceConfig, net_device: &NetDevice) -> report::DeviceReport {
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
        mtu: frontend.mtu,
        warnings: net_device.warnings(),
        advice: net_device.advice(),
        interrupts: net_device.interrupts().report(),
        pairs,
    }
}

fn queue_pair(served: &ServedPair) -> report::QueuePairReport {
    let ServedPair { pair, worker, .. } = served;
    let stats = worker.stats();
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
