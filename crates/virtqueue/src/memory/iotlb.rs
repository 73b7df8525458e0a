//! Translations of the addresses of a guest behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM).
//!
//! The driver then gives I/O virtual addresses (IOVAs), for its buffers and for its virtqueues. Only
//! the front-end knows what they mean. The [`Iotlb`] of a device keeps the translations that the
//! front-end has sent: ranges of IOVAs, and their addresses in the front-end's address space, which
//! [`super::GuestMemory`] translates further.
//!
//! ```text
//! IOVA ── Iotlb ──> front-end address ── GuestMemory ──> address in this process
//!           │
//!           └─ miss: noted once, sent by the session, answered with an update
//! ```
//!
//! It is a cache: an entry that is not there is asked for. All entries of a range are removed when
//! the front-end says so, and a few when there are too many. Virtqueues keep copies of entries
//! (`super::translation`), and must drop those after a removal.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// The largest number of translations that are kept. A guest that maps single pages needs one for
/// each page of its buffers.
pub const MAX_TRANSLATIONS: usize = 4096;
/// The largest number of misses whose answer is awaited. The front-end's socket has space for more.
pub const MAX_PENDING_MISSES: usize = 64;
/// The time after which a miss that was not answered may be sent again.
const MISS_LIFETIME: Duration = Duration::from_secs(1);
/// The time within which most answers come.
const ANSWER_TIME: Duration = Duration::from_millis(5);
/// The granularity of misses: the smallest page of an IOMMU, in bytes.
pub(super) const IOVA_PAGE: u64 = 4096;

/// What the IOMMU permits, or what an access needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Both.
    ReadWrite,
}

impl Access {
    /// The permission with VHOST_ACCESS_RO (1), VHOST_ACCESS_WO (2) or VHOST_ACCESS_RW (3).
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Read,
            2 => Self::Write,
            3 => Self::ReadWrite,
            _ => return None,
        })
    }

    /// The number of [`Access::from_number`].
    #[must_use]
    pub fn to_number(self) -> u8 {
        match self {
            Self::Read => 1,
            Self::Write => 2,
            Self::ReadWrite => 3,
        }
    }

    /// Whether this permission covers `needed`.
    #[must_use]
    pub fn permits(self, needed: Self) -> bool {
        self.to_number() & needed.to_number() == needed.to_number()
    }
}

/// A range of IOVAs, which is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IovaRange {
    first: u64,
    last: u64,
}

impl IovaRange {
    /// All IOVAs.
    pub const ALL: Self = Self {
        first: 0,
        last: u64::MAX,
    };

    /// The `size` addresses from `first` on; `None` if there is none or they wrap around.
    #[must_use]
    pub fn new(first: u64, size: u64) -> Option<Self> {
        let last = first.checked_add(size.checked_sub(1)?)?;
        Some(Self { first, last })
    }

    /// The first address.
    #[must_use]
    pub fn first(self) -> u64 {
        self.first
    }

    /// The last address.
    #[must_use]
    pub fn last(self) -> u64 {
        self.last
    }

    /// All addresses from `first` on.
    #[must_use]
    pub fn to_end(first: u64) -> Self {
        Self {
            first,
            last: u64::MAX,
        }
    }

    /// Whether the two ranges have an address in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Whether the range holds `addr`.
    #[must_use]
    pub fn contains(self, addr: u64) -> bool {
        (self.first..=self.last).contains(&addr)
    }
}

/// A translation: what a range of IOVAs means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The IOVAs.
    pub range: IovaRange,
    /// The front-end address of the first one.
    pub user_addr: u64,
    /// What the device may do with the memory.
    pub access: Access,
}

impl Translation {
    /// The first IOVA.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.range.first
    }

    /// The size in bytes; 2^64 - 1 for all IOVAs.
    #[must_use]
    pub fn size(&self) -> u64 {
        (self.range.last - self.range.first).saturating_add(1)
    }

    /// Whether both say the same of the addresses that they have in common.
    fn agrees_with(&self, other: &Self) -> bool {
        let base = |t: &Self| t.user_addr.wrapping_sub(t.range.first);
        base(self) == base(other) && self.access == other.access
    }
}

/// The effect of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpdateEffect {
    /// Nothing that was known has changed.
    Added,
    /// A translation that was known is another one now, so copies of the old one must be dropped.
    Replaced,
}

/// An address whose translation is missing, and the access that needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Miss {
    /// The IOVA, rounded down to a page of 4 KiB.
    pub iova: u64,
    /// What the device wants to do.
    pub access: Access,
}

/// The translations of one device, and what is missing. All workers of the device share it.
pub struct Iotlb {
    table: RwLock<Table>,
    misses: Mutex<Vec<PendingMiss>>,
    /// Called after a miss was noted. It must not block.
    on_miss: Box<dyn Fn() + Send + Sync>,
    updates: AtomicU64,
    invalidations: AtomicU64,
    requests: AtomicU64,
}

/// The number of entries and of events of an [`Iotlb`] so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IotlbCounts {
    /// Translations that are known now.
    pub entries: usize,
    /// Translations that the front-end has sent.
    pub updates: u64,
    /// Ranges that the front-end has invalidated.
    pub invalidations: u64,
    /// Misses that were to be sent, without those that were pending already.
    pub misses: u64,
}

/// A miss that was noted and is not answered.
#[derive(Debug, Clone, Copy)]
struct PendingMiss {
    miss: Miss,
    state: MissState,
}

#[derive(Debug, Clone, Copy)]
enum MissState {
    /// To be sent.
    Queued,
    /// Sent at this time.
    Sent(Instant),
}

impl MissState {
    fn is_expired(self) -> bool {
        !self.is_younger_than(MISS_LIFETIME)
    }

    fn is_younger_than(self, age: Duration) -> bool {
        match self {
            Self::Queued => true,
            Self::Sent(at) => at.elapsed() < age,
        }
    }
}

impl fmt::Debug for Iotlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iotlb")
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

impl Iotlb {
    /// An empty table. `on_miss` is called, under the locks of a virtqueue, when there is a miss to
    /// send ([`Iotlb::take_misses`]).
    #[must_use]
    pub fn new(on_miss: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            table: RwLock::default(),
            misses: Mutex::default(),
            on_miss: Box::new(on_miss),
            updates: AtomicU64::new(0),
            invalidations: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        }
    }

    /// The translation of `addr`, if it is known and permits `access`.
    #[must_use]
    pub fn find(&self, addr: u64, access: Access) -> Option<Translation> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table
            .find(addr)
            .filter(|found| found.access.permits(access))
    }

    /// The front-end address of a range whose translations are known, permit `access` and follow
    /// each other there.
    #[must_use]
    pub fn contiguous(&self, range: IovaRange, access: Access) -> Option<u64> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let mut addr = range.first;
        let mut first_user_addr = None;
        loop {
            let found = table.find(addr).filter(|t| t.access.permits(access))?;
            let user_addr = found.user_addr.checked_add(addr - found.range.first)?;
            let first = *first_user_addr.get_or_insert(user_addr);
            if user_addr.checked_sub(first)? != addr - range.first {
                return None;
            }
            if found.range.last >= range.last {
                return Some(first);
            }
            addr = found.range.last + 1;
        }
    }

    /// Whether the translations of all pages of `range` are known and permit `access`. Those that do
    /// not are noted as misses.
    #[must_use]
    pub fn request(&self, range: IovaRange, access: Access) -> bool {
        let mut is_known = true;
        let mut addr = range.first;
        loop {
            let last = match self.find(addr, access) {
                Some(found) => found.range.last,
                None => {
                    self.report_miss(addr, access);
                    is_known = false;
                    addr | (IOVA_PAGE - 1)
                }
            };
            if last >= range.last {
                return is_known;
            }
            addr = last + 1;
        }
    }

    /// Adds a translation, in the place of all that have an address in common with it.
    pub fn update(&self, translation: Translation) -> UpdateEffect {
        self.updates.fetch_add(1, Ordering::Relaxed);
        let effect = {
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            table.insert(translation)
        };
        self.lock_misses().retain(|pending| {
            !translation.range.contains(pending.miss.iova)
                || !translation.access.permits(pending.miss.access)
        });
        effect
    }

    /// Removes every translation that has an address in `range`. Copies of them may be in use until
    /// the caller has made all virtqueues drop them.
    pub fn invalidate(&self, range: IovaRange) {
        self.invalidations.fetch_add(1, Ordering::Relaxed);
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.remove(range);
    }

    /// Removes all translations and misses, as at the start of a device.
    pub fn clear(&self) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        *table = Table::default();
        drop(table);
        self.lock_misses().clear();
    }

    /// Notes that the translation of `addr` is missing. It has no effect while the same miss is
    /// pending, or too many are: the virtqueue that needs the address asks again.
    pub fn report_miss(&self, addr: u64, access: Access) {
        let miss = Miss {
            iova: addr & !(IOVA_PAGE - 1),
            access,
        };
        let mut misses = self.lock_misses();
        let is_same =
            |pending: &PendingMiss| pending.miss.iova == miss.iova && pending.miss.access == access;
        misses.retain(|pending| !pending.state.is_expired());
        if misses.len() >= MAX_PENDING_MISSES || misses.iter().any(is_same) {
            return;
        }
        misses.push(PendingMiss {
            miss,
            state: MissState::Queued,
        });
        drop(misses);
        self.requests.fetch_add(1, Ordering::Relaxed);
        (self.on_miss)();
    }

    /// The misses that are to be sent now. They count as sent.
    pub fn take_misses(&self) -> Vec<Miss> {
        let mut misses = self.lock_misses();
        let queued = misses
            .iter_mut()
            .filter(|pending| matches!(pending.state, MissState::Queued));
        queued
            .map(|pending| {
                pending.state = MissState::Sent(Instant::now());
                pending.miss
            })
            .collect()
    }

    /// Whether the answer to a miss is to be expected soon. One that has not come for a while may never
    /// come.
    #[must_use]
    pub fn expects_answers(&self) -> bool {
        let is_new = |pending: &PendingMiss| pending.state.is_younger_than(ANSWER_TIME);
        self.lock_misses().iter().any(is_new)
    }

    /// The number of entries and of events so far.
    #[must_use]
    pub fn counts(&self) -> IotlbCounts {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        IotlbCounts {
            entries: table.by_start.len(),
            updates: self.updates.load(Ordering::Relaxed),
            invalidations: self.invalidations.load(Ordering::Relaxed),
            misses: self.requests.load(Ordering::Relaxed),
        }
    }

    fn lock_misses(&self) -> MutexGuard<'_, Vec<PendingMiss>> {
        self.misses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Translations that do not overlap.
#[derive(Debug, Default)]
struct Table {
    by_start: BTreeMap<u64, Translation>,
    /// The first IOVA of the entry that was removed last because there were too many. The next one
    /// follows it, so that each has its turn.
    last_evicted: u64,
}

impl Table {
    fn find(&self, addr: u64) -> Option<Translation> {
        let (_, found) = self.by_start.range(..=addr).next_back()?;
        found.range.contains(addr).then_some(*found)
    }

    /// The entries that have an address in `range`, highest first.
    fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = &Translation> {
        let below_end = self.by_start.range(..=range.last).rev();
        // They do not overlap each other, so the ends are in the order of the starts.
        below_end
            .map(|(_, entry)| entry)
            .take_while(move |entry| entry.range.overlaps(range))
    }

    fn remove(&mut self, range: IovaRange) {
        let starts: Vec<u64> = self
            .overlapping(range)
            .map(|entry| entry.range.first)
            .collect();
        for start in starts {
            self.by_start.remove(&start);
        }
    }

    fn insert(&mut self, new: Translation) -> UpdateEffect {
        let is_replaced = self
            .overlapping(new.range)
            .any(|old| !old.agrees_with(&new));
        self.remove(new.range);
        if self.by_start.len() >= MAX_TRANSLATIONS {
            self.evict();
        }
        self.by_start.insert(new.range.first, new);
        match is_replaced {
            true => UpdateEffect::Replaced,
            false => UpdateEffect::Added,
        }
    }

    fn evict(&mut self) {
        let after = self.last_evicted.saturating_add(1);
        let next = self.by_start.range(after..).next();
        if let Some((&start, _)) = next.or_else(|| self.by_start.iter().next()) {
            self.by_start.remove(&start);
            self.last_evicted = start;
        }
    }
}

#[cfg(test)]
mod tests;
