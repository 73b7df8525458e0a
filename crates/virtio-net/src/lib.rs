//! The virtio-net device (virtio 1.3 §5.1): features, header, TX path, RX path, statistics.

mod announcement;
pub mod features;
mod frame_format;
pub mod header;
pub mod offload;
pub mod packet;
mod queue;
mod rx;
pub mod stats;
mod tx;
pub mod uplink;

pub use queue::{DeviceQueue, QueueConfig};
pub use rx::{PushOutcome, RxEndReason, RxOutcome, RxQueue};
pub use tx::{BURST_WORK, TxOutcome, TxQueue};
