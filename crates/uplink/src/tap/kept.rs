//! A TAP that another program, such as a service manager, keeps open while no process of this program
//! runs. Then the interface stays, with its addresses and routes, although it is not persistent.
//!
//! An open file of the first queue is enough for that: the kernel deletes the interface with its last
//! queue, attached or not.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use virtionet_virtio_net::uplink::UplinkError;

use super::{Tap, TapConfig, check_not_shared, error, wait_for_release};
use crate::rtnetlink::LinkTable;
use crate::sys;

impl Tap {
    /// An open file that keeps the interface; `None` of an interface that this program has not
    /// created, and that stays by itself.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn file_to_keep(&self) -> io::Result<Option<OwnedFd>> {
        if !self.is_created_by_us() {
            return Ok(None);
        }
        let state = self.state.lock();
        state.first.fd().try_clone_to_owned().map(Some)
    }

    /// The TAP of `file`, which [`Tap::file_to_keep`] of an earlier process was. Frames that wait in the
    /// queue are dropped, as they are when a front-end disconnects.
    ///
    /// # Errors
    /// When the interface was deleted or renamed, another process uses it too, or it cannot be
    /// configured.
    pub fn from_kept(config: &TapConfig, file: OwnedFd) -> Result<Self, UplinkError> {
        let gone = |source| error::interface_gone(&config.name, source);
        let file = File::from(file);
        let name = sys::interface_name(file.as_fd()).map_err(|error| gone(Some(error)))?;
        if name != config.name {
            return Err(gone(None));
        }
        let links = LinkTable::open().map_err(error::link_table_unavailable)?;
        let link = wait_for_release(&links, &name, 1)?.ok_or_else(|| gone(None))?;
        check_not_shared(&link, 1)?;
        // After a crash it is attached. Else it is detached already, which is an error.
        let _ = sys::set_queue_attached(file.as_fd(), false);
        Self::with_detached_queue(config, links, &link, file, true)
    }
}
