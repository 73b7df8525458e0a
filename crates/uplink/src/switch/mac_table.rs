//! Which station is behind which port: a table of bounded size that all senders read and write
//! without a lock.
//!
//! A bucket is a cache line: four entries of an address and a port in one word each, and beside
//! them when the address was last seen. Nothing is written while nothing changes: an address that
//! is seen again and again costs one store a second, so the lines stay in every reader's cache.
//!
//! Two threads that learn at once may leave an address in two places of a bucket. The first one is
//! found and kept fresh, by everybody; the other grows old and is the first to be replaced.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Seconds after which an address that was not seen is forgotten (IEEE 802.1Q's default).
pub(super) const AGEING_SECS: u32 = 300;
const BUCKETS: usize = 1024;
const WAYS: usize = 4;
/// The bit of a group address, in the first byte on the wire.
const GROUP_BIT: u64 = 1;

/// A MAC address, the first byte on the wire lowest; the upper 16 bits are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MacAddr(pub(super) u64);

impl MacAddr {
    /// The address of a group, or zero.
    #[inline(always)]
    pub(super) fn is_group_or_zero(self) -> bool {
        self.0 & GROUP_BIT != 0 || self.0 == 0
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct MacTable {
    buckets: Box<[Bucket]>,
    /// Unknown to guests, so that none can aim at a bucket.
    seed: u64,
    moves: AtomicU64,
    evictions: AtomicU64,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket {
    /// Address << 16 | port; 0 where there is none.
    entries: [AtomicU64; WAYS],
    /// When the address was last seen, in seconds.
    last_seen: [AtomicU32; WAYS],
}

impl MacTable {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| Bucket::default()).collect(),
            seed,
            moves: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
        }
    }

    /// The port that `mac`, which is somebody's, was last seen at, unless that is too long ago.
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

    /// `mac` was seen at `from`.
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
                self.moves.fetch_add(1, Ordering::Relaxed);
            }
            return;
        }
        self.insert(bucket, entry, now);
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
        // Where another thread was faster, its entry stays; the next burst learns this one.
        let _ = slot.compare_exchange(before, entry, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Addresses that are known now.
    pub(super) fn len(&self, now: u32) -> usize {
        let entries = self
            .buckets
            .iter()
            .flat_map(|b| b.entries.iter().zip(&b.last_seen));
        entries
            .filter(|(entry, last_seen)| {
                entry.load(Ordering::Relaxed) != 0
                    && !is_expired(last_seen.load(Ordering::Relaxed), now)
            })
            .count()
    }

    /// Times that a known address was seen at another port.
    pub(super) fn moves(&self) -> u64 {
        self.moves.load(Ordering::Relaxed)
    }

    /// Times that a known address had to make room for a new one.
    pub(super) fn evictions(&self) -> u64 {
        self.evictions.load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn bucket(&self, mac: MacAddr) -> &Bucket {
        // Multiplicative hashing: the product's uppermost bits depend on all bits of the address.
        let hash = (mac.0 ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let index = usize::try_from(hash >> 54).unwrap_or(0);
        &self.buckets[index % BUCKETS]
    }
}

impl Bucket {
    /// Where a new address of `from` goes: to an empty or outdated place; else it replaces the
    /// oldest address of the same port, so that a port that floods the table displaces one address
    /// of others a bucket and no more; else the oldest of all.
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
    // Clocks of two CPUs may differ by a tick: a stamp of the future is not old.
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

    /// A station's address; `n` stands in the last bytes, which tell cards of one vendor apart.
    fn mac_of(n: u64) -> MacAddr {
        let [.., a, b, c, d] = n.to_be_bytes();
        MacAddr(u64::from_le_bytes([0x52, 0x54, a, b, c, d, 0, 0]))
    }

    #[test]
    fn an_address_is_found_where_it_was_seen_last() {
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
    fn groups_and_zero_are_nobodys() {
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
    fn what_was_not_seen_for_long_is_forgotten() {
        let table = table();
        table.learn(mac_of(1), 1, NOW);
        table.learn(mac_of(2), 2, NOW);
        table.learn(mac_of(1), 1, NOW + 200);
        let later = NOW + AGEING_SECS + 1;
        assert_eq!(table.find(mac_of(2), NOW + AGEING_SECS), Some(2));
        assert_eq!(table.find(mac_of(2), later), None);
        assert_eq!(table.find(mac_of(1), later), Some(1));
        assert_eq!(table.len(later), 1);
        // Its return is no move, and a clock that is a tick behind makes nothing old.
        table.learn(mac_of(2), 2, later);
        assert_eq!(table.find(mac_of(2), later - 1), Some(2));
        assert_eq!(table.moves(), 0);
    }

    #[test]
    fn a_flood_of_addresses_stays_bounded_and_spares_others() {
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
        // One a bucket may have had to go, where the honest ones had filled it.
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
    fn a_full_bucket_gives_up_its_oldest() {
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
        // A port that has a place already gives up its own.
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
        // Thrown at random into buckets of four, about 1 % find no place.
        assert!(table.len(NOW) > 980, "{}", table.len(NOW));
    }

    #[test]
    fn threads_that_learn_at_once_leave_nothing_false() {
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
