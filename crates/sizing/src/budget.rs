//! The interrupt vectors of a guest, and the pairs that they allow.

/// Interrupt vectors that a guest's devices may use together, where nothing else
/// is said.
///
/// An x86 CPU has 256 vectors; exceptions take the first 32 and the kernel's own
/// interrupts (timer, IPIs) about the last 20, which leaves a little over 200 for
/// devices. Nova's blueprint warns of the same "~200 MSI vectors". Linux since
/// 4.15 hands them out for each CPU, so that a guest with many vCPUs can have
/// more; an older kernel, or one vCPU left alone when the others go offline,
/// cannot.
pub const MSIX_BUDGET: u32 = 200;

/// Vectors of a card with `pairs` queue pairs: two for each, one for the control
/// queue and one for changes of configuration.
#[must_use]
pub fn vectors_of(pairs: u16) -> u32 {
    u32::from(pairs) * 2 + 2
}

/// Takes pairs from the cards that are `reducible` until the vectors of all fit into
/// `available`, and none below one; false when they do not fit even so.
///
/// The card with the most pairs gives first, the last of several with as many.
pub(super) fn fit(pairs: &mut [u16], reducible: &[bool], available: u32) -> bool {
    while total(pairs) > u64::from(available) {
        let widest = pairs
            .iter_mut()
            .zip(reducible)
            .filter(|(pairs, reducible)| **reducible && **pairs > 1)
            .max_by_key(|(pairs, _)| **pairs);
        match widest {
            Some((pairs, _)) => *pairs -= 1,
            None => return false,
        }
    }
    true
}

/// Vectors of cards with these numbers of pairs.
pub(super) fn total(pairs: &[u16]) -> u64 {
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
    fn a_card_has_two_vectors_a_pair_and_two_more() {
        for (pairs, vectors) in [(1, 4), (2, 6), (4, 10), (128, 258)] {
            assert_eq!(vectors_of(pairs), vectors);
        }
    }

    #[test]
    fn the_widest_spare_card_gives_first() {
        // Pairs, reducible ones, available; pairs afterwards, or None where they do not fit.
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
        for (pairs, reducible, available, expected) in table {
            let mut fitted = pairs.to_vec();
            let fits = fit(&mut fitted, reducible, available);
            assert_eq!(
                fits.then_some(fitted.as_slice()),
                expected,
                "{pairs:?} into {available}"
            );
        }
        assert!(fit(&mut [], &[], 0), "no card needs no vector");
    }
}
