//! The virtio-net device (virtio 1.3 §5.1): features, header, TX path, RX path, statistics.

pub mod features;
pub mod header;
pub mod port;
pub mod stats;
