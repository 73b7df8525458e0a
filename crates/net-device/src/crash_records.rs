//! The file with the crash records of one device, one for each vring.
//!
//! It is named after the device's vhost-user socket, which is what the front-end of a new process
//! has in common with that of the old one. It is locked for as long as the process lives, so that no
//! other daemon uses it. Where there can be no such file, an unnamed one in memory takes its place:
//! the vrings then survive the end of a session, but not that of the process.
//!
//! The file also says which features the front-end was offered: a front-end decides once what its guest
//! may use, and must be offered that again.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{
    FallocateFlags, FlockOperation, MemfdFlags, OFlags, fallocate, flock, memfd_create,
};
use rustix::io::Errno;
use virtionet_virtio_net::features::Features;
use virtionet_virtqueue::memory::MemoryError;
use virtionet_virtqueue::{CrashRecord, MAX_QUEUE_SIZE};

use crate::feature_set::FeatureSet;

/// The distance of two records in the file: more than that of the largest virtqueue takes, and a
/// multiple of every page size. Only the pages that are used take memory.
const RECORD_DISTANCE: u64 = 1 << 20;
const _: () = assert!(CrashRecord::bytes(MAX_QUEUE_SIZE) <= RECORD_DISTANCE);

/// How long a daemon that was killed may keep the lock of its file.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// The first word of the note of the offered features. The others are the process that they were
/// offered to, the virtio features and the protocol features.
const OFFER_MAGIC: u64 = 0x7672_6f66_6672_0000;

/// The number of bytes of that note.
const OFFER_BYTES: usize = 32;

/// Where it is: in the first vring's record, which does not use these bytes.
const OFFER_OFFSET: u64 = CrashRecord::UNUSED.start;
const _: () = assert!(CrashRecord::UNUSED.end - OFFER_OFFSET >= 32);

/// The suffix of the file's name.
const SUFFIX: &str = ".vrings";

/// The crash records of one device.
#[derive(Debug)]
pub struct CrashRecords {
    file: File,
}

/// Why a vring has no crash record.
#[derive(Debug, thiserror::Error)]
pub enum CrashRecordError {
    /// The file does not become larger.
    #[error("its file cannot hold it: {0}")]
    File(#[from] io::Error),
    /// The record cannot be mapped.
    #[error(transparent)]
    Map(#[from] MemoryError),
}

impl CrashRecords {
    /// Opens the file of the device with the vhost-user socket `socket`, in the folder `folder`,
    /// which is created if it does not exist.
    ///
    /// # Errors
    /// When the file cannot be created, or another process uses it.
    pub fn open(folder: &Path, socket: &Path) -> io::Result<Self> {
        // A confined process makes no folder.
        if !folder.is_dir() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(folder)?;
        }
        let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(flags)
            .open(folder.join(file_name(socket)?))?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        lock(&file)?;
        Ok(Self { file })
    }

    /// Records that last as long as this process.
    ///
    /// # Errors
    /// When the kernel refuses the memory.
    pub fn in_memory() -> io::Result<Self> {
        let file = memfd_create("virtionetd-vrings", MemfdFlags::CLOEXEC)?;
        Ok(Self { file: file.into() })
    }

    /// The records of the daemon before this one, in this file. Its lock belongs to the open file,
    /// and so to both.
    #[must_use]
    pub fn inherited(file: OwnedFd) -> Self {
        Self { file: file.into() }
    }

    /// A copy of the descriptor of the file.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn copy_of_file(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// The record of vring `index`, which has `size` descriptors and was started by the front-end
    /// with `first_base`.
    ///
    /// # Errors
    /// When the file system is full, or the record cannot be mapped.
    pub fn record(
        &self,
        index: u16,
        size: u16,
        first_base: u32,
    ) -> Result<CrashRecord, CrashRecordError> {
        let offset = offset(index);
        // Memory that does not exist would be missed at an access, when it is too late.
        // syscalls: fallocate
        fallocate(
            &self.file,
            FallocateFlags::empty(),
            offset,
            CrashRecord::bytes(size),
        )
        .map_err(io::Error::from)?;
        // syscalls: fcntl(F_DUPFD_CLOEXEC), fstat, mmap
        let file = self.file.try_clone()?;
        Ok(CrashRecord::map(file, offset, size, first_base)?)
    }

    /// Makes the record of vring `index` void, which is not started.
    ///
    /// # Errors
    /// When the kernel refuses to write.
    pub fn forget(&self, index: u16) -> io::Result<()> {
        let offset = offset(index);
        // syscalls: statx, pwrite64
        match self.file.metadata()?.len() > offset {
            true => self.file.write_all_at(&CrashRecord::VOID, offset),
            // There was no such record.
            false => Ok(()),
        }
    }
}

impl CrashRecords {
    /// What the front-end of process `pid` was offered, if it was the last one.
    #[must_use]
    pub fn offered_to(&self, pid: u32) -> Option<FeatureSet> {
        let mut note = [0; OFFER_BYTES];
        // syscalls: pread64
        self.file.read_exact_at(&mut note, OFFER_OFFSET).ok()?;
        let mut words = [0; OFFER_BYTES / 8];
        for (word, bytes) in words.iter_mut().zip(note.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().ok()?);
        }
        let [magic, process, virtio, protocol] = words;
        (magic == OFFER_MAGIC && process == u64::from(pid)).then_some(FeatureSet {
            virtio: Features(virtio),
            protocol,
        })
    }

    /// Notes what the front-end of process `pid` is offered.
    ///
    /// # Errors
    /// When the file system is full.
    pub fn note_offered(&self, pid: u32, offer: FeatureSet) -> io::Result<()> {
        let FeatureSet { virtio, protocol } = offer;
        let words = [OFFER_MAGIC, u64::from(pid), virtio.0, protocol];
        let note = words.map(u64::to_ne_bytes).concat();
        // syscalls: pwrite64
        self.file.write_all_at(&note, OFFER_OFFSET)
    }
}

/// Locks the file, and waits for up to [`LOCK_TIMEOUT`] for a process that is about to end.
fn lock(file: &File) -> io::Result<()> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_INTERVAL);
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::other("another process uses the file"));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn offset(index: u16) -> u64 {
    u64::from(index) * RECORD_DISTANCE
}

/// The name of the file that belongs to a socket. Letters, digits, dots and underscores of the
/// socket's path stay, `/` becomes `-`, and all else becomes `\x` and two digits, so that no two
/// paths have the same name.
fn file_name(socket: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(socket)?;
    let mut name = String::new();
    for byte in OsStr::as_bytes(path.as_os_str()).iter().skip(1) {
        match byte {
            b'/' => name.push('-'),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' => name.push(char::from(*byte)),
            other => name.push_str(&format!("\\x{other:02x}")),
        }
    }
    name.push_str(SUFFIX);
    Ok(name.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that is removed at the end of a test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let name = format!("crash-records-{name}-{}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn file_name_differs_for_each_path_of_a_socket() {
        for (socket, name) in [
            ("/run/vm1.sock", "run-vm1.sock.vrings"),
            ("/run/a-b/c", "run-a\\x2db-c.vrings"),
            ("/run/a/b-c", "run-a-b\\x2dc.vrings"),
        ] {
            assert_eq!(file_name(Path::new(socket)).unwrap(), Path::new(name));
        }
        assert!(
            file_name(Path::new("relative"))
                .unwrap()
                .to_str()
                .unwrap()
                .contains('-')
        );
    }

    #[test]
    fn file_that_another_process_uses_is_refused() {
        let folder = Folder::new("locked");
        let socket = Path::new("/run/x.sock");
        let first = CrashRecords::open(&folder.0, socket).unwrap();
        let error = CrashRecords::open(&folder.0, socket).unwrap_err();
        assert_eq!(error.to_string(), "another process uses the file");
        drop(first);
        CrashRecords::open(&folder.0, socket).unwrap();
    }

    #[test]
    fn file_of_a_process_that_ends_is_waited_for() {
        let folder = Folder::new("ending");
        let socket = Path::new("/run/y.sock");
        let first = CrashRecords::open(&folder.0, socket).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                drop(first);
            });
            CrashRecords::open(&folder.0, socket).unwrap();
        });
    }

    #[test]
    fn file_is_readable_by_its_owner_only_and_no_link_is_followed() {
        use std::os::unix::fs::PermissionsExt;

        let folder = Folder::new("mode");
        let _records = CrashRecords::open(&folder.0, Path::new("/s")).unwrap();
        let path = folder.0.join("s.vrings");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let victim = folder.0.join("victim");
        std::fs::write(&victim, "").unwrap();
        std::os::unix::fs::symlink(&victim, folder.0.join("t.vrings")).unwrap();
        CrashRecords::open(&folder.0, Path::new("/t")).unwrap_err();
    }

    #[test]
    fn record_takes_the_memory_of_its_own_virtqueue_only() {
        use std::os::unix::fs::MetadataExt;

        let records = CrashRecords::in_memory().unwrap();
        records.record(255, 256, 0).unwrap();
        let blocks = records.file.metadata().unwrap().blocks();
        assert!(blocks * 512 <= 64 << 10, "{blocks} blocks");
        records.forget(255).unwrap();
        records.forget(256).unwrap();
    }

    #[test]
    fn offered_features_are_those_of_the_last_front_end_in_the_next_process() {
        let folder = Folder::new("offer");
        let open = || CrashRecords::open(&folder.0, Path::new("/o")).unwrap();
        let offer = |virtio, protocol| FeatureSet {
            virtio: Features(virtio),
            protocol,
        };
        assert_eq!(open().offered_to(7), None);
        open().note_offered(7, offer(1 << 40, 3)).unwrap();
        let records = open();
        // The vring does not disturb them.
        records.record(0, 256, 0).unwrap();
        records.forget(0).unwrap();
        assert_eq!(records.offered_to(7), Some(offer(1 << 40, 3)));
        assert_eq!(records.offered_to(8), None);
        records.note_offered(8, offer(5, 0)).unwrap();
        assert_eq!(records.offered_to(7), None);
        assert_eq!(records.offered_to(8), Some(offer(5, 0)));
        records.file.write_all_at(&[0], OFFER_OFFSET + 3).unwrap();
        assert_eq!(records.offered_to(8), None);
    }
}
