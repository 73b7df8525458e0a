//! The system calls that the standard library lacks: TUN ioctls, vectored I/O on guest memory, a
//! netlink socket. This is the only file of the crate with `unsafe` code. Every function is safe to
//! call with any arguments and returns the kernel's result.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_short, c_uint};
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use arrayvec::ArrayVec;
use virtionet_virtqueue::memory::GuestSlice;

/// The most segments that one `readv` or `writev` accepts.
pub(crate) const IOV_MAX: usize = 1024;

/// How often an interrupted call is repeated. Calls on a TAP do not sleep, so once is usually
/// enough.
const MAX_EINTR_RETRIES: usize = 8;

/// The number of bytes of an interface's name, including the final zero.
const IFNAMSIZ: usize = 16;

/// Opens the TUN driver, without an interface, for calls that never block.
// syscalls: openat
pub(crate) fn open_tun() -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
}

/// `struct ifreq` with flags in its union. The kernel reads and writes 40 bytes of it on 64-bit
/// machines and 32 on others.
#[repr(C, align(8))]
struct Ifreq {
    name: [u8; IFNAMSIZ],
    flags: c_short,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<Ifreq>() >= size_of::<libc::ifreq>());

impl Ifreq {
    fn new(name: &str, flags: c_int) -> io::Result<Self> {
        let mut request = Self {
            name: [0; IFNAMSIZ],
            flags: c_short::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?,
            rest: [0; 22],
        };
        // The last byte stays zero.
        request.name[..IFNAMSIZ - 1]
            .get_mut(..name.len())
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(name.as_bytes());
        Ok(request)
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|&byte| byte == 0);
        let name = &self.name[..end.unwrap_or(IFNAMSIZ)];
        String::from_utf8_lossy(name).into_owned()
    }
}

/// Makes `tun` a queue of the multiqueue TAP `name`, which the kernel creates if it does not exist.
/// Returns the interface's name, which the kernel chooses where `name` contains `%d`. The queue is
/// attached at once.
// syscalls: ioctl(TUNSETIFF)
pub(crate) fn attach_device(tun: BorrowedFd<'_>, name: &str) -> io::Result<String> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let mut request = Ifreq::new(name, flags)?;
    // SAFETY: `request` is alive, not borrowed elsewhere, and at least as long as the ifreq that
    // the kernel reads and writes; on another kind of file the call fails.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(request.name())
}

/// The present name of the interface of which `tun` is a queue. Fails when it was deleted.
// syscalls: ioctl(TUNGETIFF)
pub(crate) fn interface_name(tun: BorrowedFd<'_>) -> io::Result<String> {
    let mut request = Ifreq::new("", 0)?;
    // SAFETY: `request` is alive, not borrowed elsewhere, and at least as long as the ifreq that
    // the kernel writes; on another kind of file the call fails.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    Ok(request.name())
}

/// Attaches or detaches the queue `tun`: the kernel steers frames to attached queues only.
/// Detaching drops the frames that wait in the queue.
// syscalls: ioctl(TUNSETQUEUE)
pub(crate) fn set_queue_attached(tun: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let flags = if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    let request = Ifreq::new("", flags)?;
    // SAFETY: `request` is alive and at least as long as the ifreq that the kernel reads.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
}

/// Sets the length of the virtio-net header, for every queue of the TAP.
// syscalls: ioctl(TUNSETVNETHDRSZ)
pub(crate) fn set_vnet_hdr_len(tun: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    let len = c_int::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel reads one int, which is alive.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })
}

/// Makes the virtio-net header little-endian on every machine.
// syscalls: ioctl(TUNSETVNETLE)
pub(crate) fn set_little_endian(tun: BorrowedFd<'_>) -> io::Result<()> {
    let yes: c_int = 1;
    // SAFETY: the kernel reads one int, which is alive.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETVNETLE, &raw const yes) })
}

/// Sets the offloads that the reader accepts (`TUN_F_*`), for every queue of the TAP.
// syscalls: ioctl(TUNSETOFFLOAD)
pub(crate) fn set_offload(tun: BorrowedFd<'_>, offload: c_uint) -> io::Result<()> {
    // SAFETY: the argument is a number, not a pointer.
    check(unsafe {
        libc::ioctl(
            tun.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(offload),
        )
    })
}

/// Opens a netlink socket to the kernel's table of interfaces. An unconnected netlink socket sends
/// to the kernel, so plain reads and writes are enough.
// syscalls: socket
pub(crate) fn netlink_socket() -> io::Result<File> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no argument is a pointer.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    check(fd)?;
    // SAFETY: `fd` was opened just now and has no other owner.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// The effective user of this thread.
// syscalls: geteuid
pub(crate) fn effective_uid() -> u32 {
    // SAFETY: the call has no arguments and cannot fail.
    unsafe { libc::geteuid() }
}

/// The segments of one `writev`: at most `N`, borrowed for `'a`.
pub(crate) struct IovecList<'a, const N: usize> {
    list: ArrayVec<libc::iovec, N>,
    _borrowed: PhantomData<&'a [u8]>,
}

/// The list holds `N` segments already.
#[derive(Debug)]
pub(crate) struct IovecListFull;

impl<'a, const N: usize> IovecList<'a, N> {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self {
            list: ArrayVec::new(),
            _borrowed: PhantomData,
        }
    }

    /// Appends private memory.
    #[inline(always)]
    pub(crate) fn push_bytes(&mut self, bytes: &'a [u8]) -> Result<(), IovecListFull> {
        let iovec = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        self.list.try_push(iovec).map_err(|_| IovecListFull)
    }

    /// Appends guest memory.
    #[inline(always)]
    pub(crate) fn push_slices(
        &mut self,
        slices: &'a [GuestSlice<'a>],
    ) -> Result<(), IovecListFull> {
        self.list
            .try_extend_from_slice(GuestSlice::as_iovecs(slices))
            .map_err(|_| IovecListFull)
    }

    /// Writes all segments with one system call.
    // syscalls: writev
    #[inline(always)]
    pub(crate) fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let count = c_int::try_from(self.list.len()).unwrap_or(c_int::MAX);
        retry_on_eintr(|| {
            // SAFETY: the segments are borrowed for 'a, so they are mapped; the kernel only reads
            // them.
            unsafe { libc::writev(fd.as_raw_fd(), self.list.as_ptr(), count) }
        })
    }
}

/// Reads once into `bytes`; returns the number of bytes.
// syscalls: read
#[inline(always)]
pub(crate) fn read(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
    retry_on_eintr(|| {
        // SAFETY: `bytes` is borrowed for the call, and its own length is passed.
        unsafe { libc::read(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) }
    })
}

/// Reads once into `slices` and, after they are full, into `overflow`; returns the number of bytes
/// in both. More than `N` - 1 slices are an error.
// syscalls: readv
#[inline(always)]
pub(crate) fn read_into<const N: usize>(
    fd: BorrowedFd<'_>,
    slices: &[GuestSlice<'_>],
    overflow: &mut [u8],
) -> io::Result<usize> {
    let mut list = ArrayVec::<libc::iovec, N>::new();
    let last = libc::iovec {
        iov_base: overflow.as_mut_ptr().cast(),
        iov_len: overflow.len(),
    };
    list.try_extend_from_slice(GuestSlice::as_iovecs(slices))
        .and_then(|()| list.try_push(last).map_err(|e| e.simplify()))
        .map_err(|_| io::ErrorKind::InvalidInput)?;
    let count = c_int::try_from(list.len()).unwrap_or(c_int::MAX);
    retry_on_eintr(|| {
        // SAFETY: guest slices are mapped while they are borrowed, and no reference into them
        // exists, so any process may write them at any time; `overflow` is borrowed for the call.
        unsafe { libc::readv(fd.as_raw_fd(), list.as_ptr(), count) }
    })
}

#[inline(always)]
fn retry_on_eintr(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    for _ in 0..MAX_EINTR_RETRIES {
        if let Ok(n) = usize::try_from(call()) {
            return Ok(n);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

fn check(rc: c_int) -> io::Result<()> {
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupted_call_is_repeated_a_limited_number_of_times() {
        let mut calls = 0;
        // The closure must leave an errno behind: a call with a wrong descriptor sets EBADF.
        let bad = retry_on_eintr(|| {
            calls += 1;
            // SAFETY: no file has this number; nothing is read.
            unsafe { libc::read(-1, std::ptr::null_mut(), 0) }
        });
        assert_eq!(bad.unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert_eq!(calls, 1);
        let endless = retry_on_eintr(|| {
            calls += 1;
            // SAFETY: errno is this thread's own.
            unsafe { *libc::__errno_location() = libc::EINTR };
            -1
        });
        assert_eq!(endless.unwrap_err().raw_os_error(), Some(libc::EAGAIN));
        assert_eq!(calls, 1 + MAX_EINTR_RETRIES);
        assert_eq!(retry_on_eintr(|| 7).unwrap(), 7);
    }

    #[test]
    fn name_of_sixteen_bytes_is_refused() {
        assert!(Ifreq::new("fifteen-bytes-x", 2).is_ok());
        assert!(Ifreq::new("sixteen-bytes-xx", 2).is_err());
    }

    #[test]
    fn full_list_refuses_a_further_segment() {
        let mut list = IovecList::<2>::new();
        list.push_bytes(b"a").unwrap();
        list.push_bytes(b"b").unwrap();
        assert!(list.push_bytes(b"c").is_err());
    }
}
