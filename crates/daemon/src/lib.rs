//! The parts of the virtionetd program.
//!
//! Reading order, from the program to the frame: [`supervisor`] (devices and threads),
//! [`device_thread`] (the sessions of one device), and then the crate `virtionet-net-device`.

mod descriptor_budget;
mod device_failure;
mod device_set;
pub mod device_thread;
pub mod frontend_source;
pub mod handover;
pub mod helper_process;
mod host;
mod kept_taps;
mod manager;
pub mod process_sockets;
mod reload;
pub mod report_builder;
mod run_error;
pub mod served_device;
mod service_manager;
mod shutdown;
mod signals;
pub mod supervisor;
pub mod take_over;
#[cfg(test)]
mod testing;
pub mod uplinks;

pub use device_failure::DeviceFailure;
pub use host::default_state_folder;
pub use kept_taps::PassedDescriptors;
pub use run_error::RunError;
