//! Frames of a burst as the bits of a mask, so that nothing is copied to sort them.

use std::ops::Range;

use arrayvec::ArrayVec;
use virtionet_virtio_net::uplink::MAX_BURST;

/// The masks have a bit for each frame.
const _: () = assert!(MAX_BURST == 64);

/// Frames by a number: of their port, of their pair.
#[derive(Debug, Default)]
pub(super) struct FrameGroups(ArrayVec<(u16, u64), MAX_BURST>);

impl FrameGroups {
    /// Each frame is added once, so there is room.
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

    /// All numbers and their frames, in the order of their first.
    #[inline(always)]
    pub(super) fn iter(&self) -> impl Iterator<Item = (u16, u64)> {
        self.0.iter().copied()
    }

    /// Those of one number.
    pub(super) fn of(&self, number: u16) -> u64 {
        let found = self.0.iter().find(|(other, _)| *other == number);
        found.map_or(0, |(_, mask)| *mask)
    }
}

/// A mask of the first `len` frames.
#[inline(always)]
pub(super) fn low_mask(len: usize) -> u64 {
    match len {
        0 => 0,
        1..64 => (1 << len) - 1,
        _ => u64::MAX,
    }
}

/// The numbers of the bits in `mask`, from the lowest.
#[inline(always)]
pub(super) fn iter_bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let n = usize::try_from(mask.trailing_zeros()).ok()?;
        mask &= mask.wrapping_sub(1);
        (n < MAX_BURST).then_some(n)
    })
}

/// The frames in `mask`, where they follow each other.
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
    fn masks_are_read_as_they_are_made() {
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
    fn groups_hold_a_number_for_each_frame() {
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
