//! Sets of the frames of a burst as bit masks, so that frames are sorted without being copied.

use std::ops::Range;

use arrayvec::ArrayVec;
use virtionet_virtio_net::uplink::MAX_BURST;

/// A mask has a bit for each frame of a burst.
const _: () = assert!(MAX_BURST == 64);

/// The frames of each number: of a port, or of a queue pair.
#[derive(Debug, Default)]
pub(super) struct FrameGroups(ArrayVec<(u16, u64), MAX_BURST>);

impl FrameGroups {
    /// Adds the mask `frames` to a number. Each frame is added once, so the list cannot be full.
    #[inline(always)]
    pub(super) fn add(&mut self, number: u16, frames: u64) {
        if frames == 0 {
            return;
        }
        match self.0.iter_mut().find(|(other, _)| *other == number) {
            Some((_, mask)) => *mask |= frames,
            None => {
                let _ = self.0.try_push((number, frames));
            }
        }
    }

    /// All numbers with the masks of their frames, in the order in which they were first added.
    #[inline(always)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (u16, u64)> {
        self.0.iter().copied()
    }

    /// The mask of the frames of one number.
    pub(super) fn of(&self, number: u16) -> u64 {
        let found = self.0.iter().find(|(other, _)| *other == number);
        found.map_or(0, |(_, mask)| *mask)
    }
}

/// The mask of the first `len` frames.
#[inline(always)]
pub(super) fn low_mask(len: usize) -> u64 {
    match len {
        0 => 0,
        1..64 => (1 << len) - 1,
        _ => u64::MAX,
    }
}

/// The indices of the bits that are set in `mask`, from the lowest on.
#[inline(always)]
pub(super) fn iter_bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let n = usize::try_from(mask.trailing_zeros()).ok()?;
        mask &= mask.wrapping_sub(1);
        (n < MAX_BURST).then_some(n)
    })
}

/// The range of the frames in `mask`, where they are consecutive.
#[inline(always)]
pub(super) fn contiguous_range(mask: u64) -> Option<Range<usize>> {
    let start = usize::try_from(mask.trailing_zeros()).ok()?;
    let len = usize::try_from(mask.count_ones()).ok()?;
    (mask != 0 && mask >> start == low_mask(len)).then_some(start..start + len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_and_ranges_of_a_mask_are_those_that_were_set() {
        for len in 0..=64 {
            assert_eq!(low_mask(len).count_ones(), u32::try_from(len).unwrap());
            assert!(iter_bits(low_mask(len)).eq(0..len));
            for start in 0..=64 - len {
                let mask = low_mask(len).checked_shl(u32::try_from(start).unwrap());
                let whole = (len > 0).then_some(start..start + len);
                assert_eq!(
                    contiguous_range(mask.unwrap_or(0)),
                    whole,
                    "{len} from {start}"
                );
            }
        }
        assert!(iter_bits(1 << 63 | 0b1010).eq([1, 3, 63]));
        assert_eq!(contiguous_range(0b101), None);
        assert_eq!(contiguous_range(1 << 63 | 1), None);
    }

    #[test]
    fn groups_can_hold_a_different_number_for_each_frame() {
        let mut groups = FrameGroups::default();
        for n in 0..64 {
            groups.add(n % 63, 1 << n);
        }
        groups.add(7, 0);
        assert_eq!(groups.iter().count(), 63);
        assert_eq!((groups.of(0), groups.of(5)), (1 | 1 << 63, 1 << 5));
        assert_eq!(groups.of(99), 0);
        let every = groups.iter().fold(0, |all, (_, mask)| all | mask);
        assert_eq!(every, u64::MAX);
    }
}
