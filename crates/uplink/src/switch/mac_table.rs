//! The table of MAC addresses and their ports. It has a fixed size, and all senders read and write
//! it without a lock.
//!
//! A bucket is a cache line with four entries. Each entry is an address and a port in one word, and
//! the time at which the address was last seen. While nothing changes an address costs at most one
//! store a second, so the cache lines stay shared between all readers.
//!
//! Two threads that learn an address at once may store it twice in a bucket. All lookups then find
//! and refresh the first entry; the other one ages and is the first to be replaced.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::address_moves::AddressMoves;
use super::mac_addr::MacAddr;

/// The number of seconds after which an address that was not seen is forgotten: the default of IEEE
/// 802.1Q.
pub(super) const AGEING_SECS: u32 = 300;
const BUCKETS: usize = 1024;
const WAYS: usize = 4;

/// The port at which each address was last seen.
#[derive(Debug)]
pub(super) struct MacTable {
    buckets: Box<[Bucket]>,
    /// The seed of the hash, unknown to guests, so that a guest cannot fill a bucket of its choice.
    seed: u64,
    moves: AtomicU64,
    recent_moves: AddressMoves,
    evictions: AtomicU64,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket {
    /// Address << 16 | port; 0 where the entry is free.
    entries: [AtomicU64; WAYS],
    /// The time at which the address was last seen, in seconds.
    last_seen: [AtomicU32; WAYS],
}

impl MacTable {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| Bucket::default()).collect(),
            seed,
            moves: AtomicU64::new(0),
            recent_moves: AddressMoves::default(),
            evictions: AtomicU64::new(0),
        }
    }

    /// The port at which `mac` was last seen, unless the entry has expired. `mac` is neither a
    /// group address nor zero.
    #[inline(always)]
    pub(super) fn find(&self, mac: MacAddr, now: u32) -> Option<u16> {
        let bucket = self.bucket(mac);
        for (entry, last_seen) in bucket.entries.iter().zip(&bucket.last_seen) {
            let found = entry.load(Ordering::Relaxed);
            if found >> 16 == mac.0 {
                let fresh = !is_expired(last_seen.load(Ordering::Relaxed), now);
                return fresh.then(|| entry_port(found));
            }
        }
        None
    }

    /// Records that `mac` was seen at port `from`.
    #[inline(always)]
    pub(super) fn learn(&self, mac: MacAddr, from: u16, now: u32) {
        if mac.is_group_or_zero() {
            return;
        }
        let bucket = self.bucket(mac);
        let entry = mac.0 << 16 | u64::from(from);
        for (slot, last_seen) in bucket.entries.iter().zip(&bucket.last_seen) {
            let found = slot.load(Ordering::Relaxed);
            if found >> 16 != mac.0 {
                continue;
            }
            if last_seen.load(Ordering::Relaxed) != now {
                last_seen.store(now, Ordering::Relaxed);
            }
            if found != entry {
                slot.store(entry, Ordering::Relaxed);
                self.record_move(mac, entry_port(found), from, now);
            }
            return;
        }
        self.insert(bucket, entry, now);
    }

    #[cold]
    fn record_move(&self, mac: MacAddr, from: u16, to: u16, now: u32) {
        self.moves.fetch_add(1, Ordering::Relaxed);
        self.recent_moves.record(mac, from, to, now);
    }

    /// The addresses that moved recently.
    pub(super) fn recent_moves(&self) -> &AddressMoves {
        &self.recent_moves
    }

    #[cold]
    fn insert(&self, bucket: &Bucket, entry: u64, now: u32) {
        let way = bucket.select_way(entry_port(entry), now);
        let (slot, last_seen) = (&bucket.entries[way], &bucket.last_seen[way]);
        let before = slot.load(Ordering::Relaxed);
        if before != 0 && !is_expired(last_seen.load(Ordering::Relaxed), now) {
            self.evictions.fetch_add(1, Ordering::Relaxed);
        }
        last_seen.store(now, Ordering::Relaxed);
        // If another thread was faster its entry stays, and the next burst learns this one.
        let _ = slot.compare_exchange(before, entry, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Forgets the addresses at a port, which learns none meanwhile.
    pub(super) fn forget_port(&self, port: u16) {
        let entries = self.buckets.iter().flat_map(|bucket| &bucket.entries);
        for entry in entries {
            let found = entry.load(Ordering::Relaxed);
            if found != 0 && entry_port(found) == port {
                // Another thread may have learned another address in its place.
                let _ = entry.compare_exchange(found, 0, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
        self.recent_moves.forget_port(port);
    }

    /// The number of addresses that have not expired.
    pub(super) fn len(&self, now: u32) -> usize {
        self.addresses(now).len()
    }

    /// The addresses that have not expired, and their ports.
    pub(super) fn addresses(&self, now: u32) -> Vec<(MacAddr, u16)> {
        let entries = self
            .buckets
            .iter()
            .flat_map(|b| b.entries.iter().zip(&b.last_seen));
        let fresh = entries.filter_map(|(entry, last_seen)| {
            let entry = entry.load(Ordering::Relaxed);
            let is_fresh = entry != 0 && !is_expired(last_seen.load(Ordering::Relaxed), now);
            is_fresh.then(|| (MacAddr(entry >> 16), entry_port(entry)))
        });
        fresh.collect()
    }

    /// How often a known address was seen at another port.
    pub(super) fn moves(&self) -> u64 {
        self.moves.load(Ordering::Relaxed)
    }

    /// How often a new address replaced one that had not expired.
    pub(super) fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn bucket(&self, mac: MacAddr) -> &Bucket {
        // Multiplicative hashing: the upper bits of the product depend on all bits of the address.
        let hash = (mac.0 ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let index = usize::try_from(hash >> 54).unwrap_or(0);
        &self.buckets[index % BUCKETS]
    }
}

impl Bucket {
    /// Selects the entry for a new address of port `from`: a free or expired one; otherwise the
    /// oldest one of the same port, so that a port that floods the table displaces at most one
    /// address of another port in each bucket; otherwise the oldest one of all.
    fn select_way(&self, from: u16, now: u32) -> usize {
        let age = |way: &usize| now.saturating_sub(self.last_seen[*way].load(Ordering::Relaxed));
        let entry = |way: usize| self.entries[way].load(Ordering::Relaxed);
        let free = |way: &usize| entry(*way) == 0 || age(way) > AGEING_SECS;
        let own = |way: &usize| entry_port(entry(*way)) == from;
        (0..WAYS)
            .find(free)
            .or_else(|| (0..WAYS).filter(own).max_by_key(age))
            .or_else(|| (0..WAYS).max_by_key(age))
            .unwrap_or(0)
    }
}

#[inline(always)]
fn is_expired(last_seen: u32, now: u32) -> bool {
    // The clocks of two CPUs may differ by a tick: a time in the future is not old.
    now.saturating_sub(last_seen) > AGEING_SECS
}

#[inline(always)]
fn entry_port(entry: u64) -> u16 {
    u16::try_from(entry & 0xffff).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u32 = 1_000_000;
    const CAPACITY: usize = BUCKETS * WAYS;

    fn table() -> MacTable {
        MacTable::new(0x1234_5678_9abc_def0)
    }

    /// The address of host `n`. The number is in the last bytes, as in addresses of one vendor.
    fn mac_of(n: u64) -> MacAddr {
        let [.., a, b, c, d] = n.to_be_bytes();
        MacAddr(u64::from_le_bytes([0x52, 0x54, a, b, c, d, 0, 0]))
    }

    #[test]
    fn address_is_found_at_the_port_where_it_was_last_seen() {
        let table = table();
        assert_eq!(table.find(mac_of(1), NOW), None);
        table.learn(mac_of(1), 7, NOW);
        table.learn(mac_of(2), 0, NOW);
        table.learn(mac_of(2), 0, NOW + 1);
        assert_eq!(table.find(mac_of(1), NOW), Some(7));
        assert_eq!(table.find(mac_of(2), NOW), Some(0));
        assert_eq!(table.moves(), 0);
        table.learn(mac_of(1), 65_534, NOW + 1);
        assert_eq!(table.find(mac_of(1), NOW + 1), Some(65_534));
        assert_eq!((table.moves(), table.len(NOW + 1)), (1, 2));
    }

    #[test]
    fn group_addresses_and_zero_are_not_learned() {
        let table = table();
        let multicast = MacAddr(u64::from_le_bytes([0x33, 0x33, 0, 0, 0, 1, 0, 0]));
        for mac in [MacAddr(0), MacAddr(0xffff_ffff_ffff), multicast] {
            table.learn(mac, 3, NOW);
            assert!(mac.is_group_or_zero());
        }
        assert_eq!(table.len(NOW), 0);
        assert!(!mac_of(0).is_group_or_zero());
    }

    #[test]
    fn addresses_of_a_removed_port_are_forgotten_and_no_others() {
        let table = table();
        table.learn(mac_of(1), 7, NOW);
        table.learn(mac_of(2), 8, NOW);
        table.learn(mac_of(3), 7, NOW);
        table.forget_port(7);
        assert_eq!(table.find(mac_of(1), NOW), None);
        assert_eq!(table.find(mac_of(2), NOW), Some(8));
        assert_eq!(table.len(NOW), 1);
        table.learn(mac_of(1), 8, NOW);
        assert_eq!((table.find(mac_of(1), NOW), table.moves()), (Some(8), 0));
    }

    #[test]
    fn address_that_was_not_seen_for_long_is_forgotten() {
        let table = table();
        table.learn(mac_of(1), 1, NOW);
        table.learn(mac_of(2), 2, NOW);
        table.learn(mac_of(1), 1, NOW + 200);
        let later = NOW + AGEING_SECS + 1;
        assert_eq!(table.find(mac_of(2), NOW + AGEING_SECS), Some(2));
        assert_eq!(table.find(mac_of(2), later), None);
        assert_eq!(table.find(mac_of(1), later), Some(1));
        assert_eq!(table.len(later), 1);
        // Learning the address again is not a move, and an entry does not expire if the clock is
        // one tick behind.
        table.learn(mac_of(2), 2, later);
        assert_eq!(table.find(mac_of(2), later - 1), Some(2));
        assert_eq!(table.moves(), 0);
    }

    #[test]
    fn flood_of_addresses_stays_bounded_and_displaces_few_of_other_ports() {
        let table = table();
        let honest = 500;
        for n in 0..honest {
            table.learn(mac_of(n), 1, NOW);
        }
        let before: Vec<bool> = known(&table, honest);
        for n in honest..honest + 1_000_000 {
            table.learn(mac_of(n), 2, NOW + 1);
        }
        assert_eq!(table.len(NOW + 1), CAPACITY);
        assert!(table.evictions() > 900_000);
        // At most one in each bucket is displaced, where the honest addresses had filled it.
        let after = known(&table, honest);
        let lost = before
            .iter()
            .zip(&after)
            .filter(|(b, a)| **b && !**a)
            .count();
        assert!(lost < 20, "{lost} of {honest}");
    }

    fn known(table: &MacTable, count: u64) -> Vec<bool> {
        let find = |n| table.find(mac_of(n), NOW + 1) == Some(1);
        (0..count).map(find).collect()
    }

    #[test]
    fn full_bucket_replaces_its_oldest_address() {
        let table = table();
        let index = |mac| std::ptr::from_ref(table.bucket(mac));
        let same: Vec<MacAddr> = (0..)
            .map(mac_of)
            .filter(|mac| index(*mac) == index(mac_of(0)))
            .take(WAYS + 2)
            .collect();
        for (n, mac) in (0..).zip(&same[..WAYS]) {
            table.learn(*mac, n, NOW + u32::from(n));
        }
        table.learn(same[0], 0, NOW + 10);
        table.learn(same[WAYS], 100, NOW + 11);
        let found = |mac: &MacAddr| table.find(*mac, NOW + 11).is_some();
        assert_eq!(
            same.iter().map(found).collect::<Vec<_>>(),
            [true, false, true, true, true, false]
        );
        // A port that has an entry in the bucket loses that one.
        table.learn(same[WAYS + 1], 100, NOW + 12);
        assert_eq!(
            same.iter().map(found).collect::<Vec<_>>(),
            [true, false, true, true, false, true]
        );
        assert_eq!(table.evictions(), 2);
    }

    #[test]
    fn addresses_of_one_vendor_spread_over_the_buckets() {
        let table = table();
        for n in 0..1024 {
            table.learn(mac_of(n), 1, NOW);
        }
        // Distributed at random over buckets of four, about 1 % of the addresses find no entry.
        assert!(table.len(NOW) > 980, "{}", table.len(NOW));
    }

    #[test]
    fn threads_that_learn_at_once_leave_no_wrong_entry() {
        let table = table();
        std::thread::scope(|scope| {
            for port in 0..4 {
                let table = &table;
                scope.spawn(move || {
                    for round in 0..200 {
                        for n in 0..300 {
                            let mac = mac_of(n * 4 + u64::from(port));
                            table.learn(mac, port, NOW + round);
                            let found = table.find(mac, NOW + round);
                            assert!(found.is_none_or(|found| found == port));
                        }
                    }
                });
            }
        });
        assert!(table.len(NOW + 200) <= CAPACITY);
        assert_eq!(table.moves(), 0);
    }
}
