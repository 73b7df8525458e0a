//! The user and the groups as which a thread runs.
//!
//! The kernel keeps them for each thread. The C library's functions change all threads of a
//! process, by a signal to each, which a confined thread could not handle; these change the calling
//! thread only, and threads that it starts inherit it.

use std::io;

use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// A user and the groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The number of the user.
    pub uid: u32,
    /// The number of the group.
    pub gid: u32,
    /// The numbers of the supplementary groups.
    pub groups: Vec<u32>,
}

impl Identity {
    /// Makes the calling thread one of this user and these groups. A thread of root that changes to
    /// another user loses all capabilities.
    ///
    /// # Errors
    /// EPERM when the thread may not change them.
    // syscalls: setgroups setresgid setresuid
    pub fn assume(&self) -> io::Result<()> {
        let groups: Vec<Gid> = self.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        set_thread_groups(&groups)?;
        let gid = Gid::from_raw(self.gid);
        set_thread_res_gid(gid, gid, gid)?;
        let uid = Uid::from_raw(self.uid);
        set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    }
}
