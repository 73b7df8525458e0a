//! Namespaces of its own: what the process would mount, or share by System V IPC, is seen by nobody
//! else. What the host mounts later still appears in it.

use std::io;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Puts the calling thread, which must be the only one, into a mount and an IPC namespace of its
/// own.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN.
// syscalls: unshare mount
pub fn enter() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    Ok(())
}
