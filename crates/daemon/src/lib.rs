//! The parts of the virtionetd program.
//!
//! Reading order, from the wire to the frame: [`supervisor`] (processes and threads), [`net_device`]
//! (one device), [`queue_pair`] and [`worker`] (a queue pair and its thread), [`vring_slot`] (a
//! running vring).

pub mod advice;
pub mod busy_poll;
pub mod host_cpus;
pub mod interrupts;
pub mod logging;
pub mod net_device;
pub mod placement_monitor;
pub mod placer;
pub mod queue_pair;
pub mod report_builder;
pub mod supervisor;
pub mod sys;
pub mod uplinks;
pub mod vring_slot;
pub mod warning_log;
pub mod worker;
