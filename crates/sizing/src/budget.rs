//! The interrupt vectors of a guest, and the queue pairs that they allow.

/// Interrupt vectors that all devices of a guest may use together, unless another number is given.
///
/// An x86 CPU has 256 vectors. Exceptions take the first 32 and the kernel's own interrupts (timer,
/// IPIs) about the last 20, which leaves a little over 200 for devices. Nova's blueprint warns of
/// the same "~200 MSI vectors". Since 4.15 Linux assigns vectors per CPU, so that a guest with many
/// vCPUs can have more; an older kernel cannot, nor can a guest whose vCPUs are all offline but
/// one.
pub const MSIX_BUDGET: u32 = 200;

/// Interrupt vectors of a network device with `pairs` queue pairs: two for each pair, one for the
/// control virtqueue and one for changes of the configuration.
#[must_use]
pub fn vectors_of(pairs: u16) -> u32 {
    u32::from(pairs) * 2 + 2
}

/// Reduces the queue pairs of the network devices that `can_shrink` until the vectors of all
/// devices fit into `available`. Each device keeps at least one queue pair. Returns whether the
/// vectors fit.
///
/// Each step takes one queue pair from the device that has the most; of several that have the most,
/// from the last.
pub(crate) fn reduce_to_fit(pairs: &mut [u16], can_shrink: &[bool], available: u32) -> bool {
    while total_vectors(pairs) > u64::from(available) {
        let largest = pairs
            .iter_mut()
            .zip(can_shrink)
            .filter(|(pairs, can_shrink)| **can_shrink && **pairs > 1)
            .max_by_key(|(pairs, _)| **pairs);
        match largest {
            Some((pairs, _)) => *pairs -= 1,
            None => return false,
        }
    }
    true
}

/// Interrupt vectors of all network devices together, whose numbers of queue pairs are `pairs`.
pub(crate) fn total_vectors(pairs: &[u16]) -> u64 {
    pairs
        .iter()
        .map(|&pairs| u64::from(vectors_of(pairs)))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const YES: bool = true;
    const NO: bool = false;

    #[test]
    fn net_device_has_two_vectors_for_each_pair_and_two_more() {
        for (pairs, vectors) in [(1, 4), (2, 6), (4, 10), (128, 258)] {
            assert_eq!(vectors_of(pairs), vectors);
        }
    }

    #[test]
    fn net_device_with_the_most_pairs_shrinks_first() {
        // Pairs, which devices can shrink, available; pairs afterwards, or None where they do not
        // fit.
        type Case = (&'static [u16], &'static [bool], u32, Option<&'static [u16]>);
        let table: [Case; 9] = [
            (&[4], &[YES], 10, Some(&[4])),
            (&[4], &[YES], 9, Some(&[3])),
            (&[4], &[YES], 4, Some(&[1])),
            (&[4], &[YES], 3, None),
            (&[4, 4], &[YES, YES], 18, Some(&[4, 3])),
            (&[4, 4], &[YES, YES], 16, Some(&[3, 3])),
            (&[8, 2, 4], &[YES, YES, YES], 26, Some(&[4, 2, 4])),
            (&[8, 4], &[NO, YES], 22, Some(&[8, 1])),
            (&[8, 4], &[NO, NO], 22, None),
        ];
        for (pairs, can_shrink, available, expected) in table {
            let mut fitted = pairs.to_vec();
            let fits = reduce_to_fit(&mut fitted, can_shrink, available);
            assert_eq!(
                fits.then_some(fitted.as_slice()),
                expected,
                "{pairs:?} into {available}"
            );
        }
        assert!(
            reduce_to_fit(&mut [], &[], 0),
            "a guest without network devices needs no vector"
        );
    }
}
