//! Pages of guest memory that have not arrived yet, after a migration by postcopy.
//!
//! In a postcopy migration the guest runs at the destination before all of its pages are there. The
//! kernel reports the first access to a missing page on a userfaultfd, and the thread that made it
//! sleeps until the front-end, which has a copy of that descriptor, has got the page from the source,
//! put it into the memory's file and woken the thread:
//!
//! ```text
//! load or store ── no page in the file ── sleeps ─────────────────── continues with the page
//!                      └── userfaultfd ── front-end ── source ── page ──┘ UFFDIO_WAKE
//! ```
//!
//! **No privilege is needed**, because the descriptor is for accesses in user mode only
//! (UFFD_USER_MODE_ONLY, Linux 5.11). A system call that is given a missing page fails with EFAULT
//! instead of sleeping. So while [`GuestMemory::is_in_postcopy`], frames pass through memory of this
//! process, and no system call gets guest memory.
//!
//! How long a thread sleeps is up to the front-end, so a thread must not hold anything that belongs
//! to another guest when it accesses such memory. When the front-end has gone, nobody would wake the
//! thread. [`MissingPages::abandon`] then replaces the memory with private zeros and wakes it. The
//! pages of the file are never touched by that: one that was filled with zeros here would not be
//! accepted from the source any more.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM, UFFD_USER_MODE_ONLY,
    UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_range, uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE};

use super::{GuestMemory, MappedRegion, to_u64};

/// What the kernel must be able to report: missing pages of memfds, tmpfs and hugetlbfs.
const FEATURES: u32 = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS;

/// Why postcopy is not possible.
#[derive(Debug, thiserror::Error)]
pub enum PostcopyError {
    /// The kernel has no such descriptor.
    #[error(
        "the kernel refuses a userfaultfd for shared memory: {0}; postcopy needs Linux 5.11 with CONFIG_USERFAULTFD"
    )]
    Unsupported(#[source] io::Error),
    /// The missing pages of a region cannot be reported.
    #[error(
        "the kernel cannot report missing pages of the memory region at guest address {guest_addr:#x}: {source}; use memory-backend-memfd, or a file on tmpfs or hugetlbfs"
    )]
    Region {
        /// The first guest physical address of the region.
        guest_addr: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// The front-end has gone.
    #[error("the front-end has disconnected during a postcopy migration")]
    Abandoned,
}

/// The regions of which pages may be missing, and the descriptor on which accesses to these are
/// reported.
#[derive(Debug)]
pub struct MissingPages {
    userfaultfd: OwnedFd,
    registered: Mutex<Registered>,
}

#[derive(Debug)]
enum Registered {
    /// These regions, and further ones may follow.
    Regions(Vec<Arc<MappedRegion>>),
    /// None, and none may follow.
    Closed,
}

impl MissingPages {
    /// Makes a descriptor for regions of this process. None is registered yet.
    ///
    /// # Errors
    /// When the kernel has none for user mode, or not for shared memory.
    // syscalls: userfaultfd(UFFD_USER_MODE_ONLY) ioctl(UFFDIO_API)
    pub fn open() -> Result<Self, PostcopyError> {
        let userfaultfd = userfaultfd().map_err(PostcopyError::Unsupported)?;
        // No feature is requested; the kernel answers with those that it has.
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: 0,
            ioctls: 0,
        };
        control(userfaultfd.as_fd(), UFFDIO_API, &mut api).map_err(PostcopyError::Unsupported)?;
        if api.features & u64::from(FEATURES) != u64::from(FEATURES) {
            let lacking = io::ErrorKind::Unsupported.into();
            return Err(PostcopyError::Unsupported(lacking));
        }
        Ok(Self {
            userfaultfd,
            registered: Mutex::new(Registered::Regions(Vec::new())),
        })
    }

    /// Whether this process can have such a descriptor.
    #[must_use]
    pub fn are_supported() -> bool {
        Self::open().is_ok()
    }

    /// A copy of the descriptor, for the front-end. It does not block.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn copy_of_fd(&self) -> io::Result<OwnedFd> {
        self.userfaultfd.try_clone()
    }

    /// Reports missing pages of `region` from now on. No thread may have accessed it yet.
    ///
    /// # Errors
    /// When its file is not one in memory, it is not made of whole pages, or the front-end has gone.
    // syscalls: ioctl(UFFDIO_REGISTER)
    pub fn register(&self, region: &Arc<MappedRegion>) -> Result<(), PostcopyError> {
        let mut registered = self.registered();
        let Registered::Regions(regions) = &mut *registered else {
            return Err(PostcopyError::Abandoned);
        };
        let mut request = uffdio_register {
            range: range_of(region),
            mode: UFFDIO_REGISTER_MODE_MISSING.into(),
            ioctls: 0,
        };
        self.control(UFFDIO_REGISTER, &mut request)
            .map_err(|source| PostcopyError::Region {
                guest_addr: region.spec.guest_addr,
                source,
            })?;
        // Those that the front-end has removed since are used no more.
        regions.retain(|region| Arc::strong_count(region) > 1);
        regions.push(Arc::clone(region));
        Ok(())
    }

    /// All pages have arrived: from now on none is reported, and no region can be registered.
    // syscalls: ioctl(UFFDIO_UNREGISTER)
    pub fn finish(&self) {
        for region in self.close() {
            // Fails only for a region whose pages were lost, which is registered no more.
            let _ = self.control(UFFDIO_UNREGISTER, &mut range_of(&region));
        }
    }

    /// No more pages will arrive: replaces all regions with private zeros, marks them as lost, and
    /// wakes the threads that wait for pages. No region can be registered from now on. Returns
    /// whether there were any.
    // syscalls: mmap ioctl(UFFDIO_WAKE)
    pub fn abandon(&self) -> bool {
        let regions = self.close();
        for region in &regions {
            region.tracked.replace(region.host(), region.mapping.size());
            // They try again, and find the zeros.
            let _ = self.control(UFFDIO_WAKE, &mut range_of(region));
        }
        !regions.is_empty()
    }

    fn close(&self) -> Vec<Arc<MappedRegion>> {
        match std::mem::replace(&mut *self.registered(), Registered::Closed) {
            Registered::Regions(regions) => regions,
            Registered::Closed => Vec::new(),
        }
    }

    fn registered(&self) -> MutexGuard<'_, Registered> {
        self.registered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn control<T: Argument>(&self, request: u32, argument: &mut T) -> io::Result<()> {
        control(self.userfaultfd.as_fd(), request, argument)
    }
}

impl Drop for MissingPages {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl MappedRegion {
    /// The address of its first byte in this process, by which a front-end finds the page that an
    /// access to it lacks.
    #[must_use]
    pub fn host_base(&self) -> u64 {
        to_u64(self.host().addr())
    }
}

impl GuestMemory {
    /// A snapshot of the same memory of which pages may be missing, or none are.
    #[must_use]
    pub fn with_postcopy(mut self, is_in_postcopy: bool) -> Self {
        self.is_in_postcopy = is_in_postcopy;
        self
    }

    /// Whether pages may be missing. An access then lasts as long as the front-end likes, and a
    /// system call that is given such memory fails.
    #[inline(always)]
    #[must_use]
    pub fn is_in_postcopy(&self) -> bool {
        self.is_in_postcopy
    }
}

fn range_of(region: &MappedRegion) -> uffdio_range {
    uffdio_range {
        start: region.host_base(),
        len: to_u64(region.mapping.size()),
    }
}

fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY.cast_signed();
    // SAFETY: the call reads its argument only.
    let number = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let number = i32::try_from(number).map_err(io::Error::other)?;
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor, and no other value owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The arguments of the requests here, as linux/userfaultfd.h defines them.
trait Argument {}
impl Argument for uffdio_api {}
impl Argument for uffdio_range {}
impl Argument for uffdio_register {}

fn control<T: Argument>(fd: BorrowedFd<'_>, request: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request of this module is made with its own argument, which the kernel reads and
    // writes in this call only. None unmaps memory or changes the contents of a page.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request.into(), ptr::from_mut(argument)) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::super::RegionSpec;
    use super::super::fault::LOSING;
    use super::*;

    const SIZE: u64 = 64 * 1024;

    fn memory_file() -> File {
        // SAFETY: the name is a C string and the flags are memfd_create's own.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the kernel just made this descriptor, and no other value owns it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(SIZE).unwrap();
        file
    }

    fn map(file: &File) -> Arc<MappedRegion> {
        let spec = RegionSpec {
            guest_addr: 0,
            size: SIZE,
            user_addr: 0,
            file_offset: 0,
        };
        Arc::new(MappedRegion::map(spec, file.try_clone().unwrap()).unwrap())
    }

    /// A thread that reads the byte at `addr`, and what it read.
    fn read_byte(
        memory: &Arc<GuestMemory>,
        addr: u64,
    ) -> (thread::JoinHandle<()>, mpsc::Receiver<u8>) {
        let (sender, receiver) = mpsc::channel();
        let memory = Arc::clone(memory);
        let thread = thread::spawn(move || {
            let mut byte = [0];
            assert!(memory.read(addr, &mut byte));
            sender.send(byte[0]).unwrap();
        });
        (thread, receiver)
    }

    fn waits(receiver: &mpsc::Receiver<u8>) -> bool {
        let received = receiver.recv_timeout(Duration::from_millis(100));
        received == Err(mpsc::RecvTimeoutError::Timeout)
    }

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn access_to_a_missing_page_waits_until_the_page_is_there_and_the_thread_is_woken() {
        let file = memory_file();
        let (pages, region) = (MissingPages::open().unwrap(), map(&file));
        pages.register(&region).unwrap();
        let memory = GuestMemory::new(vec![Arc::clone(&region)]).unwrap();
        let memory = Arc::new(memory.with_postcopy(true));
        let (thread, receiver) = read_byte(&memory, 0x2001);
        assert!(waits(&receiver));
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], 0x2000).unwrap();
        assert!(waits(&receiver), "it is not woken yet");
        let mut range = range_of(&region);
        pages.control(UFFDIO_WAKE, &mut range).unwrap();
        assert_eq!(receiver.recv_timeout(LIMIT), Ok(7));
        thread.join().unwrap();
        // A page that is there is not waited for.
        std::os::unix::fs::FileExt::write_all_at(&file, &[8; 4096], 0x3000).unwrap();
        let mut byte = [0];
        assert!(memory.read(0x3000, &mut byte));
        assert_eq!(byte, [8]);
        pages.finish();
        assert!(memory.read(0x5000, &mut byte));
        assert_eq!(byte, [0]);
        assert!(!memory.is_lost());
        assert!(matches!(
            pages.register(&region),
            Err(PostcopyError::Abandoned)
        ));
    }

    #[test]
    fn abandoned_memory_is_zeros_that_do_not_reach_the_file() {
        let _losing = LOSING.lock().unwrap();
        let file = memory_file();
        let (pages, region) = (MissingPages::open().unwrap(), map(&file));
        pages.register(&region).unwrap();
        let memory = Arc::new(GuestMemory::new(vec![region]).unwrap().with_postcopy(true));
        let (thread, receiver) = read_byte(&memory, 0x2001);
        assert!(waits(&receiver));
        pages.abandon();
        assert_eq!(receiver.recv_timeout(LIMIT), Ok(0));
        thread.join().unwrap();
        assert!(memory.is_lost());
        assert!(memory.write(0x2000, &[1]));
        use std::os::unix::fs::MetadataExt;
        assert_eq!(file.metadata().unwrap().blocks(), 0, "no page was made");
    }

    #[test]
    fn system_call_that_is_given_a_missing_page_fails_at_once() {
        let file = memory_file();
        let (pages, region) = (MissingPages::open().unwrap(), map(&file));
        pages.register(&region).unwrap();
        let null = File::open("/dev/zero").unwrap();
        // SAFETY: the range lies in the region's mapping.
        let read = unsafe { libc::read(null.as_raw_fd(), region.host().cast(), 100) };
        assert_eq!(read, -1);
        assert_eq!(
            io::Error::last_os_error().raw_os_error(),
            Some(libc::EFAULT)
        );
        pages.finish();
    }

    #[test]
    fn region_in_a_file_on_a_disk_is_refused() {
        let file = crate::testing::memfd(SIZE);
        let pages = MissingPages::open().unwrap();
        match pages.register(&map(&file)) {
            Err(error) => assert!(
                error.to_string().contains("memory-backend-memfd"),
                "{error}"
            ),
            // The directory of temporary files may itself be a tmpfs.
            Ok(()) => pages.finish(),
        }
    }
}
