//! From the running devices to a report of them.

use std::sync::Arc;

use virtionet_virtio_net::DeviceQueue;
use virtionet_vhost_user::features::names as protocol_names;

use crate::card::Card;
use crate::config::{DeviceConfig, Socket};
use crate::pair::Pair;
use crate::report;
use crate::slot::{RingState, Slot};

/// All devices of this process, with where their sockets are.
#[derive(Debug)]
pub struct Devices(pub Vec<(DeviceConfig, Arc<Card>)>);

impl report::Inventory for Devices {
    fn report(&self) -> report::Report {
        report::Report {
            version: env!("CARGO_PKG_VERSION"),
            devices: self.0.iter().map(|(c, card)| device(c, card)).collect(),
        }
    }
}

fn device(config: &DeviceConfig, card: &Card) -> report::Device {
    let link = card.link();
    let (socket, role) = match &config.socket {
        Socket::Listen { path, .. } => (path.display().to_string(), report::Role::Server),
        Socket::Connect { path } => (path.display().to_string(), report::Role::Client),
        Socket::Inherited(fd) => (format!("fd:{fd}"), report::Role::Inherited),
    };
    report::Device {
        name: card.name().to_owned(),
        socket,
        role,
        connected: link.connected,
        frontend: link.connected.then(|| report::Frontend {
            pid: link.pid.and_then(|pid| i32::try_from(pid).ok()),
            features: link.features.names(),
            protocol_features: protocol_names(link.protocol_features).collect(),
        }),
        memory: link
            .memory
            .regions()
            .map(|region| report::Region {
                guest_addr: region.guest_addr,
                size: region.size,
                user_addr: region.user_addr,
            })
            .collect(),
        uplink: report::Uplink {
            kind: card.uplink().kind(),
            name: card.uplink().name(),
        },
        mtu: link.mtu,
        warnings: card.warnings().iter().map(ToString::to_string).collect(),
        advice: card.advice(),
        interrupts: card.interrupts().report(),
        pairs: card.pairs().map(|p| pair(p)).collect(),
    }
}

fn pair(pair: &Pair) -> report::Pair {
    let placed = pair.placed();
    let decision = placed.as_ref().map(|placed| &placed.decision);
    report::Pair {
        pair: pair.index(),
        vcpu: decision.and_then(|d| d.vcpus.first().copied()),
        vcpus: decision.map_or_else(Vec::new, |d| d.vcpus.clone()),
        worker: pair.worker_name(),
        tid: placed.as_ref().map(|placed| placed.tid),
        cpus: decision.map_or_else(Vec::new, |d| d.cpus.iter().collect()),
        placement: decision.map_or_else(String::new, |d| d.why.clone()),
        worker_node: placed.as_ref().and_then(|placed| placed.node),
        memory_node: pair.memory_node(),
        worker_counters: pair.worker_stats().into(),
        worker_load: report::Load::new(pair.worker_cycles(), pair.worker_stats()),
        rx: ring(pair.rx()),
        tx: ring(pair.tx()),
    }
}

fn ring<Q: DeviceQueue>(slot: &Slot<Q>) -> report::Ring {
    report::Ring {
        state: match slot.state() {
            RingState::Stopped => report::RingState::Stopped,
            RingState::Running => report::RingState::Running,
            RingState::Quarantined => report::RingState::Quarantined,
        },
        enabled: slot.enabled(),
        size: slot.size(),
        counters: (&**slot.stats()).into(),
    }
}
