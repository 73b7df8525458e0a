//! The error for a request that cannot be fulfilled.

use virtionet_base::MAX_QUEUE_PAIRS;

use crate::request::describe_multiqueue;

/// Why the queue pairs of a guest's network devices cannot be planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueuesError {
    /// The guest has no vCPU.
    #[error("a guest has at least one vCPU: give the number of its vCPUs")]
    NoVcpu,
    /// The limit allows no queue pair.
    #[error(
        "max_queues is 0, but a network device has at least one queue pair: give 1 or more, or no \
         limit"
    )]
    NoQueue,
    /// Image and flavor contradict each other (Nova's `FlavorImageConflict`).
    #[error(
        "the image says hw_vif_multiqueue_enabled={image}, the flavor \
         hw:vif_multiqueue_enabled={flavor}: set both alike, or leave one unset"
    )]
    Conflict {
        /// The image's property.
        image: bool,
        /// The flavor's extra spec.
        flavor: bool,
    },
    /// Several queue pairs are requested for a network device where multiqueue is turned off.
    #[error(
        "network device {net_device} asks for {queue_request}, but multiqueue is off by {}: leave \
         one of them out",
        describe_multiqueue(*.image, *.flavor)
    )]
    MultiqueueOff {
        /// The name of the network device.
        net_device: String,
        /// The request, as a user writes it.
        queue_request: String,
        /// The image's property.
        image: Option<bool>,
        /// The flavor's extra spec.
        flavor: Option<bool>,
    },
    /// No network device can have the requested number of queue pairs.
    #[error(
        "network device {net_device} asks for queues={queues}: write 1 to {MAX_QUEUE_PAIRS}, which \
         is what vhost-user can address"
    )]
    Queues {
        /// The name of the network device.
        net_device: String,
        /// The requested number of queue pairs.
        queues: u16,
    },
    /// The interrupt vectors do not suffice, even with one queue pair for each network device for
    /// which no number is requested.
    #[error(
        "the guest needs {needed} interrupt vectors ({net_devices} for its network devices, \
         {others} for other devices), but has {budget}: ask for fewer queues or network devices, \
         or raise the budget"
    )]
    OverBudget {
        /// Vectors of all devices.
        needed: u64,
        /// Vectors of the network devices alone, with as few queue pairs as possible.
        net_devices: u64,
        /// Vectors of the other devices.
        others: u32,
        /// Vectors that all devices may use together.
        budget: u32,
    },
}

impl QueuesError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoVcpu => "guest-without-vcpu",
            Self::NoQueue => "max-queues-zero",
            Self::Conflict { .. } => "multiqueue-image-flavor-conflict",
            Self::MultiqueueOff { .. } => "multiqueue-off",
            Self::Queues { .. } => "queues-out-of-range",
            Self::OverBudget { .. } => "interrupt-vectors-exceeded",
        }
    }
}
