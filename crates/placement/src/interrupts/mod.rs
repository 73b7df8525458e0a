//! Interrupts and steering masks of the host, set to the CPUs of the workers.
//!
//! The kernel's work for a queue is cheapest on the CPU of the worker that serves the queue,
//! because the frames are in that CPU's caches. Three kinds of files decide which CPU does that
//! work:
//!
//! | file | what it decides | value |
//! |---|---|---|
//! | `/sys/class/net/TAP/queues/tx-N/xps_cpus` | XPS of TAP queue N | mask of the CPUs of the worker that serves queue N |
//! | `/sys/class/net/TAP/queues/rx-N/rps_cpus` | RPS of TAP queue N | the same mask, only where RPS is on |
//! | `/proc/irq/I/smp_affinity_list` | the CPUs of interrupt I | list of the CPUs of worker k, if I is the interrupt of queue k of a NIC that shares a bridge with the TAP |
//!
//! - **XPS** decides through which queue a CPU transmits frames. A TAP selects its queue by flow
//!   (tun's `ndo_select_queue`) and does not use XPS for that. The mask shows users and tools which
//!   worker serves a queue, and determines on which NUMA node the kernel allocates the queue's
//!   qdisc.
//! - **RPS** decides which CPU processes the frames that the guest sent. Where it is off, the
//!   kernel processes a frame at once, on the CPU of the worker that wrote it, so nothing needs to
//!   be set; a mask would send each frame through the backlog queue, which costs a fifth to a
//!   quarter of the rate of small frames (measured). Where the host has it on, it is narrowed to
//!   the worker's CPU.
//! - **Interrupts of a NIC**: with queue k's interrupt on worker k's CPU, the worker finds the
//!   received frames in its caches. [`AffinitySetting`]s are made only for interrupts whose handler
//!   name contains a queue number.
//!
//! # When files are set
//!
//! [`desired_settings`] reads sysfs and `/proc/irq` and returns the values. It returns no value for
//! a worker that may run on every online CPU, and none where sysfs belongs to another network
//! namespace. In mode `apply` the caller passes them to [`IrqAffinityManager::reconcile`] whenever
//! a worker moves or the kernel attaches or detaches a TAP queue, and every few seconds, because a
//! NIC may join the bridge. A file that already holds its value is not written. In mode `print`
//! [`IrqAffinityManager::preview`] returns the same settings and nothing is written; in mode `off`
//! nothing is read.
//!
//! A file belongs to the device that set it first. Two devices whose TAPs share a bridge with the
//! same NIC therefore do not overwrite each other's values.
//!
//! # How files are restored
//!
//! The manager stores the content that a file had before its first write. It writes that content
//! back when a setting is no longer desired, when the front-end disconnects
//! ([`IrqAffinityManager::release`]) and when the manager is dropped at the end of the process. A
//! file whose content is neither the value nor what the kernel made of it has been changed by
//! another program and stays as it is. A killed process restores nothing; the masks of a TAP then
//! disappear with the TAP, the interrupts of a NIC stay where they are.
//!
//! irqbalance would move the interrupts again. [`IrqAffinityManager::with_irqbalance`] adds them to
//! its list of banned interrupts and removes them from it as they are restored; where it cannot be
//! reached, [`irqbalance_hint`] says how to configure it.
//!
//! # Map
//!
//! Each file uses only files below it.
//!
//! | file | subject |
//! |---|---|
//! | `manager.rs` | writes and restores files |
//! | `outcome.rs` | what happened to a setting |
//! | `irqbalance.rs` | irqbalance's list of banned interrupts |
//! | `desired.rs` | which files should hold which values |
//! | `tap.rs`, `nic.rs` | the files of a TAP's queues and of a NIC's interrupts |
//! | `setting.rs` | one file and its value |
//! | `mask.rs` | the kernel's hexadecimal CPU masks |
//! | `mode.rs` | apply, print or off |

mod desired;
mod irqbalance;
mod manager;
mod mask;
mod mode;
mod nic;
mod outcome;
mod setting;
mod tap;
#[cfg(test)]
mod testing;

pub use self::desired::{DesiredSettings, KernelPaths, TapWorkers, desired_settings};
pub use self::irqbalance::IRQBALANCE_SOCKETS;
pub use self::irqbalance::irqbalance_hint;
pub use self::manager::{AffinityImage, IrqAffinityManager, write_own};
pub use self::mask::{format_mask, parse_mask};
pub use self::mode::{IrqAffinity, IrqAffinityError};
pub use self::outcome::{OsError, SettingOutcome, SettingRefusal};
pub use self::setting::{AffinitySetting, SettingKind};
