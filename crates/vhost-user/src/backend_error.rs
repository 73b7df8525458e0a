//! Why a device cannot do what a request asks. The causes are errors of the host or of the device's
//! configuration; faults of the guest and errors of the front-end have types of their own.

use std::error::Error;
use std::io;

use virtionet_virtqueue::VirtqueueError;

use crate::vring_state::InvalidTransition;

/// Why a device cannot do what a request asks.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The vring belongs to a queue pair that the device does not have.
    #[error(
        "ring {index} is beyond the {queue_pairs} queue pairs of {device}; start virtionetd with more --queues"
    )]
    NoSuchQueuePair {
        /// The vring's index.
        index: u16,
        /// The number of queue pairs of the device.
        queue_pairs: usize,
        /// The device's name.
        device: String,
    },
    /// The host has no descriptors left for a queue pair.
    #[error("cannot make queue pair {pair}: {source}; raise the limit of open files")]
    QueuePair {
        /// The queue pair's number.
        pair: u16,
        /// The kernel's error.
        source: io::Error,
    },
    /// The uplink has no queue for a queue pair.
    #[error("{0}")]
    Uplink(#[source] Box<dyn Error + Send + Sync>),
    /// The worker cannot wait for frames of the uplink.
    #[error(
        "cannot wait for frames of the uplink: {source}; raise the limit of epoll watches (fs.epoll.max_user_watches)"
    )]
    UplinkWatch {
        /// The kernel's error.
        source: io::Error,
    },
    /// The vring's configuration cannot be a virtqueue.
    #[error("ring {index} cannot start: {source}")]
    VringConfig {
        /// The vring's index.
        index: u16,
        /// Why the configuration is not that of a virtqueue.
        source: VirtqueueError,
    },
    /// The state of the vring does not allow a start.
    #[error("ring {index} cannot start: {source}")]
    VringState {
        /// The vring's index.
        index: u16,
        /// The state and the event that are not possible together.
        source: InvalidTransition,
    },
    /// The vring's areas are not in the new memory table.
    #[error("ring {index} is not in the new memory table: {source}")]
    VringUnmapped {
        /// The vring's index.
        index: u16,
        /// The area that is missing.
        source: VirtqueueError,
    },
    /// The worker cannot wait for the kick descriptor.
    #[error("the kick descriptor of ring {index} cannot be polled: {source}")]
    Kick {
        /// The vring's index.
        index: u16,
        /// The kernel's error.
        source: io::Error,
    },
    /// The host has no thread left for a worker.
    #[error("cannot start the worker of queue pair {pair}: {source}; raise the limit of threads")]
    Worker {
        /// The queue pair's number.
        pair: u16,
        /// The kernel's error.
        source: io::Error,
    },
    /// The uplink cannot carry frames of this MTU.
    #[error("{source}")]
    Mtu {
        /// The requested MTU in bytes.
        mtu: u16,
        /// Why not, in the words of the uplink.
        source: Box<dyn Error + Send + Sync>,
    },
}

impl BackendError {
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoSuchQueuePair { .. } => "no-such-queue-pair",
            Self::QueuePair { .. } => "queue-pair-not-created",
            Self::Uplink(_) => "uplink-queue-not-opened",
            Self::UplinkWatch { .. } => "uplink-not-pollable",
            Self::VringConfig { .. } => "vring-config-invalid",
            Self::VringState { .. } => "vring-state-invalid",
            Self::VringUnmapped { .. } => "vring-unmapped",
            Self::Kick { .. } => "kick-not-pollable",
            Self::Worker { .. } => "worker-not-started",
            Self::Mtu { .. } => "mtu-not-supported",
        }
    }
}
