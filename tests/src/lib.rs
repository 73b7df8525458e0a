//! What the end-to-end tests, the demo and the benchmarks share: network namespaces, QEMU guests
//! driven over their serial line, the daemon as a process, iperf3 between the two.
//!
//! Reading order: [`topology`] builds the host's side from a [`netns`]; [`qemu`] starts a machine,
//! whose [`guest`] runs commands ([`ethtool`] parses the output of one of them) and whose [`qmp`]
//! monitor answers; [`daemon`] starts virtionetd; [`iperf`] sends traffic. [`testbed`] is all of that
//! at once, [`two_guests`] the same with a second guest in the host's place, and [`libvirt`] has
//! libvirt domains as guests. A [`responder`] is a network device without a guest around it;
//! [`diagnostics`] collects what explains a guest that does not answer. [`testpmd`] is DPDK's driver
//! and back-end, which need [`hugepages`].
//!
//! Each process, namespace, directory and setting is removed by its `Drop`, by a signal handler
//! ([`cleanup`]) or, when this process is killed with SIGKILL, by the kernel.

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
pub mod qemu_version;
pub mod qmp;
pub mod responder;
pub mod sched;
pub mod testbed;
pub mod testpmd;
pub mod topology;
pub mod two_guests;
