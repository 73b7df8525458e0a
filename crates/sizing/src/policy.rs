//! The rules that turn a request into a number of queue pairs.

use virtionet_base::MAX_QUEUE_PAIRS;

use crate::budget::{reduce_to_fit, total_vectors, vectors_of};
use crate::error::QueuesError;
use crate::request::{
    GuestRequest, MultiqueueDefault, NetDeviceQueues, NetDeviceRequest, QueuePlan, QueueRequest,
    describe_multiqueue,
};
use crate::throughput::Throughput;

/// Plans the queue pairs of each network device of a guest.
///
/// Nova's rules decide whether a device can have more than one queue pair. Multiqueue is off for a
/// guest with one vCPU. The image and the flavor, when both are set, must agree, and the one that
/// is set decides. Where neither is set, the request for the network device decides. A request that
/// contradicts the image or the flavor is refused.
///
/// The request then gives a number of queue pairs, which is limited to the number of vCPUs, to
/// `max_queues` and to [`MAX_QUEUE_PAIRS`]. When the guest has too few interrupt vectors, the
/// network devices for which no number is requested get fewer queue pairs.
///
/// # Errors
/// [`QueuesError`] when the request contradicts itself or exceeds the budget.
pub fn plan_queues(guest: &GuestRequest) -> Result<QueuePlan, QueuesError> {
    let multiqueue = Multiqueue::resolve(guest)?;
    let mut sizings = guest
        .net_devices
        .iter()
        .map(|request| DeviceSizing::compute(guest, &multiqueue, request))
        .collect::<Result<Vec<_>, _>>()?;
    fit_budget(guest, &mut sizings)?;
    let total = sizings
        .iter()
        .map(|sizing| vectors_of(sizing.pairs))
        .fold(guest.other_vectors, u32::saturating_add);
    let sized = guest.net_devices.iter().zip(sizings);
    Ok(QueuePlan {
        net_devices: sized
            .map(|(request, sizing)| NetDeviceQueues {
                name: request.name.clone(),
                pairs: sizing.pairs,
                vectors: vectors_of(sizing.pairs),
                why: sizing.why,
            })
            .collect(),
        other_vectors: guest.other_vectors,
        total_vectors: total,
        budget: guest.budget,
    })
}

/// The number of queue pairs of one network device alone, for which `throughput` is requested in a
/// guest with `vcpus` vCPUs, and the reason for it in words. The number is 1 to `cap`, and at most
/// [`MAX_QUEUE_PAIRS`].
///
/// # Errors
/// [`QueuesError::NoVcpu`] when `vcpus` is 0, and [`QueuesError::NoQueue`] when `cap` is 0.
pub fn queue_pairs_for(
    vcpus: u32,
    throughput: Throughput,
    cap: u16,
) -> Result<(u16, String), QueuesError> {
    let guest = GuestRequest {
        vcpus,
        max_queues: Some(cap),
        ..GuestRequest::default()
    };
    let request = NetDeviceRequest {
        name: String::new(),
        queue_request: QueueRequest::Throughput(throughput),
    };
    let sizing = DeviceSizing::compute(&guest, &Multiqueue::resolve(&guest)?, &request)?;
    Ok((sizing.pairs, sizing.why))
}

/// Whether multiqueue is on for a guest, and what turns it on or off.
#[derive(Debug, PartialEq, Eq)]
enum Multiqueue {
    /// Off for every network device, because the guest has one vCPU.
    OneVcpu,
    /// Turned off by these settings of image and flavor.
    Off(String),
    /// Turned on by these settings of image and flavor.
    On(String),
    /// Set by neither image nor flavor.
    Unset,
}

impl Multiqueue {
    /// The setting for `guest`.
    fn resolve(guest: &GuestRequest) -> Result<Self, QueuesError> {
        if guest.max_queues == Some(0) {
            return Err(QueuesError::NoQueue);
        }
        match (guest.vcpus, guest.image, guest.flavor) {
            (0, ..) => Err(QueuesError::NoVcpu),
            // Nova tests the number of vCPUs before it compares image and flavor.
            (1, ..) => Ok(Self::OneVcpu),
            (_, Some(image), Some(flavor)) if image != flavor => {
                Err(QueuesError::Conflict { image, flavor })
            }
            (_, None, None) => Ok(Self::Unset),
            (_, image, flavor) => {
                let settings = describe_multiqueue(image, flavor);
                Ok(match image.or(flavor) {
                    Some(true) => Self::On(settings),
                    _ => Self::Off(settings),
                })
            }
        }
    }
}

/// The queue pairs of one network device, before and after the budget is applied.
#[derive(Debug)]
struct DeviceSizing {
    pairs: u16,
    why: String,
    /// Whether the budget may reduce the number of queue pairs.
    can_shrink: bool,
}

impl DeviceSizing {
    /// The queue pairs for `request`, before the budget is applied.
    fn compute(
        guest: &GuestRequest,
        multiqueue: &Multiqueue,
        request: &NetDeviceRequest,
    ) -> Result<Self, QueuesError> {
        if let QueueRequest::Queues(queues) = request.queue_request
            && !(1..=MAX_QUEUE_PAIRS).contains(&queues)
        {
            return Err(QueuesError::Queues {
                net_device: request.name.clone(),
                queues,
            });
        }
        let (wanted, why) = match wanted_pairs(guest, multiqueue, request.queue_request) {
            Wanted::Pairs(pairs, why) => (pairs, why),
            Wanted::OnlyOne(why) => {
                return Ok(Self {
                    pairs: 1,
                    why,
                    can_shrink: false,
                });
            }
        };
        let (pairs, limited_by) = limit_pairs(guest, wanted);
        if pairs > 1 && matches!(multiqueue, Multiqueue::Off(_)) {
            return Err(QueuesError::MultiqueueOff {
                net_device: request.name.clone(),
                queue_request: request.queue_request.describe(),
                image: guest.image,
                flavor: guest.flavor,
            });
        }
        Ok(Self {
            pairs,
            why: why + &limited_by,
            can_shrink: !matches!(request.queue_request, QueueRequest::Queues(_)),
        })
    }
}

/// How many queue pairs a request gives before any limit, with the reason in words.
enum Wanted {
    /// This many.
    Pairs(u32, String),
    /// One, because multiqueue is off.
    OnlyOne(String),
}

fn wanted_pairs(guest: &GuestRequest, multiqueue: &Multiqueue, request: QueueRequest) -> Wanted {
    match (multiqueue, request) {
        (Multiqueue::OneVcpu, _) => {
            Wanted::OnlyOne("a guest with one vCPU has no use for more".into())
        }
        (_, QueueRequest::Queues(queues)) => Wanted::Pairs(
            queues.into(),
            format!("queues={queues} asks for this number"),
        ),
        (_, QueueRequest::Throughput(throughput)) => Wanted::Pairs(
            throughput.share_of(guest.vcpus),
            format!(
                "{}, as throughput={throughput} asks for",
                throughput.describe()
            ),
        ),
        (Multiqueue::Off(settings), QueueRequest::Unspecified) => {
            Wanted::OnlyOne(format!("multiqueue is off by {settings}"))
        }
        (Multiqueue::On(settings), QueueRequest::Unspecified) => Wanted::Pairs(
            guest.vcpus,
            format!("one for each vCPU, as multiqueue is on by {settings}"),
        ),
        (Multiqueue::Unset, QueueRequest::Unspecified) => match guest.multiqueue_default {
            MultiqueueDefault::On => Wanted::Pairs(guest.vcpus, "one for each vCPU".into()),
            MultiqueueDefault::Off => Wanted::OnlyOne(
                "neither image nor flavor turns multiqueue on, so it is off, as in Nova".into(),
            ),
        },
    }
}

/// Limits `wanted` queue pairs. Returns the number, and words for the limit that reduced it, which
/// are empty where none did.
fn limit_pairs(guest: &GuestRequest, wanted: u32) -> (u16, String) {
    let limits = [
        (
            guest.vcpus,
            "vCPUs, as more queue pairs cost memory and interrupts without any use",
        ),
        (
            guest.max_queues.map_or(u32::MAX, u32::from),
            "that max_queues allows",
        ),
        (u32::from(MAX_QUEUE_PAIRS), "that vhost-user can address"),
    ];
    let tightest = limits.into_iter().min_by_key(|(most, _)| *most);
    match tightest {
        Some((most, words)) if most < wanted => {
            let pairs = u16::try_from(most).unwrap_or(MAX_QUEUE_PAIRS);
            (pairs, format!("; limited to the {most} {words}"))
        }
        _ => (
            u16::try_from(wanted).unwrap_or(MAX_QUEUE_PAIRS),
            String::new(),
        ),
    }
}

/// Reduces the numbers of queue pairs until all devices have enough interrupt vectors.
fn fit_budget(guest: &GuestRequest, sizings: &mut [DeviceSizing]) -> Result<(), QueuesError> {
    let wanted: Vec<u16> = sizings.iter().map(|sizing| sizing.pairs).collect();
    let can_shrink: Vec<bool> = sizings.iter().map(|sizing| sizing.can_shrink).collect();
    let mut pairs = wanted.clone();
    let available = guest.budget.checked_sub(guest.other_vectors);
    if !available.is_some_and(|available| reduce_to_fit(&mut pairs, &can_shrink, available)) {
        // The error reports the smallest budget that would be enough.
        reduce_to_fit(&mut pairs, &can_shrink, 0);
        let net_devices = total_vectors(&pairs);
        return Err(QueuesError::OverBudget {
            needed: net_devices + u64::from(guest.other_vectors),
            net_devices,
            others: guest.other_vectors,
            budget: guest.budget,
        });
    }
    for ((sizing, wanted), pairs) in sizings.iter_mut().zip(wanted).zip(pairs) {
        if pairs < wanted {
            sizing.pairs = pairs;
            sizing.why += &format!(
                "; reduced from {wanted} to {pairs}, so that all devices together need at most {} \
                 interrupt vectors",
                guest.budget
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
