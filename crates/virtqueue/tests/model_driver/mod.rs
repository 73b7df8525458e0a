//! A driver of both formats for loom models: a virtqueue of four descriptors that is accessed as
//! Linux accesses it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use loom::sync::atomic::fence;
use virtionet_virtqueue::constants::{
    VIRTQ_DESC_F_AVAIL, VIRTQ_DESC_F_USED, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_PACKED_EVENT_F_WRAP_CTR, VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE,
};
use virtionet_virtqueue::memory::{GuestArray, GuestMemory};
use virtionet_virtqueue::{Direction, VirtqueueConfig, VirtqueueLayout};

/// The number of descriptors.
const SIZE: u16 = 4;
// Offsets of the parts from the base of the virtqueue. The used elements lie 4 bytes behind USED,
// and so are aligned to 8 bytes.
const AVAIL: u64 = 0x100;
const USED: u64 = 0x204;
/// A guest address for buffers that are never accessed.
const BUFFER: u64 = 0x2000;

/// The format of a virtqueue.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    pub packed: bool,
    pub event_idx: bool,
}

impl Format {
    pub const ALL: [Self; 4] = {
        let split = Self {
            packed: false,
            event_idx: false,
        };
        let packed = Self {
            packed: true,
            ..split
        };
        [
            split,
            Self {
                event_idx: true,
                ..split
            },
            packed,
            Self {
                event_idx: true,
                ..packed
            },
        ]
    };
}

/// The driver. The token of a chain is its number, and each is used once.
pub struct Driver {
    format: Format,
    /// The descriptors as 64-bit words.
    desc: GuestArray<u64>,
    /// The descriptors as 16-bit words, for their flags.
    desc16: GuestArray<u16>,
    avail: GuestArray<u16>,
    used: GuestArray<u16>,
    used_elements: GuestArray<u64>,
    /// The device's event suppression area as the one word that Linux reads.
    device_event: GuestArray<u32>,
    /// The next descriptor to write, counted through all laps.
    next: u16,
    /// The number of chains added (split: the next available index).
    added: u16,
    /// The number of chains published (split: the available index).
    published: u16,
    /// The position at the last call of `is_kick_needed`.
    kicked: u16,
    /// Packed: index and value of the flags of the first unpublished chain, which are written last.
    held: Option<(u16, u16)>,
    /// The number of chains collected.
    collected: u16,
    /// The number of descriptors of each chain, by token.
    counts: [u16; 4],
    /// Packed: the descriptor that the device uses next, counted through all laps.
    used_at: u16,
}

impl Driver {
    /// A virtqueue without chains, and the configuration of its device.
    pub fn new(memory: &Arc<GuestMemory>, base: u64, format: Format) -> (Self, VirtqueueConfig) {
        let size = u64::from(SIZE);
        memory.create_model_cells(base, 8, 2 * usize::from(SIZE));
        memory.create_model_cells(base + AVAIL, 2, usize::from(SIZE) + 3);
        if format.packed {
            memory.create_model_cells(base + USED, 4, 1);
        } else {
            memory.create_model_cells(base + USED, 2, 2);
            memory.create_model_cells(base + USED + 4, 8, usize::from(SIZE));
            memory.create_model_cells(base + USED + 4 + 8 * size, 2, 1);
        }
        let config = VirtqueueConfig {
            layout: VirtqueueLayout {
                size: SIZE,
                desc: base,
                avail: base + AVAIL,
                used: base + USED,
            },
            base: if format.packed { 0x8000_8000 } else { 0 },
            direction: Direction::Writable,
            packed: format.packed,
            event_idx: format.event_idx,
            indirect: false,
            min_len: 0,
        };
        let driver = Self {
            format,
            desc: memory.user_array(base, 2 * SIZE).unwrap(),
            desc16: memory.user_array(base, 8 * SIZE).unwrap(),
            avail: memory.user_array(base + AVAIL, SIZE + 3).unwrap(),
            used: memory.user_array(base + USED, 3 + 4 * SIZE).unwrap(),
            used_elements: memory.user_array(base + USED + 4, SIZE).unwrap(),
            device_event: memory.user_array(base + USED, 1).unwrap(),
            next: 0,
            added: 0,
            published: 0,
            kicked: 0,
            held: None,
            collected: 0,
            counts: [0; 4],
            used_at: 0,
        };
        (driver, config)
    }

    /// Writes a chain of `count` descriptors and `len` bytes, which the device cannot see yet.
    pub fn add(&mut self, token: u16, len: u32, count: u16) {
        self.counts[usize::from(token)] = count;
        let first = self.next;
        for n in 0..count {
            let rest = len / u32::from(count) + if n == 0 { len % u32::from(count) } else { 0 };
            let flags = VRING_DESC_F_WRITE | if n + 1 < count { VRING_DESC_F_NEXT } else { 0 };
            match self.format.packed {
                false => self.write_split(first + n, rest, flags),
                true => self.write_packed(first + n, token, rest, flags, n == 0),
            }
        }
        self.next += count;
        if !self.format.packed {
            self.avail.set(2 + self.added % SIZE, first % SIZE);
        }
        self.added += 1;
    }

    fn write_split(&self, at: u16, len: u32, flags: u16) {
        let next = u64::from((at + 1) % SIZE);
        self.desc.set(2 * (at % SIZE), BUFFER);
        let rest = u64::from(len) | u64::from(flags) << 32 | next << 48;
        self.desc.set(2 * (at % SIZE) + 1, rest);
    }

    /// Writes a descriptor. The flags of the first one of a batch are written by `publish`.
    fn write_packed(&mut self, at: u16, token: u16, len: u32, flags: u16, head: bool) {
        let index = at % SIZE;
        let mut all = flags;
        all |= if lap_is_odd(at) {
            VIRTQ_DESC_F_USED
        } else {
            VIRTQ_DESC_F_AVAIL
        };
        self.desc.set(2 * index, BUFFER);
        let old = self.desc16.get(8 * index + 7);
        let rest = u64::from(len) | u64::from(token) << 32 | u64::from(old) << 48;
        self.desc.set(2 * index + 1, rest);
        if head && self.held.is_none() {
            self.held = Some((8 * index + 7, all));
        } else {
            self.desc16.set(8 * index + 7, all);
        }
    }

    /// Makes all added chains visible to the device.
    pub fn publish(&mut self) {
        self.published = self.added;
        match self.held.take() {
            Some((at, flags)) => self.desc16.release(at, flags),
            None => self.avail.release(1, self.added),
        }
    }

    /// Whether the device wants a kick for the chains published since the last call of this method.
    pub fn is_kick_needed(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let old = self.kicked;
        self.kicked = self.position();
        match (self.format.packed, self.format.event_idx) {
            (false, false) => self.used.get(0) & 1 == 0,
            (false, true) => is_passed(self.used.get(2 + 4 * SIZE), self.kicked, old),
            (true, _) => {
                let [low, high, flags, _] = self.device_event.get(0).to_le_bytes();
                match u16::from(flags) {
                    0 => true,
                    VRING_PACKED_EVENT_FLAG_DESC => {
                        let event = u16::from_le_bytes([low, high]);
                        let mut at = event & !VRING_PACKED_EVENT_F_WRAP_CTR;
                        if lap_is_odd(self.kicked) == (event & VRING_PACKED_EVENT_F_WRAP_CTR != 0) {
                            at = at.wrapping_sub(SIZE);
                        }
                        let new = self.kicked % SIZE;
                        is_passed(at, new, new.wrapping_sub(self.kicked - old))
                    }
                    _ => false,
                }
            }
        }
    }

    /// The number of chains (split) or descriptors (packed) published.
    fn position(&self) -> u16 {
        match self.format.packed {
            false => self.published,
            true => self.next,
        }
    }

    /// The next used chain, if there is one: its token and the number of bytes written.
    pub fn collect(&mut self) -> Option<(u16, u32)> {
        if !self.is_used() {
            return None;
        }
        let (token, written) = match self.format.packed {
            false => {
                let element = self.used_elements.get(self.collected % SIZE);
                // The head identifies the chain, because chains take descriptors in order.
                let head = u16::try_from(element & 0xffff_ffff).unwrap();
                let token = self.token_at(head);
                (token, u32::try_from(element >> 32).unwrap())
            }
            true => {
                let rest = self.desc.get(2 * (self.used_at % SIZE) + 1);
                let token = u16::try_from(rest >> 32 & 0xffff).unwrap();
                (token, u32::try_from(rest & 0xffff_ffff).unwrap())
            }
        };
        self.collected += 1;
        self.used_at += self.counts[usize::from(token)];
        Some((token, written))
    }

    /// The token of the chain in flight whose head this is.
    fn token_at(&self, head: u16) -> u16 {
        let mut at = 0;
        for token in 0..4 {
            if token >= self.collected && at % SIZE == head {
                return token;
            }
            at += self.counts[usize::from(token)];
        }
        panic!("descriptor {head} is not the head of a chain in flight")
    }

    /// Whether the next chain is used.
    fn is_used(&self) -> bool {
        if !self.format.packed {
            return self.used.acquire(1) != self.collected;
        }
        let flags = self.desc16.acquire(8 * (self.used_at % SIZE) + 7);
        let want = !lap_is_odd(self.used_at);
        (flags & VIRTQ_DESC_F_AVAIL != 0) == want && (flags & VIRTQ_DESC_F_USED != 0) == want
    }

    /// Tells the device that calls are not needed.
    pub fn disable_calls(&mut self) {
        match (self.format.packed, self.format.event_idx) {
            (false, false) => self.avail.set(0, 1),
            (false, true) => {}
            (true, _) => self.avail.set(1, VRING_PACKED_EVENT_FLAG_DISABLE),
        }
    }

    /// Asks for a call for the next used chain. Returns whether there is one already.
    pub fn enable_calls(&mut self) -> bool {
        match (self.format.packed, self.format.event_idx) {
            (false, false) => self.avail.set(0, 0),
            (false, true) => self.avail.set(2 + SIZE, self.collected),
            (true, false) => self.avail.set(1, 0),
            (true, true) => {
                let wrap = if lap_is_odd(self.used_at) {
                    0
                } else {
                    VRING_PACKED_EVENT_F_WRAP_CTR
                };
                self.avail.set(0, (self.used_at % SIZE) | wrap);
                self.avail.release(1, VRING_PACKED_EVENT_FLAG_DESC);
            }
        }
        fence(Ordering::SeqCst);
        self.is_used()
    }
}

/// Whether descriptor `at`, counted through all laps, is in the second, fourth, ... lap.
fn lap_is_odd(at: u16) -> bool {
    at / SIZE % 2 == 1
}

/// Whether moving from `old` to `new` passes `event` (virtio 1.3 §2.7.7.2).
fn is_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
