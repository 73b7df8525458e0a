//! What the front-end has configured of one vring.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::GuestMemory;

use crate::backend::VringStart;
use crate::request::VringAreas;
use crate::vring_state::VringState;

/// One vring as configured. Every message replaces what an earlier one set.
#[derive(Debug, Default)]
pub(crate) struct Vring {
    pub(crate) size: Option<u16>,
    pub(crate) areas: Option<VringAreas>,
    pub(crate) base: Option<u32>,
    pub(crate) kick: Kick,
    pub(crate) call: Option<Arc<OwnedFd>>,
    pub(crate) err: Option<Arc<OwnedFd>>,
    /// What SET_VRING_ENABLE set, whenever it came: QEMU sends it before SET_FEATURES and does
    /// not repeat it.
    pub(crate) enabled: Option<bool>,
    /// Its state by what the device last returned.
    pub(crate) state: VringState,
}

/// Whether SET_VRING_KICK has come since the vring was last stopped, and with what.
#[derive(Debug, Default)]
pub(crate) enum Kick {
    /// It has not: the vring is not to start.
    #[default]
    Unset,
    /// Without a descriptor: the vring is to be polled.
    Poll,
    Fd(Arc<OwnedFd>),
}

impl Kick {
    pub(crate) fn new(fd: Option<Arc<OwnedFd>>) -> Self {
        fd.map_or(Self::Poll, Self::Fd)
    }

    fn fd(&self) -> Option<Arc<OwnedFd>> {
        match self {
            Self::Fd(fd) => Some(Arc::clone(fd)),
            Self::Poll | Self::Unset => None,
        }
    }
}

impl Vring {
    /// What the vring starts with, once all of it is known.
    pub(crate) fn to_vring_start(
        &self,
        enabled: bool,
        features: u64,
        memory: &Arc<GuestMemory>,
    ) -> Option<VringStart> {
        if matches!(self.kick, Kick::Unset) {
            return None;
        }
        let areas = self.areas?;
        Some(VringStart {
            layout: VirtqueueLayout {
                size: self.size?,
                desc: areas.desc,
                avail: areas.avail,
                used: areas.used,
            },
            base: self.base?,
            kick: self.kick.fd(),
            call: self.call.clone(),
            err: self.err.clone(),
            enabled,
            features,
            memory: Arc::clone(memory),
        })
    }

    /// Whether the device holds the vring.
    pub(crate) fn is_started(&self) -> bool {
        self.state.is_started()
    }

    /// Forgets what a reset of the device forgets: everything but the call and err descriptors,
    /// which QEMU hands out once. The vring has been stopped.
    pub(crate) fn reset(&mut self) {
        *self = Self {
            call: self.call.take(),
            err: self.err.take(),
            ..Self::default()
        };
    }
}
