//! The configuration of one vring.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtionet_virtqueue::VirtqueueLayout;
use virtionet_virtqueue::memory::GuestMemory;

use crate::backend::VringStart;
use crate::request::VringAreas;
use crate::vring_state::VringState;

/// The configuration of one vring. Every message replaces what an earlier one set.
#[derive(Debug, Default)]
pub(crate) struct Vring {
    pub(crate) size: Option<u16>,
    pub(crate) areas: Option<VringAreas>,
    /// See [`VringStart::used_log`].
    pub(crate) used_log: Option<u64>,
    pub(crate) base: Option<VringBase>,
    pub(crate) kick: Kick,
    pub(crate) call: Option<Arc<OwnedFd>>,
    pub(crate) err: Option<Arc<OwnedFd>>,
    /// The value of the last SET_VRING_ENABLE. It is kept even before SET_FEATURES, because QEMU
    /// sends it before and does not repeat it.
    pub(crate) enabled: Option<bool>,
    /// The state, by what the device last returned.
    pub(crate) state: VringState,
}

/// Where a vring starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VringBase {
    /// The base that the front-end knows: what it set, or what GET_VRING_BASE returned.
    pub(crate) first: u32,
    /// Where the vring really continues.
    pub(crate) current: u32,
}

impl VringBase {
    /// The base that both sides know.
    pub(crate) fn known(base: u32) -> Self {
        Self {
            first: base,
            current: base,
        }
    }
}

/// The value of SET_VRING_KICK since the vring was last stopped.
#[derive(Debug, Default)]
pub(crate) enum Kick {
    /// SET_VRING_KICK has not come, so the vring must not start.
    #[default]
    Unset,
    /// It came without a descriptor, so the device polls the vring.
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
    /// The configuration with which the vring starts, or `None` while it is incomplete.
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
        let base = self.base?;
        Some(VringStart {
            layout: VirtqueueLayout {
                size: self.size?,
                desc: areas.desc,
                avail: areas.avail,
                used: areas.used,
            },
            base: base.current,
            first_base: base.first,
            used_log: self.used_log,
            kick: self.kick.fd(),
            call: self.call.clone(),
            err: self.err.clone(),
            enabled,
            features,
            memory: Arc::clone(memory),
        })
    }

    /// Notes where the device stopped the vring, which the front-end does not know.
    pub(crate) fn stopped_at(&mut self, current: u32) {
        let first = self.base.map_or(current, |base| base.first);
        self.base = Some(VringBase { first, current });
    }

    /// Whether the device holds the vring's virtqueue.
    pub(crate) fn is_started(&self) -> bool {
        self.state.is_started()
    }

    /// Resets everything except the call and err descriptors, which QEMU sends only once. The vring
    /// must be stopped.
    pub(crate) fn reset(&mut self) {
        *self = Self {
            call: self.call.take(),
            err: self.err.take(),
            ..Self::default()
        };
    }
}
