//! The parts of the virtionetd program.
//!
//! Reading order, from the program to the frame: [`supervisor`] (devices and threads),
//! [`net_device`] (one device), [`worker`] (a thread), [`pair_service`] (its turns), [`queue_pair`]
//! and [`vring_slot`] (a queue pair and its vrings).

pub mod advice;
pub mod busy_poll;
pub mod call_watchdog;
pub mod conditions;
pub mod crash_records;
mod descriptor_budget;
pub mod device_thread;
mod discovered_vcpus;
pub mod feature_set;
pub mod frame_inbox;
pub mod frontend_source;
pub mod handover;
pub mod helper_process;
mod host;
pub mod host_cpus;
mod identity;
pub mod interrupts;
pub mod log_writer;
pub mod logging;
pub mod net_device;
pub mod notifier;
pub mod pair_service;
pub mod panic_policy;
pub mod placement_monitor;
pub mod placer;
pub mod process_sockets;
pub mod quarantine;
pub mod queue_pair;
pub mod report_builder;
mod run_error;
pub mod sandbox;
pub mod served_device;
pub mod stop;
pub mod supervisor;
pub mod sys;
pub mod take_over;
#[cfg(test)]
mod testing;
pub mod uplinks;
pub mod vring_log;
pub mod vring_slot;
pub mod waker;
pub mod warning_log;
pub mod worker;
pub mod worker_event;
pub mod worker_placement;
pub mod worker_pool;
mod worker_thread;

pub use run_error::{DeviceFailure, RunError};
