//! The rules, from what is wished of a guest's cards to their pairs.

use serde::Serialize;

use super::MAX_QUEUE_PAIRS;
use super::budget::{MSIX_BUDGET, fit, total, vectors_of};
use super::throughput::Throughput;

/// What is known and wished of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRequest {
    /// Number of vCPUs, at least 1.
    pub vcpus: u32,
    /// The image's property `hw_vif_multiqueue_enabled`.
    pub image: Option<bool>,
    /// The flavor's extra spec `hw:vif_multiqueue_enabled`.
    pub flavor: Option<bool>,
    /// What it means when neither is set.
    pub unset: MultiqueueDefault,
    /// Most pairs of a card (Nova's `[libvirt] max_queues`), at least 1.
    pub max_queues: Option<u16>,
    /// The network cards.
    pub cards: Vec<NetDeviceRequest>,
    /// Interrupt vectors of the guest's other devices.
    pub other_vectors: u32,
    /// Interrupt vectors that all devices may use together.
    pub budget: u32,
}

/// What is wished of one card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetDeviceRequest {
    /// Its name, for messages.
    pub name: String,
    /// How many pairs.
    pub queue_request: QueueRequest,
}

/// How many pairs are wished of a card.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum QueueRequest {
    /// What the guest's other settings say.
    #[default]
    Unspecified,
    /// This many, at least 1; never taken back for the sake of the budget.
    Queues(u16),
    /// A share of the vCPUs.
    Throughput(Throughput),
}

/// What a guest gets whose image and flavor say nothing of multiqueue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MultiqueueDefault {
    /// A pair for each vCPU: who plans by hand wants queues.
    #[default]
    On,
    /// One pair, as Nova has it.
    Off,
}

/// The pairs of a guest's cards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QueuePlan {
    /// The cards, in the order of the request.
    pub cards: Vec<NetDeviceQueues>,
    /// Interrupt vectors of the guest's other devices.
    pub other_vectors: u32,
    /// Interrupt vectors of all its devices together.
    pub total_vectors: u32,
    /// Interrupt vectors that they may use.
    pub budget: u32,
}

/// The pairs of one card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetDeviceQueues {
    /// Its name.
    pub name: String,
    /// Queue pairs, 1 to [`MAX_QUEUE_PAIRS`].
    pub pairs: u16,
    /// Its interrupt vectors: 2 for each pair, and 2.
    pub vectors: u32,
    /// The reason, in words.
    pub why: String,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueuesError {
    /// A guest without vCPUs.
    #[error("a guest has at least one vCPU: give the number of its vCPUs")]
    NoVcpu,
    /// A limit of no pair at all.
    #[error("max_queues is 0, but a card has at least one queue pair: give 1 or more, or no limit")]
    NoQueue,
    /// Nova's FlavorImageConflict.
    #[error(
        "the image says hw_vif_multiqueue_enabled={image}, the flavor hw:vif_multiqueue_enabled={flavor}: set both alike, or leave one unset"
    )]
    Conflict {
        /// The image's property.
        image: bool,
        /// The flavor's extra spec.
        flavor: bool,
    },
    /// A card wants several pairs where multiqueue is turned off.
    #[error(
        "card {card} asks for {queue_request}, but multiqueue is off by {}: leave one of them out", describe_source(*.image, *.flavor)
    )]
    MultiqueueOff {
        /// The card.
        card: String,
        /// Its wish, as it is written.
        queue_request: String,
        /// The image's property.
        image: Option<bool>,
        /// The flavor's extra spec.
        flavor: Option<bool>,
    },
    /// A number of pairs that no card can have.
    #[error(
        "card {card} asks for queues={queues}: write 1 to {MAX_QUEUE_PAIRS}, which is what vhost-user can address"
    )]
    Queues {
        /// The card.
        card: String,
        /// The number.
        queues: u16,
    },
    /// The vectors do not fit, even with one pair for each card that does not
    /// insist on more.
    #[error(
        "the guest needs {needed} interrupt vectors ({cards} for its cards, {others} for other devices), but has {budget}: ask for fewer queues or cards, or raise the budget"
    )]
    OverBudget {
        /// Vectors of all devices.
        needed: u64,
        /// Those of the cards, with as few pairs as may be.
        cards: u64,
        /// Those of the other devices.
        others: u32,
        /// What there is.
        budget: u32,
    },
}

impl Default for GuestRequest {
    /// One vCPU, no card, no limit and the usual budget.
    fn default() -> Self {
        Self {
            vcpus: 1,
            image: None,
            flavor: None,
            unset: MultiqueueDefault::On,
            max_queues: None,
            cards: Vec::new(),
            other_vectors: 0,
            budget: MSIX_BUDGET,
        }
    }
}

/// The pairs of each card of a guest.
///
/// Whether there is more than one pair is Nova's rule: one vCPU, off, whatever
/// else is said; image and flavor, when both are set, must agree; the one that is
/// set decides. A card's own wish decides where neither is set, and is refused
/// where it contradicts them. Then as many as the wish makes of the vCPUs, no
/// more than there are vCPUs, than the limit, than vhost-user can address; and
/// when the vectors are too many, fewer on the cards that do not insist.
///
/// # Errors
/// [`QueuesError`] when the request contradicts itself or the budget.
pub fn plan_queues(guest: &GuestRequest) -> Result<QueuePlan, QueuesError> {
    let switch = Multiqueue::of(guest)?;
    let mut cards = guest
        .cards
        .iter()
        .map(|card| DeviceSizing::of(guest, &switch, card))
        .collect::<Result<Vec<_>, _>>()?;
    fit_budget(guest, &mut cards)?;
    let total_vectors = cards
        .iter()
        .map(|card| vectors_of(card.pairs))
        .fold(guest.other_vectors, u32::saturating_add);
    let cards = guest.cards.iter().zip(cards);
    Ok(QueuePlan {
        cards: cards
            .map(|(asked, sizing)| NetDeviceQueues {
                name: asked.name.clone(),
                pairs: sizing.pairs,
                vectors: vectors_of(sizing.pairs),
                why: sizing.why,
            })
            .collect(),
        other_vectors: guest.other_vectors,
        total_vectors,
        budget: guest.budget,
    })
}

/// The pairs of a card alone, of which `throughput` is wished in a guest with
/// `vcpus` vCPUs, `cap` pairs at most; and the reason in words.
///
/// # Errors
/// [`QueuesError::NoVcpu`] and [`QueuesError::NoQueue`] where either is 0.
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
    let card = NetDeviceRequest {
        name: String::new(),
        queue_request: QueueRequest::Throughput(throughput),
    };
    let sizing = DeviceSizing::of(&guest, &Multiqueue::of(&guest)?, &card)?;
    Ok((sizing.pairs, sizing.why))
}

/// Whether a guest has multiqueue.
#[derive(Debug, PartialEq, Eq)]
enum Multiqueue {
    /// Off for every card: there is one vCPU.
    OneVcpu,
    /// Off, as image or flavor say.
    Off(String),
    /// On, as image or flavor say.
    On(String),
    /// Neither says anything.
    Unset,
}

impl Multiqueue {
    fn of(guest: &GuestRequest) -> Result<Self, QueuesError> {
        if guest.max_queues == Some(0) {
            return Err(QueuesError::NoQueue);
        }
        match (guest.vcpus, guest.image, guest.flavor) {
            (0, ..) => Err(QueuesError::NoVcpu),
            // As in Nova, this comes before the question whether they agree.
            (1, ..) => Ok(Self::OneVcpu),
            (_, Some(image), Some(flavor)) if image != flavor => {
                Err(QueuesError::Conflict { image, flavor })
            }
            (_, None, None) => Ok(Self::Unset),
            (_, image, flavor) => {
                let words = describe_source(image, flavor);
                Ok(match image.or(flavor) {
                    Some(true) => Self::On(words),
                    _ => Self::Off(words),
                })
            }
        }
    }
}

/// A card's pairs on the way to the answer.
#[derive(Debug)]
struct DeviceSizing {
    pairs: u16,
    why: String,
    /// Whether the budget may take some back.
    reducible: bool,
}

impl DeviceSizing {
    fn of(
        guest: &GuestRequest,
        switch: &Multiqueue,
        card: &NetDeviceRequest,
    ) -> Result<Self, QueuesError> {
        if let QueueRequest::Queues(queues) = card.queue_request
            && !(1..=MAX_QUEUE_PAIRS).contains(&queues)
        {
            return Err(QueuesError::Queues {
                card: card.name.clone(),
                queues,
            });
        }
        let (wanted, why) = match (switch, card.queue_request) {
            (Multiqueue::OneVcpu, _) => {
                return Ok(Self::one("a guest with one vCPU has no use for more"));
            }
            (Multiqueue::Off(words), QueueRequest::Unspecified) => {
                return Ok(Self::one(&format!("multiqueue is off by {words}")));
            }
            (Multiqueue::Unset, QueueRequest::Unspecified)
                if guest.unset == MultiqueueDefault::Off =>
            {
                return Ok(Self::one(
                    "neither image nor flavor turns multiqueue on, so it is off, as in Nova",
                ));
            }
            (Multiqueue::On(words), QueueRequest::Unspecified) => (
                guest.vcpus,
                format!("one for each vCPU, as multiqueue is on by {words}"),
            ),
            (_, QueueRequest::Unspecified) => (guest.vcpus, "one for each vCPU".into()),
            (_, QueueRequest::Queues(queues)) => {
                (queues.into(), format!("queues={queues} asks for it"))
            }
            (_, QueueRequest::Throughput(throughput)) => (
                throughput.share_of(guest.vcpus),
                format!("{}, as throughput={throughput} says", throughput.describe()),
            ),
        };
        let (pairs, limits) = limit(guest, wanted);
        if pairs > 1 && matches!(switch, Multiqueue::Off(_)) {
            return Err(QueuesError::MultiqueueOff {
                card: card.name.clone(),
                queue_request: card.queue_request.describe(),
                image: guest.image,
                flavor: guest.flavor,
            });
        }
        Ok(Self {
            pairs,
            why: why + &limits,
            reducible: !matches!(card.queue_request, QueueRequest::Queues(_)),
        })
    }

    fn one(why: &str) -> Self {
        Self {
            pairs: 1,
            why: why.into(),
            reducible: false,
        }
    }
}

impl QueueRequest {
    fn describe(self) -> String {
        match self {
            Self::Unspecified => "nothing".into(),
            Self::Queues(queues) => format!("queues={queues}"),
            Self::Throughput(throughput) => format!("throughput={throughput}"),
        }
    }
}

/// `wanted` pairs within the limits, and the words for the limit that bound.
fn limit(guest: &GuestRequest, wanted: u32) -> (u16, String) {
    let limits = [
        (guest.vcpus, "vCPUs, beyond which pairs only cost"),
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

/// Takes pairs back until the guest's vectors are enough.
fn fit_budget(guest: &GuestRequest, cards: &mut [DeviceSizing]) -> Result<(), QueuesError> {
    let wanted: Vec<u16> = cards.iter().map(|card| card.pairs).collect();
    let reducible: Vec<bool> = cards.iter().map(|card| card.reducible).collect();
    let mut pairs = wanted.clone();
    let available = guest.budget.checked_sub(guest.other_vectors);
    if !available.is_some_and(|available| fit(&mut pairs, &reducible, available)) {
        fit(&mut pairs, &reducible, 0);
        let needed = total(&pairs);
        return Err(QueuesError::OverBudget {
            needed: needed + u64::from(guest.other_vectors),
            cards: needed,
            others: guest.other_vectors,
            budget: guest.budget,
        });
    }
    for ((card, wanted), pairs) in cards.iter_mut().zip(wanted).zip(pairs) {
        if pairs < wanted {
            card.pairs = pairs;
            card.why += &format!(
                "; {wanted} reduced to {pairs}, so that all devices together need no more than {} interrupt vectors",
                guest.budget
            );
        }
    }
    Ok(())
}

/// Where a setting comes from: `hw_vif_multiqueue_enabled=true (image)`.
fn describe_source(image: Option<bool>, flavor: Option<bool>) -> String {
    let image = image.map(|on| format!("hw_vif_multiqueue_enabled={on} (image)"));
    let flavor = flavor.map(|on| format!("hw:vif_multiqueue_enabled={on} (flavor)"));
    match (image, flavor) {
        (Some(image), Some(flavor)) => format!("{image} and {flavor}"),
        (image, flavor) => image.or(flavor).unwrap_or_else(|| "nothing".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use QueueRequest::{Queues, Unspecified};
    use Throughput::{High, Low, Medium};

    const ON: Option<bool> = Some(true);
    const OFF: Option<bool> = Some(false);

    fn guest(vcpus: u32, queue_requests: &[QueueRequest]) -> GuestRequest {
        let card = |(at, queue_request): (usize, &QueueRequest)| NetDeviceRequest {
            name: format!("net{at}"),
            queue_request: *queue_request,
        };
        GuestRequest {
            vcpus,
            cards: queue_requests.iter().enumerate().map(card).collect(),
            ..GuestRequest::default()
        }
    }

    /// Pairs and reason of the only card, or the refusal.
    fn one(guest: &GuestRequest) -> Result<(u16, String), String> {
        let mut plan = plan_queues(guest).map_err(|why| why.to_string())?;
        let card = plan.cards.pop().unwrap();
        assert_eq!(card.vectors, vectors_of(card.pairs));
        assert_eq!(plan.total_vectors, card.vectors + guest.other_vectors);
        Ok((card.pairs, card.why))
    }

    #[test]
    fn image_and_flavor_turn_multiqueue_on_and_off_as_nova_does() {
        let each = "one for each vCPU, as multiqueue is on by ";
        let off = "multiqueue is off by ";
        let unset = "neither image nor flavor turns multiqueue on, so it is off, as in Nova";
        let single = "a guest with one vCPU has no use for more";
        let (image_on, flavor_on) = (
            "hw_vif_multiqueue_enabled=true (image)",
            "hw:vif_multiqueue_enabled=true (flavor)",
        );
        let (image_off, flavor_off) = (
            "hw_vif_multiqueue_enabled=false (image)",
            "hw:vif_multiqueue_enabled=false (flavor)",
        );
        let conflict = |image, flavor| {
            Err(format!(
                "the image says hw_vif_multiqueue_enabled={image}, the flavor \
                 hw:vif_multiqueue_enabled={flavor}: set both alike, or leave one unset"
            ))
        };
        for (vcpus, image, flavor, expected) in [
            (4, None, None, Ok((1, unset.into()))),
            (4, ON, None, Ok((4, format!("{each}{image_on}")))),
            (4, None, ON, Ok((4, format!("{each}{flavor_on}")))),
            (
                4,
                ON,
                ON,
                Ok((4, format!("{each}{image_on} and {flavor_on}"))),
            ),
            (4, OFF, None, Ok((1, format!("{off}{image_off}")))),
            (4, None, OFF, Ok((1, format!("{off}{flavor_off}")))),
            (
                4,
                OFF,
                OFF,
                Ok((1, format!("{off}{image_off} and {flavor_off}"))),
            ),
            (4, ON, OFF, conflict(true, false)),
            (4, OFF, ON, conflict(false, true)),
            (2, OFF, ON, conflict(false, true)),
            // One vCPU: off, and not even a contradiction matters.
            (1, None, None, Ok((1, single.into()))),
            (1, ON, None, Ok((1, single.into()))),
            (1, None, ON, Ok((1, single.into()))),
            (1, ON, ON, Ok((1, single.into()))),
            (1, OFF, OFF, Ok((1, single.into()))),
            (1, ON, OFF, Ok((1, single.into()))),
            (1, OFF, ON, Ok((1, single.into()))),
        ] {
            let guest = GuestRequest {
                image,
                flavor,
                unset: MultiqueueDefault::Off,
                ..guest(vcpus, &[Unspecified])
            };
            assert_eq!(one(&guest), expected, "{guest:?}");
            // The default for what is unset matters only where both are.
            let by_hand = one(&GuestRequest {
                unset: MultiqueueDefault::On,
                ..guest.clone()
            });
            match (vcpus, image, flavor) {
                (4, None, None) => assert_eq!(by_hand, Ok((4, "one for each vCPU".into()))),
                _ => assert_eq!(by_hand, expected, "{guest:?}"),
            }
        }
    }

    #[test]
    fn a_cards_own_wish_counts_within_the_limits() {
        let most = "vCPUs, beyond which pairs only cost";
        // vCPUs, limit, wish; pairs, reason.
        let table: [(u32, Option<u16>, QueueRequest, u16, String); 22] = [
            (4, None, Unspecified, 4, "one for each vCPU".into()),
            (4, Some(4), Unspecified, 4, "one for each vCPU".into()),
            (4, Some(3), Unspecified, 3, "one for each vCPU; limited to the 3 that max_queues allows".into()),
            (4, Some(1), Unspecified, 1, "one for each vCPU; limited to the 1 that max_queues allows".into()),
            (4, Some(500), Unspecified, 4, "one for each vCPU".into()),
            (128, None, Unspecified, 128, "one for each vCPU".into()),
            (129, None, Unspecified, 128, "one for each vCPU; limited to the 128 that vhost-user can address".into()),
            (u32::MAX, Some(500), Unspecified, 128, "one for each vCPU; limited to the 128 that vhost-user can address".into()),
            (4, None, Queues(1), 1, "queues=1 asks for it".into()),
            (4, None, Queues(3), 3, "queues=3 asks for it".into()),
            (4, None, Queues(4), 4, "queues=4 asks for it".into()),
            (4, None, Queues(8), 4, format!("queues=8 asks for it; limited to the 4 {most}")),
            (8, Some(2), Queues(4), 2, "queues=4 asks for it; limited to the 2 that max_queues allows".into()),
            (1, None, Queues(4), 1, "a guest with one vCPU has no use for more".into()),
            (4, None, QueueRequest::Throughput(High), 4, "one for each vCPU, as throughput=high says".into()),
            (4, None, QueueRequest::Throughput(Medium), 2, "one for every two vCPUs, as throughput=medium says".into()),
            (3, None, QueueRequest::Throughput(Medium), 2, "one for every two vCPUs, as throughput=medium says".into()),
            (2, None, QueueRequest::Throughput(Medium), 1, "one for every two vCPUs, as throughput=medium says".into()),
            (4, None, QueueRequest::Throughput(Low), 1, "one, as throughput=low says".into()),
            (8, Some(4), QueueRequest::Throughput(Medium), 4, "one for every two vCPUs, as throughput=medium says".into()),
            (8, Some(3), QueueRequest::Throughput(High), 3, "one for each vCPU, as throughput=high says; limited to the 3 that max_queues allows".into()),
            (1, None, QueueRequest::Throughput(High), 1, "a guest with one vCPU has no use for more".into()),
        ];
        for (vcpus, max_queues, queue_request, pairs, why) in table {
            let guest = GuestRequest {
                max_queues,
                budget: 1000,
                ..guest(vcpus, &[queue_request])
            };
            assert_eq!(one(&guest), Ok((pairs, why)), "{guest:?}");
            // On by name, or unset as Nova has it: a card's own wish stands.
            for (image, unset) in [(ON, MultiqueueDefault::Off), (None, MultiqueueDefault::Off)] {
                let guest = GuestRequest {
                    image,
                    unset,
                    ..guest.clone()
                };
                if queue_request != Unspecified {
                    assert_eq!(one(&guest).unwrap().0, pairs, "{guest:?}");
                }
            }
        }
    }

    #[test]
    fn a_wish_that_contradicts_image_or_flavor_is_refused() {
        let off = "multiqueue is off by";
        let image = "hw_vif_multiqueue_enabled=false (image)";
        let flavor = "hw:vif_multiqueue_enabled=false (flavor)";
        for (queue_request, properties, expected) in [
            (
                Queues(2),
                (OFF, None),
                Err(format!("queues=2, but {off} {image}")),
            ),
            (
                Queues(2),
                (None, OFF),
                Err(format!("queues=2, but {off} {flavor}")),
            ),
            (
                Queues(2),
                (OFF, OFF),
                Err(format!("queues=2, but {off} {image} and {flavor}")),
            ),
            (
                QueueRequest::Throughput(High),
                (OFF, None),
                Err(format!("throughput=high, but {off} {image}")),
            ),
            (
                QueueRequest::Throughput(Medium),
                (None, OFF),
                Err(format!("throughput=medium, but {off} {flavor}")),
            ),
            (Queues(1), (OFF, None), Ok(1)),
            (QueueRequest::Throughput(Low), (OFF, None), Ok(1)),
        ] {
            let (image, flavor) = properties;
            let guest = GuestRequest {
                image,
                flavor,
                ..guest(4, &[queue_request])
            };
            let expected = expected
                .map_err(|middle| format!("card net0 asks for {middle}: leave one of them out"));
            assert_eq!(one(&guest).map(|(pairs, _)| pairs), expected, "{guest:?}");
            // Where it comes to one pair, there is nothing to contradict.
            for alike in [
                GuestRequest {
                    vcpus: 1,
                    ..guest.clone()
                },
                GuestRequest {
                    max_queues: Some(1),
                    ..guest.clone()
                },
            ] {
                assert_eq!(one(&alike).map(|(pairs, _)| pairs), Ok(1), "{alike:?}");
            }
        }
    }

    #[test]
    fn numbers_that_mean_nothing_are_refused() {
        let queues = |n| {
            format!(
                "card net0 asks for queues={n}: write 1 to 128, which is what vhost-user can address"
            )
        };
        for (guest, expected) in [
            (guest(0, &[Unspecified]), "a guest has at least one vCPU: give the number of its vCPUs".into()),
            (
                GuestRequest { max_queues: Some(0), ..guest(1, &[Unspecified]) },
                "max_queues is 0, but a card has at least one queue pair: give 1 or more, or no limit".into(),
            ),
            (guest(4, &[Queues(0)]), queues(0)),
            (guest(4, &[Queues(129)]), queues(129)),
            (guest(1, &[Queues(0)]), queues(0)),
        ] {
            assert_eq!(one(&guest), Err(expected), "{guest:?}");
        }
    }

    #[test]
    fn the_budget_takes_pairs_from_the_cards_that_do_not_insist() {
        // vCPUs, wishes, other vectors, budget; pairs of the cards, or the vectors needed.
        type Case = (
            u32,
            &'static [QueueRequest],
            u32,
            u32,
            Result<&'static [u16], &'static str>,
        );
        let table: [Case; 14] = [
            (4, &[], 0, 0, Ok(&[])),
            (4, &[Unspecified, Unspecified], 5, 200, Ok(&[4, 4])),
            (4, &[Unspecified, Unspecified], 5, 25, Ok(&[4, 4])),
            (4, &[Unspecified, Unspecified], 5, 24, Ok(&[4, 3])),
            (4, &[Unspecified, Unspecified], 5, 23, Ok(&[4, 3])),
            (4, &[Unspecified, Unspecified], 5, 22, Ok(&[3, 3])),
            (4, &[Unspecified, Unspecified], 5, 13, Ok(&[1, 1])),
            (
                4,
                &[Unspecified, Unspecified],
                5,
                12,
                Err("13 interrupt vectors (8 for its cards, 5 for other devices), but has 12"),
            ),
            (
                4,
                &[Unspecified],
                5,
                4,
                Err("9 interrupt vectors (4 for its cards, 5 for other devices), but has 4"),
            ),
            (4, &[Queues(4), Unspecified], 0, 14, Ok(&[4, 1])),
            (
                4,
                &[Queues(4), Unspecified],
                0,
                13,
                Err("14 interrupt vectors (14 for its cards, 0 for other devices), but has 13"),
            ),
            (
                4,
                &[Queues(4), Queues(4)],
                0,
                19,
                Err("20 interrupt vectors (20 for its cards, 0 for other devices), but has 19"),
            ),
            (
                32,
                &[
                    Unspecified,
                    QueueRequest::Throughput(Medium),
                    QueueRequest::Throughput(Low),
                ],
                33,
                126,
                Ok(&[26, 16, 1]),
            ),
            (128, &[Unspecified], 129, 200, Ok(&[34])),
        ];
        for (vcpus, queue_requests, other_vectors, budget, expected) in table {
            let guest = GuestRequest {
                other_vectors,
                budget,
                ..guest(vcpus, queue_requests)
            };
            match (plan_queues(&guest), expected) {
                (Ok(plan), Ok(pairs)) => {
                    let found: Vec<u16> = plan.cards.iter().map(|card| card.pairs).collect();
                    assert_eq!(found, pairs, "{guest:?}");
                    let cards: u32 = plan.cards.iter().map(|card| card.vectors).sum();
                    assert_eq!(plan.total_vectors, cards + other_vectors);
                    assert!(plan.total_vectors <= budget);
                }
                (Err(error), Err(words)) => {
                    assert_eq!(
                        error.to_string(),
                        format!(
                            "the guest needs {words}: ask for fewer queues or cards, or raise the budget"
                        )
                    );
                }
                (found, _) => panic!("{guest:?}: {found:?}, not {expected:?}"),
            }
        }
        let reduced = plan_queues(&GuestRequest {
            budget: 9,
            ..guest(4, &[Unspecified])
        })
        .unwrap();
        assert_eq!(
            reduced.cards[0].why,
            "one for each vCPU; 4 reduced to 3, so that all devices together need no more than 9 interrupt vectors"
        );
        let most = GuestRequest {
            other_vectors: u32::MAX,
            budget: u32::MAX,
            ..guest(4, &[Unspecified])
        };
        assert!(matches!(
            plan_queues(&most),
            Err(QueuesError::OverBudget { .. })
        ));
    }

    #[test]
    fn a_card_alone_has_its_share() {
        for (vcpus, throughput, cap, pairs) in [
            (4, High, 128, 4),
            (4, Medium, 128, 2),
            (4, Low, 128, 1),
            (200, High, 128, 128),
            (200, High, 500, 128),
            (8, High, 2, 2),
            (1, High, 128, 1),
        ] {
            let (found, why) = queue_pairs_for(vcpus, throughput, cap).unwrap();
            assert_eq!(found, pairs, "{vcpus} {throughput} {cap}: {why}");
            assert!(!why.is_empty());
        }
        assert_eq!(queue_pairs_for(0, High, 4), Err(QueuesError::NoVcpu));
        assert_eq!(queue_pairs_for(4, High, 0), Err(QueuesError::NoQueue));
    }
}
