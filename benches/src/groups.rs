//! What can be measured.

use clap::ValueEnum;

/// A group of cases, measured and shown together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// A chain through a split ring, against virtio-queue
    Ring,
    /// A frame between a ring and a TAP, against bare system calls
    Tap,
    /// Frames between two cards, against DPDK's vhost PMD and a device that uses vhost-user-backend and virtio-queue
    Peers,
    /// The idle daemon's memory and start, against their aims
    Footprint,
    /// A guest's TCP through the daemon, against QEMU's own virtio-net
    Iperf,
    /// TCP between two guests through the switch, against QEMU's own cards and a bridge
    Guests,
    /// One queue pair against several: throughput, CPU time and latency
    Queues,
}

impl Group {
    /// Its name, on the command line and of its result files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Tap => "tap",
            Self::Peers => "peers",
            Self::Footprint => "footprint",
            Self::Iperf => "iperf",
            Self::Guests => "guests",
            Self::Queues => "queues",
        }
    }

    /// What is measured, as a headline.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Ring => "A chain through a 256-entry split ring, device's side",
            Self::Tap => "A frame between a guest's ring and a TAP, one thread",
            Self::Peers => "Frames between two cards on one CPU, driven by DPDK's virtio-user",
            Self::Footprint => "The idle daemon: memory, and time to its first reply",
            Self::Iperf => "TCP between a QEMU guest (4 vCPUs) and its host, iperf3",
            Self::Guests => "TCP between two QEMU guests (2 vCPUs each), iperf3",
            Self::Queues => "Several queue pairs against one, a QEMU guest (4 vCPUs) and its host",
        }
    }
}
