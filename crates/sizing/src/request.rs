//! The types of a request for the queue pairs of a guest, and of the resulting plan.

use serde::Serialize;

use crate::budget::MSIX_BUDGET;
use crate::throughput::Throughput;

/// A guest, its limits, and the requests for its network devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRequest {
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// The image's property `hw_vif_multiqueue_enabled`.
    pub image: Option<bool>,
    /// The flavor's extra spec `hw:vif_multiqueue_enabled`.
    pub flavor: Option<bool>,
    /// Whether multiqueue is on when neither the image nor the flavor sets it.
    pub multiqueue_default: MultiqueueDefault,
    /// The largest number of queue pairs of a network device (Nova's `[libvirt] max_queues`), at
    /// least 1.
    pub max_queues: Option<u16>,
    /// The requests for the network devices, one for each device.
    pub net_devices: Vec<NetDeviceRequest>,
    /// Interrupt vectors of the guest's other devices.
    pub other_vectors: u32,
    /// Interrupt vectors that all devices may use together.
    pub budget: u32,
}

/// The request for one network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetDeviceRequest {
    /// The device's name, which errors show.
    pub name: String,
    /// The number of queue pairs.
    pub queue_request: QueueRequest,
}

/// How many queue pairs are requested for a network device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum QueueRequest {
    /// As many as the rules for the whole guest give.
    #[default]
    Unspecified,
    /// Exactly this many, at least 1; the budget never reduces them.
    Queues(u16),
    /// A share of the vCPUs.
    Throughput(Throughput),
}

/// Whether a guest has multiqueue when neither its image nor its flavor sets it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MultiqueueDefault {
    /// On: a queue pair for each vCPU, which a user who plans by hand expects.
    #[default]
    On,
    /// Off: one queue pair, as in Nova.
    Off,
}

/// The queue pairs of all network devices of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QueuePlan {
    /// The queue pairs of each network device, in the order of the request.
    #[serde(rename = "cards")]
    pub net_devices: Vec<NetDeviceQueues>,
    /// Interrupt vectors of the guest's other devices.
    pub other_vectors: u32,
    /// Interrupt vectors of all devices together.
    pub total_vectors: u32,
    /// Interrupt vectors that all devices may use together.
    pub budget: u32,
}

/// The queue pairs of one network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetDeviceQueues {
    /// The device's name.
    pub name: String,
    /// Queue pairs, 1 to [`MAX_QUEUE_PAIRS`](crate::MAX_QUEUE_PAIRS).
    pub pairs: u16,
    /// Interrupt vectors: 2 for each queue pair, and 2 more.
    pub vectors: u32,
    /// The reason for this number of queue pairs, in words.
    pub why: String,
}

impl Default for GuestRequest {
    /// One vCPU, no network device, no limit and the usual budget.
    fn default() -> Self {
        Self {
            vcpus: 1,
            image: None,
            flavor: None,
            multiqueue_default: MultiqueueDefault::On,
            max_queues: None,
            net_devices: Vec::new(),
            other_vectors: 0,
            budget: MSIX_BUDGET,
        }
    }
}

impl QueueRequest {
    /// The request as a user writes it.
    pub(crate) fn describe(self) -> String {
        match self {
            Self::Unspecified => "nothing".into(),
            Self::Queues(queues) => format!("queues={queues}"),
            Self::Throughput(throughput) => format!("throughput={throughput}"),
        }
    }
}

/// The settings of image and flavor as a user writes them, such as
/// `hw_vif_multiqueue_enabled=true (image)`.
pub(crate) fn describe_multiqueue(image: Option<bool>, flavor: Option<bool>) -> String {
    let image = image.map(|on| format!("hw_vif_multiqueue_enabled={on} (image)"));
    let flavor = flavor.map(|on| format!("hw:vif_multiqueue_enabled={on} (flavor)"));
    match (image, flavor) {
        (Some(image), Some(flavor)) => format!("{image} and {flavor}"),
        (image, flavor) => image.or(flavor).unwrap_or_else(|| "nothing".into()),
    }
}
