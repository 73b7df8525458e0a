//! A virtio-net device as a vhost-user back-end.
//!
//! Reading order, from the device to the frame: [`net_device`] (one device), [`worker`] (a thread),
//! [`pair_service`] (its turns), [`queue_pair`] and [`vring_slot`] (a queue pair and its vrings).

pub mod advice;
pub mod busy_poll;
pub mod call_watchdog;
pub mod conditions;
pub mod crash_records;
pub mod device_list;
mod discovered_vcpus;
pub mod feature_set;
pub mod frame_inbox;
pub mod host_cpus;
pub mod interrupts;
pub mod net_device;
pub mod notifier;
pub mod pair_service;
pub mod placement_monitor;
pub mod placer;
pub mod quarantine;
pub mod queue_pair;
pub mod start_gate;
pub mod stop;
pub mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vring_log;
pub mod vring_slot;
pub mod waker;
pub mod warning_log;
pub mod worker;
pub mod worker_event;
pub mod worker_placement;
pub mod worker_pool;
mod worker_thread;
