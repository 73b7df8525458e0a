//! Which files may hold guest memory or a dirty log.
//!
//! A page fault in a file of a network file system, or of one that a process serves (FUSE), may
//! take for ever, and the thread that has it holds a vring. Files in memory are what front-ends
//! use (memfd, /dev/shm, hugetlbfs).

use std::fs::File;
use std::os::fd::AsFd;

use rustix::fs::fstatfs;
use virtionet_base::RateLimiter;

use crate::error::RequestError;
use crate::foreign_fd::ForeignFd;

/// File systems in memory (linux/magic.h): tmpfs, which memfds are on, too, and hugetlbfs.
const IN_MEMORY: [u32; 2] = [0x0102_1994, 0x9584_58f6];

/// File systems whose pages another machine or another process provides (linux/magic.h and, for
/// the last two, the projects' own headers).
const REMOTE: [(u32, &str); 12] = [
    (0x6573_5546, "FUSE"),
    (0x0000_6969, "NFS"),
    (0x0000_517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x00c3_6400, "Ceph"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x0102_1997, "9P"),
    (0x7375_7245, "Coda"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
];

/// Where a file lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Location {
    Memory,
    Disk(u32),
    Remote(&'static str),
}

impl Location {
    fn of(magic: u32) -> Self {
        let remote = REMOTE.iter().find(|(number, _)| *number == magic);
        match remote {
            Some((_, name)) => Self::Remote(name),
            None if IN_MEMORY.contains(&magic) => Self::Memory,
            None => Self::Disk(magic),
        }
    }
}

/// Takes `fd` as the file of `what`: a memory region or a dirty log. `disk_lines` limits the
/// warnings about files on disks.
///
/// # Errors
/// When its file system could hold up a thread that reads it.
pub(crate) fn from_fd(
    foreign: ForeignFd,
    what: &'static str,
    disk_lines: &RateLimiter,
) -> Result<File, RequestError> {
    // syscalls: fstatfs
    let location = match foreign.as_fd().map(|fd| fstatfs(fd.as_fd())) {
        // The kernel's numbers have 32 bits, and the field's type differs between machines.
        Some(Ok(status)) => Location::of((status.f_type & 0xffff_ffff).try_into().unwrap_or(0)),
        _ => Location::Disk(0),
    };
    match location {
        Location::Remote(file_system) => {
            return Err(RequestError::RemoteMemory { what, file_system });
        }
        Location::Disk(magic) => {
            if let Some(suppressed) = disk_lines.allow() {
                tracing::warn!(
                    suppressed,
                    "{what} lies in a file on a disk (file system {magic:#x}); this works, but a slow disk stalls the guest's network: use memory-backend-memfd"
                );
            }
        }
        Location::Memory => {}
    }
    let fd = foreign.into_known();
    fd.map(File::from).ok_or(RequestError::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_other_machines_and_processes_are_told_from_local_ones() {
        assert_eq!(Location::of(0x0102_1994), Location::Memory);
        assert_eq!(Location::of(0x9584_58f6), Location::Memory);
        assert_eq!(Location::of(0x6573_5546), Location::Remote("FUSE"));
        assert_eq!(Location::of(0x6969), Location::Remote("NFS"));
        assert_eq!(Location::of(0xef53), Location::Disk(0xef53), "ext4");
    }
}
