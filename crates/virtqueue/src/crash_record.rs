//! The progress of a packed virtqueue, kept where it outlives the process.
//!
//! When a back-end has vanished, the used index in guest memory says where a split virtqueue
//! continues. A packed virtqueue has nothing of the kind: only the device knows its position, and
//! the front-end repeats the base of the last start. So the device writes its position to a file of
//! its own, in shared memory, before each publish.
//!
//! Publishing overwrites the descriptors of the second and all later chains before that of the
//! first one. After a crash in between, those chains can no longer be read from the ring. Therefore
//! the chains of a publish are recorded first, and after them, with one store, where the publish
//! begins:
//!
//! ```text
//! 1. list      id, slots, length of each completed chain, in the list that was not used last
//! 2. progress  {position, number of chains, which list}          one store of 8 bytes
//! 3. ring      used descriptors of chains 2 to n
//! 4. ring      used descriptor of chain 1: the driver sees all of them
//! ```
//!
//! A crash before 2 leaves the record of the publish before, which is complete, so the chains are
//! taken from the ring once more. A crash between 2 and 4 leaves a descriptor at the position that is
//! still available: the list is written to the ring again, whatever is there. A crash after 4 leaves
//! nothing to do. In any case the virtqueue continues behind the chains of the list. The driver never
//! looks past a descriptor that is not used yet, so it sees each chain exactly once.
//!
//! A record belongs to the virtqueue whose layout and memory it names. The front-end makes it
//! void by a request that ends the virtqueue's life (GET_VRING_BASE, a reset), and a driver by
//! setting up its ring again, which clears the device event area (see
//! [`crate::packed`]).
//!
//! # Layout
//! Words of 8 bytes in the byte order of the host:
//!
//! | word | content |
//! |---|---|
//! | 0 | [`MAGIC`], plus the number of the header that is valid (0 or 1); else there is no record |
//! | 1 to 7 | left to the owner of the file ([`CrashRecord::UNUSED`]) |
//! | 8 to 15 | header 0: identity (7 words), progress |
//! | 16 to 23 | header 1 |
//! | 24 on | the two lists, each with one word for each descriptor of the ring |
//!
//! There are two headers so that the identity changes with one store, too. Only this process and
//! those before it write the file, but what is read from it is checked all the same: a damaged
//! record is no record.

use std::fs::File;
use std::ops::Range;

use crate::config::VirtqueueLayout;
use crate::memory::{FilePlace, GuestArray, GuestMemory, MappedRegion, MemoryError, RegionSpec};

/// The first word of a valid record, with the version of its layout.
const MAGIC: u64 = 0x7672_7265_6301_0000;

const HEADERS: [u16; 2] = [8, 16];
const IDENTITY_WORDS: u16 = 7;
const LIST: u16 = 24;
const WORD: u64 = 8;

/// A completed chain, as it will become a used descriptor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct CompletedChain {
    pub(crate) id: u16,
    pub(crate) slots: u16,
    pub(crate) written: u32,
}

crate::memory::impl_byte_valued!(CompletedChain);
const _: () = assert!(size_of::<CompletedChain>() == 8);

/// The virtqueue that a record belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordOwner {
    pub(crate) layout: VirtqueueLayout,
    pub(crate) file: FilePlace,
}

/// What the record of a virtqueue says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Recorded {
    /// The base with which the front-end started the virtqueue then, in the form of SET_VRING_BASE.
    pub(crate) first_base: u32,
    /// The last publish.
    pub(crate) progress: Progress,
}

/// The last publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    /// The position where it began, in the form of SET_VRING_BASE.
    pub(crate) start: u16,
    /// The number of its chains.
    chains: u16,
    /// The number of their list, 0 or 1.
    list: u16,
}

impl Progress {
    /// No publish since `position`.
    fn at(position: u16) -> Self {
        Self {
            start: position,
            chains: 0,
            list: 0,
        }
    }

    fn from_word(word: u64) -> Self {
        let part = |shift: u32| u16::try_from(word >> shift & 0xffff).unwrap_or(0);
        Self {
            start: part(0),
            chains: part(16),
            list: part(32),
        }
    }

    #[inline(always)]
    fn to_word(self) -> u64 {
        u64::from(self.start) | u64::from(self.chains) << 16 | u64::from(self.list) << 32
    }
}

/// The record of one packed virtqueue, mapped from a file.
#[derive(Debug, Clone)]
pub struct CrashRecord {
    /// The words before the list.
    words: GuestArray<u64>,
    lists: [GuestArray<CompletedChain>; 2],
    /// The number of the list that the next publish uses.
    next_list: u16,
    first_base: u32,
    /// The word with the progress in the header that is valid.
    progress: u16,
}

impl CrashRecord {
    /// What makes a record void when it is written to the beginning of it.
    pub const VOID: [u8; 8] = [0; 8];

    /// The bytes of a record that it does not use.
    pub const UNUSED: Range<u64> = WORD..8 * WORD;

    /// The number of bytes of the record of a virtqueue with `size` descriptors.
    #[must_use]
    pub const fn bytes(size: u16) -> u64 {
        Self::list_offset(2, size)
    }

    // `u64::from` is not const.
    #[allow(clippy::cast_lossless)]
    const fn list_offset(list: u64, size: u16) -> u64 {
        WORD * (LIST as u64 + list * size as u64)
    }

    /// The record at `offset` of `file`, which must be a multiple of the page size, for a virtqueue
    /// of `size` descriptors. `first_base` is the base with which the front-end started it, and
    /// with which it would start it again after a crash.
    ///
    /// # Errors
    /// When the file is shorter than that, or cannot be mapped.
    pub fn map(file: File, offset: u64, size: u16, first_base: u32) -> Result<Self, MemoryError> {
        let spec = RegionSpec {
            guest_addr: 0,
            size: Self::bytes(size),
            user_addr: 0,
            file_offset: offset,
        };
        let region = MappedRegion::map(spec, file)?;
        let memory = GuestMemory::new(vec![region.into()])?;
        let unmapped = MemoryError::Unknown(0, spec.size);
        let list = |list| memory.user_array(Self::list_offset(list, size), size);
        let (Some(words), Some(first), Some(second)) =
            (memory.user_array(0, LIST), list(0), list(1))
        else {
            return Err(unmapped);
        };
        Ok(Self {
            words,
            lists: [first, second],
            next_list: 0,
            first_base,
            progress: HEADERS[0] + IDENTITY_WORDS,
        })
    }

    /// The base with which the front-end starts the virtqueue now.
    pub(crate) fn first_base(&self) -> u32 {
        self.first_base
    }

    /// The words that tell virtqueues apart, after the base and the size.
    fn identity(owner: &RecordOwner) -> [u64; 6] {
        let RecordOwner { layout, file } = owner;
        [
            layout.desc,
            layout.avail,
            layout.used,
            file.device,
            file.inode,
            file.offset,
        ]
    }

    /// The number of the valid header.
    fn valid_header(&self) -> Option<usize> {
        match self.words.acquire(0).checked_sub(MAGIC)? {
            0 => Some(0),
            1 => Some(1),
            _ => None,
        }
    }

    /// The header of `owner`, if the record is that of `owner`, and the base in it.
    fn header_of(&self, owner: &RecordOwner) -> Option<(u16, u32)> {
        let header = HEADERS[self.valid_header()?];
        let start = self.words.get(header);
        let is_same = start >> 32 == u64::from(owner.layout.size)
            && (header + 1..)
                .zip(Self::identity(owner))
                .all(|(index, word)| self.words.get(index) == word);
        let first_base = u32::try_from(start & u64::from(u32::MAX)).ok()?;
        is_same.then_some((header, first_base))
    }

    /// What the record says of `owner`, if it is that of `owner`.
    pub(crate) fn of(&self, owner: &RecordOwner) -> Option<Recorded> {
        let (header, first_base) = self.header_of(owner)?;
        let word = self.words.acquire(header + IDENTITY_WORDS);
        Some(Recorded {
            first_base,
            progress: Progress::from_word(word),
        })
    }

    /// The chains of a publish; `None` when the record is damaged.
    pub(crate) fn chains(&self, progress: Progress) -> Option<Vec<CompletedChain>> {
        let list = self.lists.get(usize::from(progress.list))?;
        (progress.chains <= list.len())
            .then(|| (0..progress.chains).map(|index| list.get(index)).collect())
    }

    /// Records that `owner` has come to `position`, if the record is that of `owner`, and keeps the
    /// base in it.
    pub(crate) fn advance(&mut self, owner: &RecordOwner, position: u16) {
        if let Some((header, _)) = self.header_of(owner) {
            self.progress = header + IDENTITY_WORDS;
            self.words
                .release(self.progress, Progress::at(position).to_word());
        }
    }

    /// Makes this the record of `owner`, which continues at `position`.
    pub(crate) fn begin(&mut self, owner: &RecordOwner, position: u16) {
        if self.of(owner).map(|recorded| recorded.first_base) == Some(self.first_base) {
            self.advance(owner, position);
            return;
        }
        let at = Progress::at(position);
        let start = u64::from(self.first_base) | u64::from(owner.layout.size) << 32;
        let identity = [start].into_iter().chain(Self::identity(owner));
        let next = self.valid_header().map_or(0, |valid| 1 - valid);
        let header = HEADERS[next];
        for (index, word) in (header..).zip(identity) {
            self.words.set(index, word);
        }
        self.progress = header + IDENTITY_WORDS;
        self.words.release(self.progress, at.to_word());
        self.words.release(0, MAGIC + u64::from(next == 1));
    }

    /// Records that `chains` are about to be published at the position `start`.
    #[inline(always)]
    pub(crate) fn record(&mut self, start: u16, chains: &[CompletedChain]) {
        let list = self.next_list;
        self.lists[usize::from(list & 1)].set_range(chains);
        self.next_list = list ^ 1;
        let progress = Progress {
            start,
            // A ring has at most 32,768 descriptors, and a chain at least one.
            chains: u16::try_from(chains.len()).unwrap_or(u16::MAX),
            list,
        };
        self.words.release(self.progress, progress.to_word());
    }
}

#[cfg(test)]
mod tests;
