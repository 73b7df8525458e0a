//! Numbered frames, and what became of them.

use std::collections::BTreeSet;

/// The size of the payload of a numbered frame in bytes.
pub const PAYLOAD_LEN: usize = 16;
/// What the payload begins with, so that other frames of a network are not taken for it.
const MAGIC: u32 = 0x5e9c_0de5;

/// The payload of frame `number` of flow `flow`.
#[must_use]
pub fn payload(flow: u32, number: u64) -> [u8; PAYLOAD_LEN] {
    let mut bytes = [0; PAYLOAD_LEN];
    bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&flow.to_be_bytes());
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// The flow and the number of a frame with this payload; `None` for any other.
#[must_use]
pub fn parse(payload: &[u8]) -> Option<(usize, u64)> {
    let word = |at: usize| -> Option<u32> {
        let bytes = payload.get(at..at + 4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    let number: [u8; 8] = payload.get(8..PAYLOAD_LEN)?.try_into().ok()?;
    let flow = usize::try_from(word(4)?).ok()?;
    (word(0)? == MAGIC).then_some((flow, u64::from_be_bytes(number)))
}

/// The numbers that have arrived of one flow.
#[derive(Clone, Debug, Default)]
pub struct SequenceCheck {
    /// The number behind the highest one that arrived.
    next: u64,
    /// The numbers below `next` that have not arrived.
    missing: BTreeSet<u64>,
    /// Frames that arrived, each counted once.
    pub received: u64,
    /// Frames that arrived behind one with a higher number.
    pub reordered: u64,
    /// Frames that arrived again.
    pub repeated: u64,
}

impl SequenceCheck {
    /// Frame `number` has arrived.
    pub fn arrived(&mut self, number: u64) {
        if number >= self.next {
            self.missing.extend(self.next..number);
            self.next = number + 1;
            self.received += 1;
        } else if self.missing.remove(&number) {
            self.reordered += 1;
            self.received += 1;
        } else {
            self.repeated += 1;
        }
    }

    /// All that has happened to the frames with numbers below `next` is forgotten.
    pub fn forget_below(&mut self, next: u64) {
        *self = Self {
            next,
            received: next,
            ..Self::default()
        };
    }

    /// The frames that have not arrived though one with a higher number has.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost_below(u64::MAX)
    }

    /// Those of them with a number below `end`.
    #[must_use]
    pub fn lost_below(&self, end: u64) -> u64 {
        u64::try_from(self.missing.range(..end).count()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(numbers: &[u64]) -> (u64, [u64; 3]) {
        let mut check = SequenceCheck::default();
        numbers.iter().for_each(|number| check.arrived(*number));
        let counts = [check.lost(), check.reordered, check.repeated];
        (check.received, counts)
    }

    #[test]
    fn losses_reorderings_and_repetitions_are_told_apart() {
        assert_eq!(check(&[0, 1, 2]), (3, [0, 0, 0]));
        assert_eq!(check(&[0, 3, 4]), (3, [2, 0, 0]));
        assert_eq!(check(&[2, 3]), (2, [2, 0, 0]));
        assert_eq!(check(&[0, 2, 1, 3]), (4, [0, 1, 0]));
        assert_eq!(check(&[0, 1, 0, 1, 2]), (3, [0, 0, 2]));
        assert_eq!(check(&[0, 2, 1, 1]), (3, [0, 1, 1]));
    }

    #[test]
    fn losses_are_counted_up_to_a_number() {
        let mut check = SequenceCheck::default();
        [0, 2, 5].iter().for_each(|number| check.arrived(*number));
        assert_eq!(
            [0, 1, 2, 4, 5].map(|end| check.lost_below(end)),
            [0, 0, 1, 2, 3]
        );
    }

    #[test]
    fn only_numbered_payloads_are_parsed() {
        let bytes = payload(3, 7);
        assert_eq!(parse(&bytes), Some((3, 7)));
        assert_eq!(parse(&bytes[..15]), None);
        assert_eq!(parse(&[0; PAYLOAD_LEN]), None);
    }
}
