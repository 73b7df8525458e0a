//! Tests of each rule of the policy, with its limits, errors and reasons.

use super::*;

use QueueRequest::{Queues, Unspecified};
use Throughput::{High, Low, Medium};

const ON: Option<bool> = Some(true);
const OFF: Option<bool> = Some(false);

fn guest(vcpus: u32, queue_requests: &[QueueRequest]) -> GuestRequest {
    let net_device = |(at, queue_request): (usize, &QueueRequest)| NetDeviceRequest {
        name: format!("net{at}"),
        queue_request: *queue_request,
    };
    GuestRequest {
        vcpus,
        net_devices: queue_requests.iter().enumerate().map(net_device).collect(),
        ..GuestRequest::default()
    }
}

/// The queue pairs of the only network device and their reason, or the text of the error.
fn plan_one(guest: &GuestRequest) -> Result<(u16, String), String> {
    let mut plan = plan_queues(guest).map_err(|why| why.to_string())?;
    let net_device = plan.net_devices.pop().unwrap();
    assert_eq!(net_device.vectors, vectors_of(net_device.pairs));
    assert_eq!(plan.total_vectors, net_device.vectors + guest.other_vectors);
    Ok((net_device.pairs, net_device.why))
}

#[test]
fn image_and_flavor_turn_multiqueue_on_and_off_as_nova_does() {
    let each = "one for each vCPU, as multiqueue is on by ";
    let off = "multiqueue is off by ";
    let unset = "neither image nor flavor turns multiqueue on, so it is off, as in Nova";
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
    ] {
        let guest = GuestRequest {
            image,
            flavor,
            multiqueue_default: MultiqueueDefault::Off,
            ..guest(vcpus, &[Unspecified])
        };
        assert_eq!(plan_one(&guest), expected, "{guest:?}");
        // The default matters only where neither image nor flavor is set.
        let without_nova = plan_one(&GuestRequest {
            multiqueue_default: MultiqueueDefault::On,
            ..guest.clone()
        });
        match (vcpus, image, flavor) {
            (4, None, None) => assert_eq!(without_nova, Ok((4, "one for each vCPU".into()))),
            _ => assert_eq!(without_nova, expected, "{guest:?}"),
        }
    }
}

#[test]
fn guest_with_one_vcpu_has_one_queue_pair_even_where_image_and_flavor_conflict() {
    for image in [None, ON, OFF] {
        for flavor in [None, ON, OFF] {
            for multiqueue_default in [MultiqueueDefault::On, MultiqueueDefault::Off] {
                let guest = GuestRequest {
                    image,
                    flavor,
                    multiqueue_default,
                    ..guest(1, &[Unspecified])
                };
                let expected = (1, "a guest with one vCPU has no use for more".into());
                assert_eq!(plan_one(&guest), Ok(expected), "{guest:?}");
            }
        }
    }
}

#[test]
fn request_for_a_device_counts_within_the_limits() {
    let most = "vCPUs, as more queue pairs cost memory and interrupts without any use";
    // vCPUs, limit, request; pairs, reason.
    let table: [(u32, Option<u16>, QueueRequest, u16, String); 22] = [
        (4, None, Unspecified, 4, "one for each vCPU".into()),
        (4, Some(4), Unspecified, 4, "one for each vCPU".into()),
        (4, Some(3), Unspecified, 3, "one for each vCPU; limited to the 3 that max_queues allows".into()),
        (4, Some(1), Unspecified, 1, "one for each vCPU; limited to the 1 that max_queues allows".into()),
        (4, Some(500), Unspecified, 4, "one for each vCPU".into()),
        (128, None, Unspecified, 128, "one for each vCPU".into()),
        (129, None, Unspecified, 128, "one for each vCPU; limited to the 128 that vhost-user can address".into()),
        (u32::MAX, Some(500), Unspecified, 128, "one for each vCPU; limited to the 128 that vhost-user can address".into()),
        (4, None, Queues(1), 1, "queues=1 asks for this number".into()),
        (4, None, Queues(3), 3, "queues=3 asks for this number".into()),
        (4, None, Queues(4), 4, "queues=4 asks for this number".into()),
        (4, None, Queues(8), 4, format!("queues=8 asks for this number; limited to the 4 {most}")),
        (8, Some(2), Queues(4), 2, "queues=4 asks for this number; limited to the 2 that max_queues allows".into()),
        (1, None, Queues(4), 1, "a guest with one vCPU has no use for more".into()),
        (4, None, QueueRequest::Throughput(High), 4, "one for each vCPU, as throughput=high asks for".into()),
        (4, None, QueueRequest::Throughput(Medium), 2, "one for every two vCPUs, as throughput=medium asks for".into()),
        (3, None, QueueRequest::Throughput(Medium), 2, "one for every two vCPUs, as throughput=medium asks for".into()),
        (2, None, QueueRequest::Throughput(Medium), 1, "one for every two vCPUs, as throughput=medium asks for".into()),
        (4, None, QueueRequest::Throughput(Low), 1, "one, as throughput=low asks for".into()),
        (8, Some(4), QueueRequest::Throughput(Medium), 4, "one for every two vCPUs, as throughput=medium asks for".into()),
        (8, Some(3), QueueRequest::Throughput(High), 3, "one for each vCPU, as throughput=high asks for; limited to the 3 that max_queues allows".into()),
        (1, None, QueueRequest::Throughput(High), 1, "a guest with one vCPU has no use for more".into()),
    ];
    for (vcpus, max_queues, queue_request, pairs, why) in table {
        let guest = GuestRequest {
            max_queues,
            budget: 1000,
            ..guest(vcpus, &[queue_request])
        };
        assert_eq!(plan_one(&guest), Ok((pairs, why)), "{guest:?}");
        // Neither multiqueue turned on nor Nova's default changes what a request gives.
        for (image, multiqueue_default) in
            [(ON, MultiqueueDefault::Off), (None, MultiqueueDefault::Off)]
        {
            let guest = GuestRequest {
                image,
                multiqueue_default,
                ..guest.clone()
            };
            if queue_request != Unspecified {
                assert_eq!(plan_one(&guest).unwrap().0, pairs, "{guest:?}");
            }
        }
    }
}

#[test]
fn request_that_contradicts_image_or_flavor_is_refused() {
    let off = "multiqueue is off by";
    let image = "hw_vif_multiqueue_enabled=false (image)";
    let flavor = "hw:vif_multiqueue_enabled=false (flavor)";
    let both = format!("{image} and {flavor}");
    let (high, medium, low) = (
        QueueRequest::Throughput(High),
        QueueRequest::Throughput(Medium),
        QueueRequest::Throughput(Low),
    );
    for (queue_request, (image, flavor), expected) in [
        (Queues(2), (OFF, None), Err(("queues=2", image))),
        (Queues(2), (None, OFF), Err(("queues=2", flavor))),
        (Queues(2), (OFF, OFF), Err(("queues=2", both.as_str()))),
        (high, (OFF, None), Err(("throughput=high", image))),
        (medium, (None, OFF), Err(("throughput=medium", flavor))),
        (Queues(1), (OFF, None), Ok(1)),
        (low, (OFF, None), Ok(1)),
    ] {
        let guest = GuestRequest {
            image,
            flavor,
            ..guest(4, &[queue_request])
        };
        let expected = expected.map_err(|(request, settings)| {
            format!(
                "network device net0 asks for {request}, but {off} {settings}: leave one of them out"
            )
        });
        assert_eq!(
            plan_one(&guest).map(|(pairs, _)| pairs),
            expected,
            "{guest:?}"
        );
        // A request that gives one queue pair contradicts neither image nor flavor.
        for single in [
            GuestRequest {
                vcpus: 1,
                ..guest.clone()
            },
            GuestRequest {
                max_queues: Some(1),
                ..guest.clone()
            },
        ] {
            assert_eq!(
                plan_one(&single).map(|(pairs, _)| pairs),
                Ok(1),
                "{single:?}"
            );
        }
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    let queues = |n| {
        format!(
            "network device net0 asks for queues={n}: write 1 to 128, which is what vhost-user can address"
        )
    };
    for (guest, expected) in [
        (guest(0, &[Unspecified]), "a guest has at least one vCPU: give the number of its vCPUs".into()),
        (
            GuestRequest { max_queues: Some(0), ..guest(1, &[Unspecified]) },
            "max_queues is 0, but a network device has at least one queue pair: give 1 or more, or no limit".into(),
        ),
        (guest(4, &[Queues(0)]), queues(0)),
        (guest(4, &[Queues(129)]), queues(129)),
        (guest(1, &[Queues(0)]), queues(0)),
    ] {
        assert_eq!(plan_one(&guest), Err(expected), "{guest:?}");
    }
}

/// vCPUs, requests, other vectors and budget; the queue pairs of the devices, or the vectors that
/// the error reports.
type BudgetCase = (
    u32,
    &'static [QueueRequest],
    u32,
    u32,
    Result<&'static [u16], &'static str>,
);

const BUDGETS: [BudgetCase; 14] = [
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
        Err("13 interrupt vectors (8 for its network devices, 5 for other devices), but has 12"),
    ),
    (
        4,
        &[Unspecified],
        5,
        4,
        Err("9 interrupt vectors (4 for its network devices, 5 for other devices), but has 4"),
    ),
    (4, &[Queues(4), Unspecified], 0, 14, Ok(&[4, 1])),
    (
        4,
        &[Queues(4), Unspecified],
        0,
        13,
        Err("14 interrupt vectors (14 for its network devices, 0 for other devices), but has 13"),
    ),
    (
        4,
        &[Queues(4), Queues(4)],
        0,
        19,
        Err("20 interrupt vectors (20 for its network devices, 0 for other devices), but has 19"),
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

#[test]
fn budget_takes_pairs_from_devices_without_requested_number() {
    for (vcpus, queue_requests, other_vectors, budget, expected) in BUDGETS {
        let guest = GuestRequest {
            other_vectors,
            budget,
            ..guest(vcpus, queue_requests)
        };
        match (plan_queues(&guest), expected) {
            (Ok(plan), Ok(pairs)) => {
                let found: Vec<u16> = plan.net_devices.iter().map(|device| device.pairs).collect();
                assert_eq!(found, pairs, "{guest:?}");
                let vectors: u32 = plan.net_devices.iter().map(|device| device.vectors).sum();
                assert_eq!(plan.total_vectors, vectors + other_vectors);
                assert!(plan.total_vectors <= budget);
            }
            (Err(error), Err(words)) => {
                assert_eq!(
                    error.to_string(),
                    format!(
                        "the guest needs {words}: ask for fewer queues or network devices, or raise the budget"
                    )
                );
            }
            (found, _) => panic!("{guest:?}: {found:?}, not {expected:?}"),
        }
    }
}

#[test]
fn reason_names_a_reduction_and_a_budget_below_the_other_vectors_is_an_error() {
    let reduced = plan_queues(&GuestRequest {
        budget: 9,
        ..guest(4, &[Unspecified])
    })
    .unwrap();
    assert_eq!(
        reduced.net_devices[0].why,
        "one for each vCPU; reduced from 4 to 3, so that all devices together need at most 9 interrupt vectors"
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
fn one_device_alone_gets_its_share_of_the_vcpus() {
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
