//! The virtio-net device (virtio 1.3 §5.1): features, header, TX path, RX path, statistics.

pub mod features;
pub mod header;
pub mod offload;
pub mod uplink;
mod queue;
mod rx;
pub mod stats;
mod tx;

pub use queue::{DeviceQueue, QueueConfig};
pub use rx::{RxOutcome, PushOutcome, RxEndReason, RxQueue};
pub use tx::{TxOutcome, TxQueue};
