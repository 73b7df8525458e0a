//! The table against a model that knows each address, and the list of misses.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;

use super::*;

fn translation(first: u64, size: u64, user_addr: u64, access: Access) -> Translation {
    Translation {
        range: IovaRange::new(first, size).unwrap(),
        user_addr,
        access,
    }
}

fn table() -> Iotlb {
    Iotlb::new(|| ())
}

#[test]
fn range_that_is_empty_or_wraps_does_not_exist() {
    assert_eq!(IovaRange::new(5, 0), None);
    assert_eq!(IovaRange::new(u64::MAX, 2), None);
    assert_eq!(IovaRange::new(2, u64::MAX), None);
    let last = IovaRange::new(u64::MAX, 1).unwrap();
    assert!(last.contains(u64::MAX) && last.overlaps(IovaRange::ALL));
    assert!(!last.overlaps(IovaRange::new(0, u64::MAX).unwrap()));
}

#[test]
fn translation_that_does_not_permit_the_access_is_not_found() {
    let iotlb = table();
    iotlb.update(translation(0, 4096, 0, Access::Read));
    iotlb.update(translation(4096, 4096, 0, Access::Write));
    iotlb.update(translation(8192, 4096, 0, Access::ReadWrite));
    for (addr, wanted) in [
        (0, [true, false, false]),
        (4096, [false, true, false]),
        (8192, [true, true, true]),
        (12288, [false, false, false]),
    ] {
        let found = [Access::Read, Access::Write, Access::ReadWrite]
            .map(|access| iotlb.find(addr, access).is_some());
        assert_eq!(found, wanted, "{addr:#x}");
    }
}

#[test]
fn permission_has_the_number_of_the_protocol() {
    for number in 1..=3 {
        assert_eq!(Access::from_number(number).unwrap().to_number(), number);
    }
    for number in [0, 4, 255] {
        assert_eq!(Access::from_number(number), None);
    }
}

#[test]
fn update_that_contradicts_an_earlier_one_replaces_it() {
    let iotlb = table();
    let update =
        |first, size, user_addr, access| iotlb.update(translation(first, size, user_addr, access));
    let rw = Access::ReadWrite;
    assert_eq!(update(0x1000, 0x3000, 0x9000, rw), UpdateEffect::Added);
    // The same again, a part of it, and one that also covers it.
    assert_eq!(update(0x1000, 0x3000, 0x9000, rw), UpdateEffect::Added);
    assert_eq!(update(0x2000, 0x1000, 0xa000, rw), UpdateEffect::Added);
    assert_eq!(update(0, 0x8000, 0x8000, rw), UpdateEffect::Added);
    // Another address, and another permission.
    assert_eq!(update(0x2000, 0x1000, 0xb000, rw), UpdateEffect::Replaced);
    assert_eq!(
        update(0x2000, 0x1000, 0xb000, Access::Read),
        UpdateEffect::Replaced
    );
    assert_eq!(iotlb.find(0x1000, rw), None);
    assert_eq!(iotlb.counts().entries, 1);
    assert_eq!(iotlb.counts().updates, 6);
}

#[test]
fn endless_updates_keep_a_bounded_number_of_translations() {
    let iotlb = table();
    let count = 3 * u64::try_from(MAX_TRANSLATIONS).unwrap();
    for n in 0..count {
        // From the highest address down, and up again.
        let page = if n % 2 == 0 { n } else { count * 2 - n };
        iotlb.update(translation(page * 4096, 4096, 0, Access::Read));
        assert!(iotlb.find(page * 4096, Access::Read).is_some());
        assert!(iotlb.counts().entries <= MAX_TRANSLATIONS);
    }
    assert_eq!(iotlb.counts().entries, MAX_TRANSLATIONS);
    iotlb.invalidate(IovaRange::ALL);
    assert_eq!(iotlb.counts().entries, 0);
}

#[test]
fn miss_is_sent_once_until_it_is_answered() {
    let calls = Arc::new(AtomicUsize::new(0));
    let iotlb = {
        let calls = Arc::clone(&calls);
        Iotlb::new(move || {
            calls.fetch_add(1, Ordering::Relaxed);
        })
    };
    let miss = |iova, access| Miss { iova, access };
    iotlb.report_miss(0x1008, Access::Read);
    iotlb.report_miss(0x1fff, Access::Read);
    iotlb.report_miss(0x1000, Access::Write);
    let wanted = [miss(0x1000, Access::Read), miss(0x1000, Access::Write)];
    assert_eq!(iotlb.take_misses(), wanted);
    iotlb.report_miss(0x1000, Access::Read);
    assert_eq!(iotlb.take_misses(), []);
    assert_eq!(calls.load(Ordering::Relaxed), 2);
    // The answer does not permit writing, so that miss stays.
    iotlb.update(translation(0x1000, 0x1000, 0, Access::Read));
    iotlb.report_miss(0x1000, Access::Write);
    assert_eq!(iotlb.take_misses(), []);
    iotlb.report_miss(0x1000, Access::Read);
    assert_eq!(iotlb.take_misses(), wanted[..1]);
    assert_eq!(iotlb.counts().misses, 3);
}

#[test]
fn misses_that_are_never_answered_are_bounded_and_expire() {
    let iotlb = table();
    let report_all = || {
        for page in 0..1000 {
            iotlb.report_miss(page * IOVA_PAGE, Access::Read);
        }
    };
    report_all();
    assert!(iotlb.expects_answers());
    assert_eq!(iotlb.take_misses().len(), MAX_PENDING_MISSES);
    report_all();
    assert_eq!(iotlb.take_misses(), []);
    let long_ago = Instant::now().checked_sub(MISS_LIFETIME).unwrap();
    for pending in iotlb.lock_misses().iter_mut() {
        pending.state = MissState::Sent(long_ago);
    }
    assert!(!iotlb.expects_answers());
    report_all();
    assert_eq!(iotlb.take_misses().len(), MAX_PENDING_MISSES);
}

const ADDRESSES: u64 = 64;

#[derive(Debug, Clone)]
enum Step {
    Update(u64, u64, u64, Access),
    Invalidate(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let access = prop_oneof![
        Just(Access::Read),
        Just(Access::Write),
        Just(Access::ReadWrite)
    ];
    let range = (0..ADDRESSES, 1..16u64);
    prop_oneof![
        (range.clone(), 0..1000u64, access)
            .prop_map(|((first, size), user, access)| Step::Update(first, size, user, access)),
        range.prop_map(|(first, size)| Step::Invalidate(first, size)),
    ]
}

proptest! {
    /// What is found is what the front-end said last, and nothing that it has taken back.
    #[test]
    fn table_never_contradicts_the_front_end(steps in prop::collection::vec(step(), 1..80)) {
        let iotlb = table();
        let mut model: HashMap<u64, (u64, Access)> = HashMap::new();
        for step in steps {
            match step {
                Step::Update(first, size, user, access) => {
                    let contradicts = (0..size).any(|n| {
                        model.get(&(first + n)).is_some_and(|old| *old != (user + n, access))
                    });
                    let effect = iotlb.update(translation(first, size, user, access));
                    if contradicts {
                        // It may also be replaced without: the model keeps what the table drops.
                        for n in 0..size {
                            model.remove(&(first + n));
                        }
                    }
                    prop_assert!(effect == UpdateEffect::Added || contradicts);
                    for n in 0..size {
                        model.insert(first + n, (user + n, access));
                        let found = iotlb.find(first + n, access).unwrap();
                        prop_assert_eq!(found.user_addr + first + n - found.start(), user + n);
                    }
                }
                Step::Invalidate(first, size) => {
                    iotlb.invalidate(IovaRange::new(first, size).unwrap());
                    model.retain(|addr, _| !(first..first + size).contains(addr));
                }
            }
            for addr in 0..2 * ADDRESSES {
                for access in [Access::Read, Access::Write] {
                    let Some(found) = iotlb.find(addr, access) else { continue };
                    let (user, permitted) = model[&addr];
                    prop_assert!(permitted.permits(access));
                    prop_assert_eq!(found.user_addr + addr - found.start(), user);
                }
            }
        }
    }
}
