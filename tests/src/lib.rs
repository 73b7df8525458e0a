//! What the end-to-end tests, the demo and the iperf runs share: network
//! namespaces, QEMU guests driven over their serial line, the daemon as a
//! process, iperf3 between the two.
//!
//! Reading order: [`topology`] puts a host side together from a [`netns`];
//! [`qemu`] starts a machine, whose [`guest`] runs commands ([`ethtool`] reads what
//! one of them prints) and whose [`qmp`] monitor answers; [`daemon`] starts virtionetd; [`iperf`] loads the path;
//! [`rig`] is all of that at once, [`duo`] with a second guest in the host's
//! place, and [`libvirt`] has domains in the machine's. A [`station`] is a card without a guest
//! around it; [`evidence`] tells what stands still when a guest does not answer.
//! [`testpmd`] is DPDK's driver and back-end, on [`hugepages`].
//! Everything that is started is ended by its `Drop`, by a signal handler
//! ([`cleanup`]) or, when this process is killed outright, by the kernel.

pub mod accel;
pub mod cleanup;
pub mod counters;
pub mod cpus;
pub mod daemon;
pub mod diagnostics;
pub mod ethtool;
pub mod guest;
pub mod http;
pub mod hugepages;
pub mod iperf;
pub mod libvirt;
pub mod netns;
pub mod nic;
pub mod paths;
pub mod process;
pub mod procfs;
pub mod qemu;
pub mod qmp;
pub mod responder;
pub mod sched;
pub mod testbed;
pub mod testpmd;
pub mod topology;
pub mod two_guests;
