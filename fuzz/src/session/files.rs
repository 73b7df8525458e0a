//! The descriptors that a front-end sends, and the memory that it shares.
//!
//! The front-end accesses the memory with system calls only, because it may truncate the file: an
//! access to a mapping of its own would then raise SIGBUS, which only the device handles.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use virtionet_guest::hostile;

/// The number of vrings of the device.
pub const RINGS: usize = 4;
/// The number of descriptors of a vring that is set up correctly.
pub const RING_SIZE: u16 = 64;

/// The size of the shared file in bytes.
pub const FILE_SIZE: u64 = 0x10_0000;
/// Guest address and offset in the file of buffers.
const DATA: u64 = 0x2_0000;
/// The distance of two vrings in the file, and that of the areas of one.
pub const RING_DISTANCE: u64 = 0x4000;
pub const USED_AREA: u64 = 0x1000;
pub const AVAIL_AREA: u64 = 0x2000;

/// The largest value of an eventfd's counter.
const MAX_COUNT: u64 = u64::MAX - 1;

const VRING_DESC_F_WRITE: u16 = 2;
const VIRTQ_DESC_F_AVAIL: u16 = 1 << 7;
const VIRTQ_DESC_F_USED: u16 = 1 << 15;

/// The kind of a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FdKind {
    /// What the request needs.
    Suitable,
    /// The file of guest memory.
    Memory,
    /// A memfd that is shorter than most regions.
    ShortMemory,
    /// A new eventfd.
    EventFd,
    PipeReader,
    PipeWriter,
    Socket,
    Directory,
    Zero,
    Null,
}

const KINDS: [FdKind; 9] = [
    FdKind::Memory,
    FdKind::ShortMemory,
    FdKind::EventFd,
    FdKind::PipeReader,
    FdKind::PipeWriter,
    FdKind::Socket,
    FdKind::Directory,
    FdKind::Zero,
    FdKind::Null,
];

impl From<u8> for FdKind {
    /// Half of the values mean what the request needs.
    fn from(byte: u8) -> Self {
        match byte {
            0..=127 => Self::Suitable,
            n => KINDS[usize::from(n - 128) % KINDS.len()],
        }
    }
}

/// One descriptor of each kind, and the notifications of each vring.
pub struct Files {
    memory: File,
    short: File,
    event: OwnedFd,
    pipe: (PipeReader, PipeWriter),
    sockets: (UnixStream, UnixStream),
    directory: File,
    zero: File,
    null: File,
    pub kicks: [OwnedFd; RINGS],
    pub calls: [OwnedFd; RINGS],
    packed: bool,
    /// The position at which each vring's driver continues.
    next: [u16; RINGS],
}

impl Files {
    /// `sealable` is whether the device may seal the memory against shrinking.
    pub fn new(packed: bool, sealable: bool) -> Self {
        let memory = memfd(FILE_SIZE);
        if !sealable {
            hostile::forbid_seals(&memory).unwrap();
        }
        Self {
            memory,
            short: memfd(4096),
            event: new_eventfd(),
            pipe: io::pipe().unwrap(),
            sockets: UnixStream::pair().unwrap(),
            directory: File::open("/").unwrap(),
            zero: File::open("/dev/zero").unwrap(),
            null: File::open("/dev/null").unwrap(),
            kicks: [(); RINGS].map(|()| new_eventfd()),
            calls: [(); RINGS].map(|()| new_eventfd()),
            packed,
            next: [0; RINGS],
        }
    }

    /// The descriptor of a kind. `suitable` is what the request needs.
    pub fn fd(&self, kind: FdKind, suitable: FdKind) -> BorrowedFd<'_> {
        match kind {
            FdKind::Suitable if suitable == FdKind::Suitable => self.null.as_fd(),
            FdKind::Suitable => self.fd(suitable, suitable),
            FdKind::Memory => self.memory.as_fd(),
            FdKind::ShortMemory => self.short.as_fd(),
            FdKind::EventFd => self.event.as_fd(),
            FdKind::PipeReader => self.pipe.0.as_fd(),
            FdKind::PipeWriter => self.pipe.1.as_fd(),
            FdKind::Socket => self.sockets.0.as_fd(),
            FdKind::Directory => self.directory.as_fd(),
            FdKind::Zero => self.zero.as_fd(),
            FdKind::Null => self.null.as_fd(),
        }
    }

    /// The bytes from `offset` on; what the file does not have is left out.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let len = self.memory.read_at(&mut bytes, offset).unwrap_or(0);
        bytes.truncate(len);
        bytes
    }

    /// Writes to the shared file.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let end = offset.saturating_add(bytes.len() as u64);
        if end <= FILE_SIZE {
            self.memory.write_all_at(bytes, offset).unwrap();
        }
    }

    /// Truncates the shared file, unless it is sealed.
    pub fn truncate(&self, len: u64) {
        let _refused = self.memory.set_len(len.min(FILE_SIZE));
    }

    /// Empties a vring. Its driver begins at the first descriptor.
    pub fn reset_ring(&mut self, ring: usize) {
        let offset = RING_DISTANCE * ring as u64;
        self.write(offset, &[0; 0x3000]);
        self.next[ring] = 0;
    }

    /// Makes a buffer of `len` bytes available. Its content is whatever the memory contains, which
    /// is a broadcast frame without offloads while it is zeros. `flaw` changes the flags.
    pub fn offer(&mut self, ring: usize, len: u32, flaw: u16) {
        let next = self.next[ring];
        self.next[ring] = next.wrapping_add(1);
        let index = next % RING_SIZE;
        let area = RING_DISTANCE * ring as u64;
        let addr = DATA + 0x1_0000 * ring as u64 + u64::from(index) * 0x400;
        let direction = match ring % 2 {
            0 => VRING_DESC_F_WRITE,
            _ => 0,
        };
        let descriptor = area + 16 * u64::from(index);
        let body = [&addr.to_le_bytes()[..], &len.to_le_bytes()].concat();
        self.write(descriptor, &body);
        if self.packed {
            let is_first_lap = (next / RING_SIZE).is_multiple_of(2);
            let available = match is_first_lap {
                true => VIRTQ_DESC_F_AVAIL,
                false => VIRTQ_DESC_F_USED,
            };
            let flags = (direction | available) ^ flaw;
            self.write(descriptor + 12, &index.to_le_bytes());
            self.write(descriptor + 14, &flags.to_le_bytes());
        } else {
            self.write(descriptor + 12, &(direction ^ flaw).to_le_bytes());
            self.write(descriptor + 14, &index.to_le_bytes());
            let avail = area + AVAIL_AREA;
            let entry = avail + 4 + 2 * u64::from(index);
            self.write(entry, &index.to_le_bytes());
            self.write(avail + 2, &self.next[ring].to_le_bytes());
        }
    }

    /// Notifies the device of available buffers.
    pub fn kick(&self, ring: usize) {
        let _full = rustix::io::write(&self.kicks[ring], &1_u64.to_ne_bytes());
    }

    /// Makes the device's next interrupt of a vring block.
    pub fn block_calls(&self, ring: usize) {
        let call = &self.calls[ring];
        let _empty = rustix::io::read(call, &mut [0_u8; 8]);
        let _full = rustix::io::write(call, &MAX_COUNT.to_ne_bytes());
        hostile::make_blocking(call.as_raw_fd()).unwrap();
    }
}

fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn memfd(len: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("fuzz", flags).unwrap());
    file.set_len(len).unwrap();
    file
}
