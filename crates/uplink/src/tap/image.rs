//! The image of a TAP, with which another process continues to use its queues.
//!
//! A queue belongs to an open file, not to a process. So the next process gets the files: the kernel
//! sees no queue come or go, and frames that wait in one stay there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtionet_virtio_net::uplink::UplinkError;

use super::queue::{TapQueue, TapShared};
use super::{NO_OFFLOADS, Tap, TapConfig, error, find_link};
use crate::rtnetlink::LinkTable;

/// The image of a TAP, with descriptors of type `F`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapImage<F> {
    /// The interface's name.
    pub name: String,
    /// Whether the interface disappears with its last queue.
    pub is_created_by_us: bool,
    /// The open queues, by the indices of their queue pairs.
    pub queues: BTreeMap<u16, F>,
    /// The queue pairs of the attached queues, by the kernel's numbers of the queues.
    pub attached: Vec<u16>,
}

impl<F> TapImage<F> {
    /// The same image with each descriptor replaced by what `replace` makes of it.
    ///
    /// # Errors
    /// The first error of `replace`.
    pub fn map<G, E>(self, mut replace: impl FnMut(F) -> Result<G, E>) -> Result<TapImage<G>, E> {
        let mut queues = BTreeMap::new();
        for (pair, file) in self.queues {
            queues.insert(pair, replace(file)?);
        }
        Ok(TapImage {
            name: self.name,
            is_created_by_us: self.is_created_by_us,
            queues,
            attached: self.attached,
        })
    }
}

impl Tap {
    /// The image of this TAP.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn to_image(&self) -> io::Result<TapImage<Arc<OwnedFd>>> {
        let state = self.state.lock();
        let mut queues = BTreeMap::new();
        for queue in state.queues() {
            let file = queue.fd().try_clone_to_owned()?;
            queues.insert(queue.pair(), Arc::new(file));
        }
        Ok(TapImage {
            name: self.shared.name.clone(),
            is_created_by_us: self.is_created_by_us(),
            queues,
            attached: self.shared.attached.lock().pairs.clone(),
        })
    }

    /// The TAP of an image. It changes nothing about the interface, and belongs to the other process
    /// until [`Tap::own`] is called.
    ///
    /// # Errors
    /// When the image has no queue of pair 0, or there is no such interface.
    pub fn from_image(
        config: &TapConfig,
        image: &TapImage<Arc<OwnedFd>>,
    ) -> Result<Self, UplinkError> {
        let links = LinkTable::open().map_err(error::link_table_unavailable)?;
        let link = find_link(&links, &image.name)?;
        let missing = || error::interface_gone(&image.name, None);
        let file = copy(image.queues.get(&0).ok_or_else(missing)?)
            .map_err(|source| error::setup_failed(&image.name, source))?;
        let shared = TapShared::new(image.name.clone(), NO_OFFLOADS.header_len);
        shared.attached.lock().pairs.clone_from(&image.attached);
        shared.is_owner.store(false, Ordering::Relaxed);
        let shared = Arc::new(shared);
        let first = TapQueue::inherited(file, 0, Arc::clone(&shared));
        let tap = Self::with_first_queue(config, shared, links, link.index, first);
        tap.is_created_by_us
            .store(image.is_created_by_us, Ordering::Relaxed);
        Ok(tap)
    }

    /// Brings a TAP that was made of an earlier image of the same one up to date. Its queues are used
    /// when they are opened.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn update_from_image(&self, image: &TapImage<Arc<OwnedFd>>) -> io::Result<()> {
        let mut state = self.state.lock();
        self.shared
            .attached
            .lock()
            .pairs
            .clone_from(&image.attached);
        state.first.read_attachment();
        for (pair, file) in image.queues.iter().filter(|(pair, _)| **pair != 0) {
            state.inherited.insert(*pair, copy(file)?);
        }
        Ok(())
    }

    /// Makes the queues of a TAP that was made of an image those of this process, which from then on
    /// detaches the ones that it closes.
    pub fn own(&self) {
        self.shared.is_owner.store(true, Ordering::Relaxed);
    }
}

fn copy(file: &Arc<OwnedFd>) -> io::Result<File> {
    file.try_clone().map(File::from)
}
