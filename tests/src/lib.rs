//! The library that the end-to-end tests, the demo and the benchmarks share: network namespaces,
//! QEMU guests that are controlled over their serial line, the daemon as a process, and iperf3
//! between the guest and the host.
//!
//! Reading order: [`topology`] builds the host's side from a [`netns`]. [`qemu`] starts a machine,
//! whose [`guest`] runs commands ([`ethtool`] parses the output of one of them) and whose monitor
//! is used through [`qmp`]. [`daemon`] starts virtionetd, and [`iperf`] sends traffic. [`testbed`]
//! combines all of these; [`two_guests`] does the same with a second guest instead of the host, and
//! [`libvirt`] starts libvirt domains as guests. [`migration`] has two hosts for one guest,
//! [`echo_stream`] and [`file_transfer`] what it carries meanwhile. A [`responder`] is a driver that answers pings
//! without a guest, and [`traffic`] is numbered frames through all vrings; [`diagnostics`] prints the
//! state of a guest that does not answer. [`testpmd`]
//! runs DPDK's driver and back-end, which need [`hugepages`]. A [`systemd_machine`] runs services,
//! of which [`systemd_service`] is virtionetd.
//!
//! Each process, namespace, directory and setting is removed by its `Drop` or, when a signal ends
//! this process, by a signal handler ([`cleanup`]). When SIGKILL ends this process, the kernel
//! kills its children, and the next run removes the namespaces and directories that were left
//! behind.

pub mod accel;
pub mod attachment;
pub mod cleanup;
pub mod counters;
pub mod cpus;
pub mod daemon;
pub mod debugger;
pub mod diagnostics;
pub mod echo_stream;
pub mod ethtool;
pub mod file_transfer;
pub mod guest;
mod hardware;
pub mod http;
pub mod hugepages;
pub mod iperf;
pub mod libvirt;
pub mod migration;
pub mod netns;
pub mod nic;
pub mod paths;
pub mod pause;
pub mod process;
pub mod procfs;
pub mod qemu;
mod qemu_socket;
pub mod qemu_version;
pub mod qmp;
pub mod quantile;
pub mod random;
pub mod responder;
pub mod sched;
pub mod settings;
pub mod systemd_machine;
pub mod systemd_service;
pub mod testbed;
pub mod testpmd;
pub mod topology;
pub mod traffic;
pub mod two_guests;
pub mod udp_streams;
pub mod wake_chain;
