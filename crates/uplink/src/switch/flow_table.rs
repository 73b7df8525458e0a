//! The table of a port's flows: the queue pair on which the port's guest last transmitted each
//! flow.
//!
//! A guest transmits a flow on the pair of the vCPU that handles it, and expects the replies there.
//! The table belongs to one port and learns only from what that port's guest transmits, so a guest
//! with very many flows does not affect other guests. A flow has an entry in the bucket of its hash. In a
//! full bucket it replaces the one that has not been refreshed for the longest time, and a flow without
//! an entry is steered as if it were new.

use std::sync::atomic::{AtomicU64, Ordering};

use super::flow::NO_FLOW;

/// The most queue pairs of a port: a vhost-user vring index has 8 bits, and a pair has two vrings.
pub(super) const MAX_PAIRS: u16 = 128;

/// The number of entries.
pub(super) const FLOW_TABLE_SIZE: usize = BUCKETS * BUCKET_SIZE;
const BUCKETS: usize = 1024;
/// The entries of a bucket, which are in one cache line. Of 100 flows, less than one in 10,000 lacks an
/// entry, and of 1,000 one in 230; with one entry for each hash it would be one in 80 and one in 9.
const BUCKET_SIZE: usize = 4;
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
    buckets: Box<[Bucket]>,
}

/// Each entry has the upper 40 bits of the flow, its pair (8 bits), and the time of its last frame (16
/// bits of seconds); 0 where there is none.
#[derive(Debug, Default)]
#[repr(align(32))]
struct Bucket([AtomicU64; BUCKET_SIZE]);

impl FlowTable {
    pub(super) fn new() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| Bucket::default()).collect(),
        }
    }

    /// Records that `flow` was transmitted on `pair`. While nothing changes, this writes at most
    /// once a second.
    #[inline(always)]
    pub(super) fn learn(&self, flow: u64, pair: u16, now: u32) {
        if flow == NO_FLOW {
            return;
        }
        let entry = flow & FLOW_TAG_MASK | u64::from(pair & 0xff) << 16 | u64::from(wrap_secs(now));
        let bucket = self.bucket_of(flow);
        let is_there = |place: &AtomicU64| place.load(Ordering::Relaxed) == entry;
        if !bucket.0.iter().any(is_there) {
            bucket.put(entry, now);
        }
    }

    /// The pair on which `flow` was last transmitted, unless that has expired.
    #[inline(always)]
    pub(super) fn find(&self, flow: u64, now: u32) -> Option<u16> {
        let entries = self.bucket_of(flow).0.iter();
        let mut entries = entries.map(|place| place.load(Ordering::Relaxed));
        let entry = entries.find(|entry| *entry != 0 && has_tag(*entry, flow))?;
        (age(entry, now) <= FLOW_EXPIRY_SECS)
            .then(|| u16::try_from(entry >> 16 & 0xff).unwrap_or(0))
    }

    /// The entries that are used, and their positions.
    pub(super) fn entries(&self) -> Vec<(u16, u64)> {
        let positions = 0..FLOW_TABLE_SIZE;
        let entries = positions.filter_map(|at| {
            let place = &self.buckets[at % BUCKETS].0[at / BUCKETS];
            let entry = place.load(Ordering::Relaxed);
            Some((u16::try_from(at).ok()?, entry)).filter(|(_, entry)| *entry != 0)
        });
        entries.collect()
    }

    /// Forgets all flows.
    pub(super) fn clear(&self) {
        let entries = self.buckets.iter().flat_map(|bucket| &bucket.0);
        entries.for_each(|entry| entry.store(0, Ordering::Relaxed));
    }

    /// Takes the entries of another table, at the time `now`. A table with one entry for each position
    /// has the same buckets.
    pub(super) fn restore(&self, entries: &[(u16, u64)], now: u32) {
        for (at, entry) in entries {
            self.buckets[usize::from(*at) % BUCKETS].put(*entry, now);
        }
    }

    #[inline(always)]
    fn bucket_of(&self, flow: u64) -> &Bucket {
        let index = usize::try_from(flow >> 8 & 0xffff).unwrap_or(0);
        &self.buckets[index % BUCKETS]
    }
}

impl Bucket {
    /// Replaces the entry of the same flow, or an unused one, or else the oldest one. Two threads that
    /// do this at the same time may leave two entries of a flow, of which the first one counts.
    #[inline(never)]
    fn put(&self, entry: u64, now: u32) {
        let rank = |place: &&AtomicU64| match place.load(Ordering::Relaxed) {
            old if old != 0 && has_tag(old, entry) => u32::MAX,
            0 => u32::MAX - 1,
            old => u32::from(age(old, now)),
        };
        if let Some(place) = self.0.iter().max_by_key(rank) {
            place.store(entry, Ordering::Relaxed);
        }
    }
}

/// Whether an entry is one of `flow`, or of the same flow as another entry.
#[inline(always)]
fn has_tag(entry: u64, flow: u64) -> bool {
    (entry ^ flow) & FLOW_TAG_MASK == 0
}

/// The seconds since the last frame of an entry.
#[inline(always)]
fn age(entry: u64, now: u32) -> u16 {
    let then = u16::try_from(entry & 0xffff).unwrap_or(0);
    // Another thread may have read the clock a moment later.
    wrap_secs(now)
        .wrapping_add(1)
        .wrapping_sub(then)
        .saturating_sub(1)
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

    /// The flows that share a bucket differ in the upper bits only.
    fn flow_of_one_bucket(n: u64) -> u64 {
        n << 32 | 5 << 8
    }

    #[test]
    fn four_flows_of_a_bucket_keep_their_entries_and_a_fifth_replaces_the_oldest() {
        let table = FlowTable::new();
        for n in 1..=4_u16 {
            table.learn(flow_of_one_bucket(n.into()), n, NOW + u32::from(n != 2));
        }
        for n in 1..=4_u16 {
            assert_eq!(table.find(flow_of_one_bucket(n.into()), NOW + 1), Some(n));
        }
        table.learn(flow_of_one_bucket(5), 5, NOW + 2);
        for (n, pair) in [
            (1, Some(1)),
            (2, None),
            (3, Some(3)),
            (4, Some(4)),
            (5, Some(5)),
        ] {
            assert_eq!(table.find(flow_of_one_bucket(n), NOW + 2), pair, "{n}");
        }
        // A flow that moves to another pair has one entry.
        table.learn(flow_of_one_bucket(3), 9, NOW + 2);
        assert_eq!(table.entries().len(), 4);
        assert_eq!(table.find(flow_of_one_bucket(3), NOW + 2), Some(9));
    }

    #[test]
    fn flows_of_another_table_are_found_on_their_pairs() {
        let table = FlowTable::new();
        for n in 1..=100_u16 {
            table.learn(flow(n.into()), n % 128, NOW);
        }
        let restored = FlowTable::new();
        restored.restore(&table.entries(), NOW + 1);
        for n in 1..=100_u16 {
            assert_eq!(restored.find(flow(n.into()), NOW + 1), Some(n % 128));
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
