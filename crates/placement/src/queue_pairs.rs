//! Which vCPUs Linux's virtio-net driver gives to a queue pair.
//!
//! The rule of `virtnet_set_affinity` (drivers/net/virtio_net.c, unchanged in
//! substance since 4.19): each pair in use gets `cpus / pairs` CPUs but at least
//! one, the first `cpus % pairs` pairs one more, dealt out in order from the
//! first online CPU and wrapping when there are more pairs than CPUs. The
//! driver sets both interrupts' affinity and the transmit steering (XPS) to that
//! group, so a frame sent on one of those CPUs leaves by that pair.

/// Positions, among the guest's online CPUs, of the vCPUs served by `pair`.
///
/// `pairs` is the number of pairs the driver uses, `vcpus` the number of its
/// online CPUs. A pair beyond `pairs` is answered as if the driver used as many
/// as that one takes, so that its worker has a place before it is needed.
/// Empty only when `vcpus` is 0.
#[must_use]
pub fn vcpus_of_queue_pair(pair: u32, pairs: u32, vcpus: u32) -> Vec<u32> {
    if vcpus == 0 {
        return Vec::new();
    }
    let pairs = pairs.max(pair.saturating_add(1));
    let stride = (vcpus / pairs).max(1);
    let stragglers = if vcpus >= pairs { vcpus % pairs } else { 0 };
    let size = stride + u32::from(pair < stragglers);
    let first = u64::from(pair) * u64::from(stride) + u64::from(pair.min(stragglers));
    (first..first + u64::from(size))
        .filter_map(|position| u32::try_from(position % u64::from(vcpus)).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deals_vcpus_as_the_driver_does() {
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

    /// The rule told as the driver runs it: one walk over the CPUs, pair by pair.
    #[test]
    fn agrees_with_one_walk_over_the_cpus() {
        for vcpus in 1..=33u32 {
            for pairs in 1..=40u32 {
                let mut walk = (0..vcpus).cycle();
                for pair in 0..pairs {
                    let extra = usize::from(vcpus >= pairs && pair < vcpus % pairs);
                    let size = usize::try_from((vcpus / pairs).max(1)).unwrap() + extra;
                    let group: Vec<_> = walk.by_ref().take(size).collect();
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
    fn answers_for_odd_numbers_too() {
        assert!(vcpus_of_queue_pair(0, 1, 0).is_empty());
        assert_eq!(vcpus_of_queue_pair(0, 0, 2), [0, 1], "no pair counted yet");
        assert_eq!(
            vcpus_of_queue_pair(3, 1, 4),
            [3],
            "a pair that is not in use yet"
        );
        assert_eq!(vcpus_of_queue_pair(u32::MAX, u32::MAX, 3), [0]);
    }
}
