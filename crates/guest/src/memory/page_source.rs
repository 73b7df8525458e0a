//! Memory whose pages arrive when they are first accessed, as at the destination of a migration by
//! postcopy.
//!
//! The contents of the memory are put aside, and its file is emptied. Two userfaultfds report accesses
//! to missing pages: that of the guest, which is this process's mapping of the memory, and that of the
//! back-end. A thread writes each page that is asked for to the file, and wakes who waits for it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use linux_raw_sys::general::{
    UFFD_API, UFFD_USER_MODE_ONLY, UFFDIO_REGISTER_MODE_MISSING, uffd_msg, uffdio_api,
    uffdio_range, uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE};
use virtionet_virtqueue::memory::RegionSpec;

use super::{GuestRam, PAGE, RamError, to_u64};

/// Pause between two looks for accesses.
const INTERVAL: Duration = Duration::from_micros(200);

/// The pages of a guest's memory that have not arrived, and the thread that provides them. All arrive
/// when it is dropped.
#[derive(Debug)]
pub struct PageSource {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    ram: GuestRam,
    contents: Vec<u8>,
    arrived: Mutex<Vec<bool>>,
    guest: Side,
    back_end: Side,
    is_withholding: AtomicBool,
    /// Accesses of the back-end that were reported.
    back_end_faults: AtomicUsize,
    must_end: AtomicBool,
}

/// A process that accesses the memory.
#[derive(Debug)]
struct Side {
    userfaultfd: File,
    /// Where it has mapped each region; empty until that is known.
    bases: Mutex<Vec<u64>>,
}

impl Side {
    fn new(userfaultfd: File, bases: Vec<u64>) -> Self {
        Self {
            userfaultfd,
            bases: Mutex::new(bases),
        }
    }

    fn bases(&self) -> MutexGuard<'_, Vec<u64>> {
        self.bases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The offset in the file of the next access that was reported.
    fn next_access(&self, regions: &[RegionSpec]) -> Option<u64> {
        let mut message = [0; size_of::<uffd_msg>()];
        let read = (&self.userfaultfd).read(&mut message).ok()?;
        // struct uffd_msg: the address follows an event number and flags of 8 bytes each.
        let address = message.get(16..24).filter(|_| read == message.len())?;
        let address = u64::from_ne_bytes(address.try_into().ok()?);
        let at = |base: u64, region: &RegionSpec| {
            let offset = address.checked_sub(base)?;
            (offset < region.size).then_some(region.file_offset + offset)
        };
        let bases = self.bases();
        let mut regions = bases.iter().zip(regions);
        regions.find_map(|(base, region)| at(*base, region))
    }

    /// Wakes who waits for the page at `offset` of the file.
    fn wake(&self, regions: &[RegionSpec], offset: u64) {
        for (base, region) in self.bases().iter().zip(regions) {
            if let Some(at) = offset.checked_sub(region.file_offset)
                && at < region.size
            {
                let start = base + at;
                let mut range = uffdio_range { start, len: PAGE };
                let _ = control(&self.userfaultfd, UFFDIO_WAKE, &mut range);
            }
        }
    }
}

impl PageSource {
    /// Takes the contents of `ram` away; they arrive when the guest or the back-end, whose userfaultfd
    /// is `back_end`, accesses them.
    ///
    /// # Errors
    /// When the kernel refuses a userfaultfd, or the file cannot be emptied.
    pub fn new(ram: &GuestRam, back_end: File) -> Result<Self, RamError> {
        let failed = RamError::PageSource;
        let (file, regions) = (ram.file(), ram.regions());
        let len = file.metadata().map_err(failed)?.len();
        let mut contents = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_exact_at(&mut contents, 0).map_err(failed)?;
        punch(file, len).map_err(failed)?;
        let guest = userfaultfd().map_err(failed)?;
        for region in &regions {
            let (start, len) = (region.user_addr, region.size);
            let mut request = uffdio_register {
                range: uffdio_range { start, len },
                mode: UFFDIO_REGISTER_MODE_MISSING.into(),
                ioctls: 0,
            };
            control(&guest, UFFDIO_REGISTER, &mut request).map_err(failed)?;
        }
        let bases = regions.iter().map(|region| region.user_addr).collect();
        let shared = Arc::new(Shared {
            ram: ram.clone(),
            arrived: Mutex::new(vec![
                false;
                contents.len() / usize::try_from(PAGE).unwrap_or(1)
            ]),
            contents,
            guest: Side::new(guest, bases),
            back_end: Side::new(back_end, Vec::new()),
            is_withholding: AtomicBool::new(false),
            back_end_faults: AtomicUsize::new(0),
            must_end: AtomicBool::new(false),
        });
        let server = Arc::clone(&shared);
        Ok(Self {
            shared,
            thread: Some(std::thread::spawn(move || server.serve())),
        })
    }

    /// Says where the back-end has mapped each region.
    pub fn set_back_end_bases(&self, bases: Vec<u64>) {
        *self.shared.back_end.bases() = bases;
    }

    /// Provides no page to the back-end for as long as this is set.
    pub fn withhold(&self, withholds: bool) {
        self.shared
            .is_withholding
            .store(withholds, Ordering::Relaxed);
    }

    /// The number of accesses of the back-end that were reported.
    #[must_use]
    pub fn back_end_faults(&self) -> usize {
        self.shared.back_end_faults.load(Ordering::Relaxed)
    }

    /// Lets all pages arrive.
    pub fn provide_all(&self) {
        let pages = to_u64(self.shared.contents.len()) / PAGE;
        (0..pages).for_each(|page| self.shared.provide(page * PAGE));
    }
}

impl Drop for PageSource {
    fn drop(&mut self) {
        self.provide_all();
        self.shared.must_end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for region in self.shared.ram.regions() {
            let (start, len) = (region.user_addr, region.size);
            let mut range = uffdio_range { start, len };
            let _ = control(
                &self.shared.guest.userfaultfd,
                UFFDIO_UNREGISTER,
                &mut range,
            );
        }
    }
}

impl Shared {
    fn serve(&self) {
        let regions = self.ram.regions();
        let mut withheld = Vec::new();
        while !self.must_end.load(Ordering::Relaxed) {
            while let Some(offset) = self.guest.next_access(&regions) {
                self.provide(offset);
            }
            while let Some(offset) = self.back_end.next_access(&regions) {
                self.back_end_faults.fetch_add(1, Ordering::Relaxed);
                withheld.push(offset);
            }
            if !self.is_withholding.load(Ordering::Relaxed) {
                withheld.drain(..).for_each(|offset| self.provide(offset));
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// Provides the page with the byte at `offset` of the file.
    fn provide(&self, offset: u64) {
        let offset = offset - offset % PAGE;
        let (Ok(start), Ok(page)) = (usize::try_from(offset), usize::try_from(PAGE)) else {
            return;
        };
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(contents), Some(has_arrived)) = (
            self.contents.get(start..start + page),
            arrived.get_mut(start / page),
        ) else {
            return;
        };
        if !*has_arrived {
            // The waiting threads stay asleep if that fails, which the test notices.
            *has_arrived = self.ram.file().write_all_at(contents, offset).is_ok();
        }
        let regions = self.ram.regions();
        self.guest.wake(&regions, offset);
        self.back_end.wake(&regions, offset);
    }
}

fn userfaultfd() -> std::io::Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY.cast_signed();
    // SAFETY: the call reads its argument only.
    let number = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let number = i32::try_from(number).map_err(std::io::Error::other)?;
    if number < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor, and no other value owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(number) });
    let mut api = uffdio_api {
        api: UFFD_API.into(),
        features: 0,
        ioctls: 0,
    };
    control(&file, UFFDIO_API, &mut api)?;
    Ok(file)
}

/// The arguments of the requests here, as linux/userfaultfd.h defines them.
trait Argument {}
impl Argument for uffdio_api {}
impl Argument for uffdio_range {}
impl Argument for uffdio_register {}

fn control<T: Argument>(fd: &impl AsFd, request: u32, argument: &mut T) -> std::io::Result<()> {
    let (fd, argument) = (fd.as_fd().as_raw_fd(), std::ptr::from_mut(argument));
    // SAFETY: each request is made with its own argument, which the kernel reads and writes in this
    // call only.
    match unsafe { libc::ioctl(fd, request.into(), argument) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Takes the first `len` bytes out of `file`.
fn punch(file: &File, len: u64) -> std::io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let len = i64::try_from(len).map_err(std::io::Error::other)?;
    // SAFETY: the call reads numbers only.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, len) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
