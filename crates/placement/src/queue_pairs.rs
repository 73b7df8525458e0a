//! Which vCPUs Linux's virtio-net driver assigns to a queue pair.
//!
//! This is the rule of `virtnet_set_affinity` (drivers/net/virtio_net.c, the same since 4.19 apart
//! from details). Each pair in use gets `cpus / pairs` CPUs but at least one, and the first `cpus %
//! pairs` pairs get one more. The CPUs are assigned in order from the first online CPU, starting
//! again where there are more pairs than CPUs. The driver sets the affinity of both interrupts and
//! the transmit steering (XPS) to that group, so a frame that one of these CPUs sends uses that
//! pair.

/// The positions, among the guest's online CPUs, of the vCPUs that `pair` serves.
///
/// `pairs` is the number of pairs that the driver uses, `vcpus` the number of its online CPUs. For
/// a pair beyond `pairs` the result is that of a driver that uses this pair too, so that its worker
/// is placed before the driver needs it. Empty only when `vcpus` is 0.
#[must_use]
pub fn vcpus_of_queue_pair(pair: u32, pairs: u32, vcpus: u32) -> Vec<u32> {
    if vcpus == 0 {
        return Vec::new();
    }
    let pairs = pairs.max(pair.saturating_add(1));
    let stride = (vcpus / pairs).max(1);
    let larger = if vcpus >= pairs { vcpus % pairs } else { 0 };
    let size = stride + u32::from(pair < larger);
    let first = u64::from(pair) * u64::from(stride) + u64::from(pair.min(larger));
    (first..first + u64::from(size))
        .filter_map(|position| u32::try_from(position % u64::from(vcpus)).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_are_assigned_as_the_driver_does() {
        let table: [(u32, u32, &[&[u32]]); 10] = [
            (4, 4, &[&[0], &[1], &[2], &[3]]),
            (4, 2, &[&[0, 1], &[2, 3]]),
            (4, 3, &[&[0, 1], &[2], &[3]]),
            (4, 1, &[&[0, 1, 2, 3]]),
            (2, 4, &[&[0], &[1], &[0], &[1]]),
            (6, 4, &[&[0, 1], &[2, 3], &[4], &[5]]),
            (3, 8, &[&[0], &[1], &[2], &[0], &[1], &[2], &[0], &[1]]),
            (8, 3, &[&[0, 1, 2], &[3, 4, 5], &[6, 7]]),
            (1, 2, &[&[0], &[0]]),
            (1, 1, &[&[0]]),
        ];
        for (vcpus, pairs, groups) in table {
            for (pair, group) in (0..).zip(groups) {
                assert_eq!(
                    &vcpus_of_queue_pair(pair, pairs, vcpus),
                    group,
                    "{vcpus} vCPUs, pair {pair} of {pairs}"
                );
            }
        }
    }

    /// The rule as the driver implements it: one pass over the CPUs, pair by pair.
    #[test]
    fn formula_agrees_with_the_drivers_loop() {
        for vcpus in 1..=33u32 {
            for pairs in 1..=40u32 {
                let mut next_cpus = (0..vcpus).cycle();
                for pair in 0..pairs {
                    let extra = usize::from(vcpus >= pairs && pair < vcpus % pairs);
                    let size = usize::try_from((vcpus / pairs).max(1)).unwrap() + extra;
                    let group: Vec<_> = next_cpus.by_ref().take(size).collect();
                    assert_eq!(
                        vcpus_of_queue_pair(pair, pairs, vcpus),
                        group,
                        "{vcpus} vCPUs, pair {pair} of {pairs}"
                    );
                }
            }
        }
    }

    #[test]
    fn numbers_out_of_the_usual_range_give_a_result() {
        assert!(vcpus_of_queue_pair(0, 1, 0).is_empty());
        assert_eq!(
            vcpus_of_queue_pair(0, 0, 2),
            [0, 1],
            "the driver has not set a number of pairs yet"
        );
        assert_eq!(
            vcpus_of_queue_pair(3, 1, 4),
            [3],
            "a pair that is not in use yet"
        );
        assert_eq!(vcpus_of_queue_pair(u32::MAX, u32::MAX, 3), [0]);
    }
}
