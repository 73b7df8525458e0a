//! Positions in the descriptor ring of a packed virtqueue.

use crate::constants::VRING_PACKED_EVENT_F_WRAP_CTR;

/// A position in the descriptor ring: a descriptor and the wrap counter that is valid there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingPosition {
    pub(super) index: u16,
    pub(super) wrap: bool,
}

impl RingPosition {
    /// Reads the form of SET_VRING_BASE and of `off_wrap`. Returns `None` when the index is outside
    /// the ring.
    pub(super) fn from_word(word: u16, size: u16) -> Option<Self> {
        let index = word & !VRING_PACKED_EVENT_F_WRAP_CTR;
        (index < size).then_some(Self {
            index,
            wrap: word & VRING_PACKED_EVENT_F_WRAP_CTR != 0,
        })
    }

    /// Converts to the form of SET_VRING_BASE and of `off_wrap`.
    pub(super) fn to_word(self) -> u16 {
        self.index
            | if self.wrap {
                VRING_PACKED_EVENT_F_WRAP_CTR
            } else {
                0
            }
    }

    /// The position `n` descriptors later. `n` is at most the size, which is at most 32,768.
    #[inline(always)]
    pub(super) fn after(self, n: u16, size: u16) -> Self {
        let index = self.index + n;
        if index < size {
            Self { index, ..self }
        } else {
            Self {
                index: index - size,
                wrap: !self.wrap,
            }
        }
    }

    /// Number of descriptors from `earlier` to here, at most the size.
    #[inline(always)]
    pub(super) fn since(self, earlier: Self, size: u16) -> u16 {
        if self.wrap == earlier.wrap {
            self.index.saturating_sub(earlier.index)
        } else {
            size - earlier.index.saturating_sub(self.index)
        }
    }

    /// The position `n` descriptors earlier. `n` is at most the size.
    pub(super) fn before(self, n: u16, size: u16) -> Self {
        if n <= self.index {
            Self {
                index: self.index - n,
                ..self
            }
        } else {
            Self {
                index: self.index + (size - n),
                wrap: !self.wrap,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_position_moved_by_n_and_back_is_unchanged() {
        for size in [1, 3, 256, 32_768] {
            let mut position = RingPosition {
                index: 0,
                wrap: true,
            };
            for n in [1, size, size / 2 + 1] {
                let later = position.after(n, size);
                assert_eq!(later.before(n, size), position, "{n} of {size}");
                assert_eq!(later.since(position, size), n, "{n} of {size}");
                assert_eq!(later.since(later, size), 0);
                position = later;
            }
        }
        assert_eq!(
            RingPosition::from_word(0x8003, 4),
            Some(RingPosition {
                index: 3,
                wrap: true
            })
        );
        assert_eq!(RingPosition::from_word(4, 4), None);
    }
}
