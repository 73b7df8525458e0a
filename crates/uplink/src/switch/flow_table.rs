//! The table of a port's flows: the queue pair on which the port's guest last transmitted each
//! flow.
//!
//! A guest transmits a flow on the pair of the vCPU that handles it, and expects the replies there.
//! The table belongs to one port and learns only from what that port's guest transmits, so a guest
//! with very many flows does not affect other guests. The table is direct-mapped: two flows with
//! the same index replace each other, and a flow without an entry is steered as if it were new.

use std::sync::atomic::{AtomicU64, Ordering};

use super::flow::NO_FLOW;

/// The most queue pairs of a port: a vhost-user vring index has 8 bits, and a pair has two vrings.
pub(super) const MAX_PAIRS: u16 = 128;

/// The number of entries.
pub(super) const FLOW_TABLE_SIZE: usize = 4096;
/// The number of seconds after which a flow without frames is forgotten.
pub(super) const FLOW_EXPIRY_SECS: u16 = 3;

/// A set of queue pairs, with a bit for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PairSet(pub(super) u128);

impl PairSet {
    #[inline(always)]
    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the set has more than one pair.
    #[inline(always)]
    pub(super) fn has_several(self) -> bool {
        self.0 & self.0.wrapping_sub(1) != 0
    }

    #[inline(always)]
    pub(super) fn contains(self, pair: u16) -> bool {
        self.0 >> (pair % MAX_PAIRS) & 1 == 1
    }

    /// The lowest index; 0 where the set is empty.
    #[inline(always)]
    pub(super) fn first(self) -> u16 {
        u16::try_from(self.0.trailing_zeros()).unwrap_or(0) % MAX_PAIRS
    }

    /// The pair at position `n` modulo the number of pairs; 0 where the set is empty.
    pub(super) fn nth_cyclic(self, n: u64) -> u16 {
        let count = u64::from(self.0.count_ones().max(1));
        let mut left = self.0;
        for _ in 0..n % count {
            left &= left.wrapping_sub(1);
        }
        Self(left).first()
    }
}

/// The queue pair on which each flow of a port was last transmitted.
#[derive(Debug)]
pub(super) struct FlowTable {
    /// The upper 40 bits of the flow, its pair (8 bits), and the time of its last frame (16 bits of
    /// seconds).
    entries: Box<[AtomicU64]>,
}

impl FlowTable {
    pub(super) fn new() -> Self {
        Self {
            entries: (0..FLOW_TABLE_SIZE).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Records that `flow` was transmitted on `pair`. While nothing changes, this writes at most
    /// once a second.
    #[inline(always)]
    pub(super) fn learn(&self, flow: u64, pair: u16, now: u32) {
        if flow == NO_FLOW {
            return;
        }
        let slot = self.entry_for(flow);
        let entry = flow & FLOW_TAG_MASK | u64::from(pair & 0xff) << 16 | u64::from(wrap_secs(now));
        if slot.load(Ordering::Relaxed) != entry {
            slot.store(entry, Ordering::Relaxed);
        }
    }

    /// The pair on which `flow` was last transmitted, unless that has expired.
    #[inline(always)]
    pub(super) fn find(&self, flow: u64, now: u32) -> Option<u16> {
        let entry = self.entry_for(flow).load(Ordering::Relaxed);
        let then = u16::try_from(entry & 0xffff).unwrap_or(0);
        let known = entry & FLOW_TAG_MASK == flow & FLOW_TAG_MASK && entry != 0;
        // Another thread may have read the clock a moment later.
        let age = wrap_secs(now).wrapping_add(1).wrapping_sub(then);
        (known && age <= FLOW_EXPIRY_SECS + 1)
            .then(|| u16::try_from(entry >> 16 & 0xff).unwrap_or(0))
    }

    /// The entries that are used, and their positions.
    pub(super) fn entries(&self) -> Vec<(u16, u64)> {
        let entries = (0..).zip(&self.entries);
        let entries = entries.map(|(at, entry)| (at, entry.load(Ordering::Relaxed)));
        entries.filter(|(_, entry)| *entry != 0).collect()
    }

    /// Takes the entries of another table.
    pub(super) fn restore(&self, entries: &[(u16, u64)]) {
        for (at, entry) in entries {
            if let Some(slot) = self.entries.get(usize::from(*at)) {
                slot.store(*entry, Ordering::Relaxed);
            }
        }
    }

    #[inline(always)]
    fn entry_for(&self, flow: u64) -> &AtomicU64 {
        let index = usize::try_from(flow >> 8 & 0xffff).unwrap_or(0);
        &self.entries[index % FLOW_TABLE_SIZE]
    }
}

const FLOW_TAG_MASK: u64 = !0 << 24;

/// Wraps round after 18 hours: a flow that paused for exactly that long is steered as before.
#[inline(always)]
fn wrap_secs(now: u32) -> u16 {
    u16::try_from(now & 0xffff).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u32 = 70_000;

    /// A value in place of the hash of flow `n`.
    fn flow(n: u64) -> u64 {
        n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    }

    #[test]
    fn flow_is_found_on_the_pair_on_which_it_was_last_transmitted() {
        let table = FlowTable::new();
        assert_eq!(table.find(flow(1), NOW), None);
        table.learn(flow(1), 3, NOW);
        table.learn(flow(2), 127, NOW);
        assert_eq!(table.find(flow(1), NOW), Some(3));
        table.learn(flow(1), 0, NOW);
        assert_eq!(table.find(flow(1), NOW), Some(0));
        assert_eq!(table.find(flow(2), NOW), Some(127));
        table.learn(NO_FLOW, 5, NOW);
        assert_eq!(table.find(NO_FLOW, NOW), None);
    }

    #[test]
    fn flow_expires_even_where_the_seconds_wrap_round() {
        for now in [NOW, 0xffff, 0x1_0000, 0x1_ffff, u32::MAX - 10] {
            let table = FlowTable::new();
            table.learn(flow(1), 3, now);
            let expiry = u32::from(FLOW_EXPIRY_SECS);
            assert_eq!(table.find(flow(1), now + expiry), Some(3), "{now}");
            assert_eq!(table.find(flow(1), now + expiry + 1), None, "{now}");
            // The clock was read just before a tick that the other thread saw.
            assert_eq!(table.find(flow(1), now.saturating_sub(1)), Some(3), "{now}");
        }
    }

    #[test]
    fn flood_of_flows_stays_bounded_and_every_entry_is_right() {
        let table = FlowTable::new();
        let flows = 1_000_000;
        for n in 1..flows {
            table.learn(flow(n), u16::try_from(n % 128).unwrap(), NOW);
        }
        let known: Vec<u64> = (1..flows)
            .filter(|n| table.find(flow(*n), NOW).is_some())
            .collect();
        assert!(known.len() <= FLOW_TABLE_SIZE && known.len() > FLOW_TABLE_SIZE / 2);
        for n in known {
            let pair = u16::try_from(n % 128).unwrap();
            assert_eq!(table.find(flow(n), NOW), Some(pair));
        }
    }

    #[test]
    fn positions_cycle_through_the_pairs_of_the_set() {
        let some = PairSet(1 << 127 | 0b1011);
        let turns: Vec<u16> = (0..9).map(|n| some.nth_cyclic(n)).collect();
        assert_eq!(turns, [0, 1, 3, 127, 0, 1, 3, 127, 0]);
        assert!(some.contains(3) && !some.contains(2) && some.contains(127));
        assert_eq!(PairSet(u128::MAX).nth_cyclic(127), 127);
        assert_eq!((PairSet(0).nth_cyclic(9), PairSet(8).first()), (0, 3));
        let several = [0, 1, 1 << 100, 3].map(|bits| PairSet(bits).has_several());
        assert_eq!(several, [false, false, false, true]);
    }
}
