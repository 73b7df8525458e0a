//! The groups of cases that can be measured.

use clap::ValueEnum;

/// A group of cases, measured and shown together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// A descriptor chain through a split virtqueue, against virtio-queue
    Ring,
    /// A frame between a virtqueue and a TAP, against bare system calls
    Tap,
    /// Frames between two network devices, against DPDK's vhost PMD and a device that uses
    /// vhost-user-backend and virtio-queue
    Peers,
    /// The memory and the start time of the idle daemon, against their aims
    Footprint,
    /// TCP between a guest and its host through the daemon, against QEMU's own virtio-net
    Iperf,
    /// TCP between two guests through the switch, against QEMU's own virtio-net and a bridge
    Guests,
    /// One queue pair against several: throughput, CPU time and latency
    Queues,
    /// The CPU time of the longest turns that a guest can cause, against their bound
    Turn,
    /// A device beside an attacked one, against an unrelated load of the same CPU time
    Isolation,
    /// A frame with the sandbox, against one without it
    Sandbox,
    /// The round trip of a single frame, against DPDK's vhost PMD and bare wake-ups
    Latency,
    /// This build of the daemon, against another one that --against names
    Builds,
}

impl Group {
    /// The name on the command line and of the result files.
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
            Self::Turn => "turn",
            Self::Isolation => "isolation",
            Self::Sandbox => "sandbox",
            Self::Latency => "latency",
            Self::Builds => "builds",
        }
    }

    /// The title of the table and of the chart.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Ring => {
                "A descriptor chain through a split virtqueue of 256 entries, on the device side"
            }
            Self::Tap => "A frame between a guest's virtqueue and a TAP, in one thread",
            Self::Peers => {
                "Frames between two network devices, with a back-end on one CPU and DPDK's virtio-user"
            }
            Self::Footprint => "The idle daemon: memory, and time to its first reply",
            Self::Iperf => "TCP between a QEMU guest (4 vCPUs) and its host, iperf3",
            Self::Guests => "TCP between two QEMU guests (2 vCPUs each), iperf3",
            Self::Queues => {
                "Several queue pairs against one, between a QEMU guest (4 vCPUs) and its host"
            }
            Self::Turn => "The longest turns of a worker that a hostile guest can cause",
            Self::Isolation => {
                "A device beside an attacked one, and beside an equal load of its CPUs"
            }
            Self::Sandbox => "A frame from the guest with the sandbox, and without it",
            Self::Latency => "The round trip of a single frame between two network devices",
            Self::Builds => {
                "Two builds of the daemon, with DPDK's virtio-user and with a QEMU guest"
            }
        }
    }
}
