//! Survives pages of guest memory that vanish.
//!
//! The file of a region belongs to the front-end. When it is truncated, or its file system is full,
//! an access to a page that has no memory raises SIGBUS, which would end the process with all its
//! guests. The handler here replaces the whole region with private zero pages and marks it as lost,
//! so that the access continues. The thread that accessed the memory then asks [`LossWatch`] and
//! stops the virtqueues of the region's owner, which need not be the virtqueue that was being
//! processed: a switch copies from the memory of one guest to that of another.
//!
//! ```text
//! load or store ── SIGBUS ── handler: find region, map zeros over it, mark it, count
//!       └───────── continues with zeros ── LossWatch sees the count ── is one of my regions marked?
//! ```
//!
//! The whole region is replaced, not only one page, because each page would become a mapping of its
//! own, of which a process has only 65,530.
//!
//! The handler takes no lock and allocates nothing. It finds regions in a table of atomics, where
//! an entry whose `start` is 0 is free. A region cannot be unmapped while a thread accesses it, so
//! the entry that the handler looks for is stable; entries that others change meanwhile do not
//! match.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Once, OnceLock};

/// Number of regions of all devices together.
const MAX_TRACKED_REGIONS: usize = 8192;

static REGIONS: [Entry; MAX_TRACKED_REGIONS] = [const { Entry::new() }; MAX_TRACKED_REGIONS];

/// Number of entries that have ever been used: the handler looks no further.
static USED_ENTRIES: AtomicUsize = AtomicUsize::new(0);

/// Number of regions that were lost so far.
static LOSSES: AtomicU64 = AtomicU64::new(0);

/// What the process did on SIGBUS before.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

struct Entry {
    /// First address; 0 while the entry is free, 1 while it is being filled in.
    start: AtomicUsize,
    len: AtomicUsize,
    is_lost: AtomicPtr<AtomicBool>,
}

impl Entry {
    const fn new() -> Self {
        Self {
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            is_lost: AtomicPtr::new(ptr::null_mut()),
        }
    }
}

/// A mapped region that the handler knows. It must be dropped before the region is unmapped.
#[derive(Debug)]
pub(super) struct TrackedRegion {
    /// Position in the table; `None` when the table was full.
    entry: Option<usize>,
    /// On the heap, because the handler has its address.
    is_lost: Box<AtomicBool>,
}

impl TrackedRegion {
    /// Tracks the `len` bytes at `start`, which are a mapping of their own.
    pub(super) fn new(start: *mut u8, len: usize) -> Self {
        let is_lost = Box::new(AtomicBool::new(false));
        let entry = REGIONS.iter().position(|entry| {
            entry
                .start
                .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        if let Some(index) = entry {
            let entry = &REGIONS[index];
            entry.len.store(len, Ordering::Relaxed);
            let flag = ptr::from_ref(&*is_lost).cast_mut();
            entry.is_lost.store(flag, Ordering::Relaxed);
            entry.start.store(start.addr(), Ordering::Release);
            USED_ENTRIES.fetch_max(index + 1, Ordering::Release);
        }
        Self { entry, is_lost }
    }

    /// Replaces the region, the `len` bytes at `start`, with zeros, as the loss of its pages does.
    /// Returns false when the kernel refuses that.
    pub(super) fn replace(&self, start: *mut u8, len: usize) -> bool {
        let is_replaced = map_zeros(start.addr(), len);
        if is_replaced {
            self.is_lost.store(true, Ordering::Release);
            LOSSES.fetch_add(1, Ordering::Release);
        }
        is_replaced
    }

    /// Whether the region's memory was replaced with zeros.
    pub(super) fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Acquire)
    }
}

impl Drop for TrackedRegion {
    fn drop(&mut self) {
        if let Some(index) = self.entry {
            REGIONS[index].start.store(0, Ordering::Release);
        }
    }
}

/// Notices whether regions were lost since it last looked.
#[derive(Debug, Clone, Copy, Default)]
pub struct LossWatch {
    seen: u64,
}

impl LossWatch {
    /// Whether a region of any guest was lost since the last call.
    #[inline(always)]
    pub fn has_changed(&mut self) -> bool {
        let now = LOSSES.load(Ordering::Relaxed);
        std::mem::replace(&mut self.seen, now) != now
    }
}

/// Lets the process survive lost guest memory from now on. Faults elsewhere are treated as before.
///
/// # Errors
/// When the kernel refuses the signal handler.
pub fn survive_lost_memory() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = install());
    result
}

fn install() -> io::Result<()> {
    let mut previous = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: reads the present action into `previous`, which has its size.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), previous.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded, so it is filled in.
    let previous = *PREVIOUS.get_or_init(|| unsafe { previous.assume_init() });
    let mut action = previous;
    action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature of SA_SIGINFO and does only what is allowed in one.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo_t, which for SIGBUS has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    if replace_region(address) {
        return;
    }
    // Not guest memory: do what was done before when the access is repeated.
    if let Some(previous) = PREVIOUS.get() {
        // SAFETY: `previous` is an action that the kernel returned.
        unsafe { libc::sigaction(libc::SIGBUS, previous, ptr::null_mut()) };
    }
}

/// Replaces the region that contains `address` with zeros; false when there is none.
fn replace_region(address: usize) -> bool {
    let used = USED_ENTRIES.load(Ordering::Acquire);
    for entry in &REGIONS[..used.min(MAX_TRACKED_REGIONS)] {
        let start = entry.start.load(Ordering::Acquire);
        let len = entry.len.load(Ordering::Relaxed);
        let is_lost = entry.is_lost.load(Ordering::Relaxed);
        if start <= 1
            || address
                .checked_sub(start)
                .is_none_or(|offset| offset >= len)
        {
            continue;
        }
        // SAFETY: errno belongs to the thread; the interrupted code must not see it change.
        let errno = unsafe { *libc::__errno_location() };
        let is_mapped = map_zeros(start, len);
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        if !is_mapped {
            return false;
        }
        // SAFETY: the entry is in use, so its TrackedRegion lives and owns the flag.
        unsafe { &*is_lost }.store(true, Ordering::Release);
        LOSSES.fetch_add(1, Ordering::Release);
        return true;
    }
    false
}

/// Maps private zeros over the `len` bytes at `start`, which are one mapping of this module's
/// regions.
fn map_zeros(start: usize, len: usize) -> bool {
    // SAFETY: the range is one mapping of ours, which nobody unmaps while a thread accesses it.
    let mapped = unsafe {
        libc::mmap(
            ptr::without_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

/// Held by each test that loses memory, because the losses of the whole process are counted.
#[cfg(test)]
pub(super) static LOSING: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{GuestMemory, MappedRegion, RegionSpec};
    use super::*;
    use crate::testing::memfd;

    const SIZE: u64 = 64 * 1024;

    /// Memory in the first [`SIZE`] bytes of `file`.
    fn memory_in(file: &std::fs::File) -> GuestMemory {
        let spec = RegionSpec {
            guest_addr: 0,
            size: SIZE,
            user_addr: 0,
            file_offset: 0,
        };
        let region = MappedRegion::map(spec, file.try_clone().unwrap()).unwrap();
        GuestMemory::new(vec![Arc::new(region)]).unwrap()
    }

    #[test]
    fn memory_with_a_punched_hole_reads_as_zeros_there_and_is_not_lost() {
        survive_lost_memory().unwrap();
        let file = memfd(SIZE);
        let memory = memory_in(&file);
        assert!(memory.write(4094, b"head") && memory.write(8192, b"tail"));
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        // SAFETY: the call takes numbers only, and the descriptor is open.
        let punched = unsafe { libc::fallocate(fd, mode, 4096, 4096) };
        assert_eq!(punched, 0, "{}", io::Error::last_os_error());
        let mut bytes = [1; 4];
        assert!(memory.read(4094, &mut bytes));
        assert_eq!(&bytes, b"he\0\0");
        assert!(memory.write(4096, b"new") && memory.read(8192, &mut bytes));
        assert_eq!(&bytes, b"tail");
        assert!(!memory.is_lost());
    }

    /// Runs `test` in a thread that has a file system of `bytes` bytes at `path`.
    fn with_small_file_system(path: &std::path::Path, bytes: u64, test: impl FnOnce() + Send) {
        let mount = |args: &[&str]| {
            let status = std::process::Command::new("mount").args(args).status();
            assert!(status.unwrap().success(), "mount {args:?}");
        };
        std::fs::create_dir_all(path).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: takes no pointer; the namespace is this thread's and its children's.
                if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
                    eprintln!("skipped: a file system of its own needs root");
                    return;
                }
                mount(&["--make-rprivate", "/"]);
                let size = format!("size={bytes}");
                let target = path.to_str().unwrap();
                mount(&["-t", "tmpfs", "-o", &size, "none", target]);
                test();
            });
        });
        std::fs::remove_dir(path).unwrap();
    }

    #[test]
    fn memory_that_a_full_file_system_cannot_provide_is_charged_to_its_owner() {
        let _losing = LOSING.lock();
        survive_lost_memory().unwrap();
        let name = format!("virtionet-full-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        with_small_file_system(&path, SIZE, || {
            let make = |name: &str| {
                let mut options = std::fs::File::options();
                options.read(true).write(true).create_new(true);
                let file = options.open(path.join(name)).unwrap();
                file.set_len(SIZE).unwrap();
                file
            };
            let victim = memory_in(&make("victim"));
            let other = memory_in(&make("other"));
            assert!(victim.write(0, b"first") && other.write(0, &[7; 4096]));
            let mut filler = make("filler");
            while io::Write::write_all(&mut filler, &[1; 4096]).is_ok() {}
            assert!(victim.write(SIZE - 8, b"no space"));
            assert!(victim.is_lost() && !other.is_lost());
            let mut bytes = [0; 4096];
            assert!(other.read(0, &mut bytes));
            assert_eq!(bytes, [7; 4096]);
            assert!(victim.read(0, &mut bytes[..5]));
            assert_eq!(bytes[..5], [0; 5]);
        });
    }

    #[test]
    fn memory_that_is_truncated_reads_as_zeros_and_is_charged_to_its_owner() {
        let _losing = LOSING.lock();
        survive_lost_memory().unwrap();
        let mut watch = LossWatch::default();
        watch.has_changed();
        let spec = RegionSpec {
            guest_addr: 0,
            size: SIZE,
            user_addr: 0,
            file_offset: 0,
        };
        let [victim, other] = [(); 2].map(|()| {
            // A file that takes no seals, as on hugetlbfs.
            let file = memfd(SIZE);
            let region = MappedRegion::map_unsealed(spec, file.try_clone().unwrap()).unwrap();
            (file, GuestMemory::new(vec![Arc::new(region)]).unwrap())
        });
        assert!(victim.1.write(0, b"before") && other.1.write(0, b"other"));
        victim.0.set_len(4096).unwrap();
        let mut bytes = [1; 8];
        assert!(victim.1.read(SIZE - 8, &mut bytes));
        assert_eq!(bytes, [0; 8]);
        assert!(
            victim.1.write(SIZE - 8, &[2; 8]),
            "it can be written as well"
        );
        assert!(watch.has_changed());
        assert!(victim.1.is_lost() && !other.1.is_lost());
        let mut bytes = [0; 5];
        assert!(other.1.read(0, &mut bytes));
        assert_eq!(&bytes, b"other");
        assert!(!watch.has_changed());
    }
}
