//! What the end-to-end tests, the demo and the iperf runs share: network
//! namespaces, QEMU guests driven over their serial line, the daemon as a
//! process, iperf3 between the two.
//!
//! Reading order: [`topology`] puts a host side together from a [`netns`];
//! [`qemu`] starts a machine, whose [`guest`] runs commands and whose [`qmp`]
//! monitor answers; [`daemon`] starts virtionetd; [`iperf`] loads the path;
//! [`rig`] is all of that at once. A [`station`] is a card without a guest
//! around it.
//! Everything that is started is ended by its `Drop`, by a signal handler
//! ([`cleanup`]) or, when this process is killed outright, by the kernel.

pub mod accel;
pub mod cleanup;
pub mod counters;
pub mod daemon;
pub mod guest;
pub mod http;
pub mod iperf;
pub mod netns;
pub mod paths;
pub mod process;
pub mod procfs;
pub mod qemu;
pub mod qmp;
pub mod rig;
pub mod sched;
pub mod station;
pub mod topology;
