//! A session that is suspended, and its image, with which another process continues it.
//!
//! The front-end sees nothing of it: its connection stays open, and what it sends meanwhile waits in
//! the socket. A session is suspended between two messages only.

use std::mem;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tracing::warn;
use virtionet_base::MAX_QUEUE_PAIRS;
use virtionet_virtqueue::memory::{GuestMemory, MappedRegion, MemoryError, RegionSpec};

use super::iommu::IommuState;
use super::migration::LogBaseState;
use super::postcopy::Postcopy;
use super::serving::EndedOnDrop;
use super::{SESSION_FEATURES, Session, SessionState};
use crate::backend::Backend;
use crate::request::VringAreas;
use crate::session_log::SessionLog;
use crate::sys::peer_pid;
use crate::vring::{Kick, Vring, VringBase};
use crate::vring_state::VringEvent;

/// A session whose vrings are stopped, and which holds everything to continue.
#[derive(Debug)]
pub struct SuspendedSession {
    stream: UnixStream,
    state: SessionState,
}

/// Why a suspended session cannot continue in another process.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The guest is being migrated: what is written is logged, or pages may be missing.
    #[error("the guest is being migrated; try again when that has ended")]
    Migrating,
    /// The front-end has accepted features that the back-end does not offer.
    #[error("the front-end uses the features {0:#x}, which this version does not have")]
    Features(u64),
    /// The same of protocol features.
    #[error("the front-end uses the protocol features {0:#x}, which this version does not have")]
    ProtocolFeatures(u64),
    /// The front-end uses more queue pairs than the back-end has.
    #[error("the front-end uses {used} queue pairs, and there are {available}; raise --queues")]
    QueuePairs {
        /// The number that it uses.
        used: usize,
        /// The number that there are.
        available: u16,
    },
    /// The image has another number of vrings than a device can have.
    #[error("the image has {0} vrings, and a session has at most 256")]
    Vrings(usize),
    /// A region of guest memory cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A descriptor cannot be copied.
    #[error("a descriptor cannot be made or copied: {0}; raise the limit of open files")]
    Descriptor(#[from] std::io::Error),
}

/// The image of a session, with descriptors of type `F`: those of this process, or their positions
/// in a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionImage<F> {
    /// The value of SET_FEATURES.
    pub features: Option<u64>,
    /// The value of SET_PROTOCOL_FEATURES.
    pub protocol_features: u64,
    /// The device status.
    pub status: u8,
    /// The value of NET_SET_MTU.
    pub mtu: Option<u16>,
    /// The channel of SET_BACKEND_REQ_FD.
    pub backend_channel: Option<F>,
    /// The memory table.
    pub regions: Vec<RegionImage<F>>,
    /// All vrings that a front-end can use.
    pub vrings: Vec<VringImage<F>>,
}

/// A region of guest memory, as in SET_MEM_TABLE.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionImage<F> {
    /// Its guest address.
    pub guest_addr: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Its front-end address.
    pub user_addr: u64,
    /// Where it begins in its file, in bytes.
    pub file_offset: u64,
    /// Its file.
    pub file: F,
}

/// The configuration of a vring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VringImage<F> {
    /// The number of descriptors.
    pub size: Option<u16>,
    /// The front-end addresses of its descriptor, driver and device area.
    pub areas: Option<[u64; 3]>,
    /// The guest address at which writes to the used ring are logged.
    pub used_log: Option<u64>,
    /// The base that the front-end knows, and where the vring really is.
    pub base: Option<[u32; 2]>,
    /// The last SET_VRING_KICK.
    pub kick: KickImage<F>,
    /// The call descriptor.
    pub call: Option<F>,
    /// The err descriptor.
    pub err: Option<F>,
    /// The last SET_VRING_ENABLE.
    pub enabled: Option<bool>,
}

/// The last SET_VRING_KICK of a vring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KickImage<F> {
    /// It has not come, so that the vring does not run.
    Unset,
    /// It came without a descriptor.
    Poll,
    /// It came with this descriptor.
    Fd(F),
}

impl<F> SessionImage<F> {
    /// Checks that `backend` has all that the front-end of this image uses.
    ///
    /// # Errors
    /// What it lacks.
    pub fn check(&self, backend: &dyn Backend) -> Result<(), ImageError> {
        let offered = backend.features() | SESSION_FEATURES;
        let missing = self.features.unwrap_or(0) & !offered;
        if missing != 0 {
            return Err(ImageError::Features(missing));
        }
        let missing = self.protocol_features & !backend.protocol_features();
        if missing != 0 {
            return Err(ImageError::ProtocolFeatures(missing));
        }
        let last = self.vrings.iter().rposition(|vring| vring.size.is_some());
        let used = last.map_or(0, |last| last / 2 + 1);
        let available = backend.max_queue_pairs();
        match used <= usize::from(available) {
            true => Ok(()),
            false => Err(ImageError::QueuePairs { used, available }),
        }
    }

    /// The same image with each descriptor replaced by what `replace` makes of it, in a fixed order.
    ///
    /// # Errors
    /// The first error of `replace`.
    pub fn map<G, E>(
        self,
        mut replace: impl FnMut(F) -> Result<G, E>,
    ) -> Result<SessionImage<G>, E> {
        let backend_channel = self.backend_channel.map(&mut replace).transpose()?;
        let mut regions = Vec::new();
        for region in self.regions {
            regions.push(RegionImage {
                guest_addr: region.guest_addr,
                size: region.size,
                user_addr: region.user_addr,
                file_offset: region.file_offset,
                file: replace(region.file)?,
            });
        }
        let mut vrings = Vec::new();
        for vring in self.vrings {
            vrings.push(VringImage {
                size: vring.size,
                areas: vring.areas,
                used_log: vring.used_log,
                base: vring.base,
                kick: match vring.kick {
                    KickImage::Unset => KickImage::Unset,
                    KickImage::Poll => KickImage::Poll,
                    KickImage::Fd(fd) => KickImage::Fd(replace(fd)?),
                },
                call: vring.call.map(&mut replace).transpose()?,
                err: vring.err.map(&mut replace).transpose()?,
                enabled: vring.enabled,
            });
        }
        Ok(SessionImage {
            features: self.features,
            protocol_features: self.protocol_features,
            status: self.status,
            mtu: self.mtu,
            backend_channel,
            regions,
            vrings,
        })
    }
}

impl SuspendedSession {
    /// The connection with the front-end.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The image of this session.
    ///
    /// # Errors
    /// When the guest is being migrated, or the process has no descriptors left.
    pub fn to_image(&self) -> Result<SessionImage<Arc<OwnedFd>>, ImageError> {
        let state = &self.state;
        if state.memory.is_logging() || !state.postcopy.is_off() {
            return Err(ImageError::Migrating);
        }
        let mut regions = Vec::new();
        for region in state.memory.mapped_regions() {
            let spec = region.spec();
            regions.push(RegionImage {
                guest_addr: spec.guest_addr,
                size: spec.size,
                user_addr: spec.user_addr,
                file_offset: spec.file_offset,
                file: Arc::new(region.copy_of_file()?.into()),
            });
        }
        Ok(SessionImage {
            features: state.features,
            protocol_features: state.protocol_features,
            status: state.status,
            mtu: state.mtu,
            backend_channel: state.iommu.copy_of_channel()?.map(Arc::new),
            regions,
            vrings: state.vrings.iter().map(Vring::to_image).collect(),
        })
    }

    /// The session of an image and the connection that belongs to it.
    ///
    /// # Errors
    /// When the image is not that of a session, or its memory cannot be mapped.
    pub fn from_image(
        image: SessionImage<Arc<OwnedFd>>,
        stream: UnixStream,
    ) -> Result<Self, ImageError> {
        if image.vrings.len() > 2 * usize::from(MAX_QUEUE_PAIRS) {
            return Err(ImageError::Vrings(image.vrings.len()));
        }
        let mut regions = Vec::new();
        for region in &image.regions {
            let spec = RegionSpec {
                guest_addr: region.guest_addr,
                size: region.size,
                user_addr: region.user_addr,
                file_offset: region.file_offset,
            };
            let file = region.file.try_clone()?.into();
            regions.push(Arc::new(MappedRegion::map(spec, file)?));
        }
        let channel = image.backend_channel.map(|fd| fd.try_clone()).transpose()?;
        let iommu = IommuState::of_features(image.features.unwrap_or(0), channel)?;
        Ok(Self {
            stream,
            state: SessionState {
                vrings: image.vrings.into_iter().map(Vring::from_image).collect(),
                memory: Arc::new(GuestMemory::new(regions)?.with_iotlb(iommu.iotlb())),
                log_base: LogBaseState::Unset,
                iommu,
                postcopy: Postcopy::Off,
                features: image.features,
                protocol_features: image.protocol_features,
                status: image.status,
                mtu: image.mtu,
            },
        })
    }

    /// Continues the session with `backend`: its connection, and the session, whose vrings run.
    pub(super) fn resume<'b>(
        self,
        backend: &'b dyn Backend,
        log: &'b SessionLog,
    ) -> (UnixStream, EndedOnDrop<'b>) {
        let Self { stream, state } = self;
        backend.on_resume(peer_pid(&stream));
        let mut session = EndedOnDrop::new(Session::with_state(backend, log, state));
        session.session.restart();
        backend.on_resumed();
        (stream, session)
    }
}

impl<'b> Session<'b> {
    /// Stops all vrings so that they can continue, and takes the state out.
    pub(super) fn suspend(&mut self, stream: UnixStream) -> SuspendedSession {
        for (index, base) in self.backend.suspend() {
            self.change_state(index, VringEvent::Stop);
            if let Some(vring) = self.state.vrings.get_mut(usize::from(index)) {
                vring.stopped_at(base);
            }
        }
        SuspendedSession {
            stream,
            state: mem::take(&mut self.state),
        }
    }

    /// Tells the back-end, which knows nothing of this session, what the front-end has set, and
    /// starts the vrings.
    fn restart(&mut self) {
        self.backend
            .set_protocol_features(self.state.protocol_features);
        if self.state.features.is_some() {
            self.backend.set_features(self.virtio_features());
        }
        if let Some(mtu) = self.state.mtu
            && let Err(error) = self.backend.set_mtu(mtu)
        {
            warn!("the MTU {mtu} of the front-end is not set: {error}");
        }
        for (index, vring) in (0..).zip(&self.state.vrings) {
            if vring.call.is_some() {
                self.backend.on_vring_announced(index);
            }
        }
        // No vring is started, so none can be outside of the memory.
        let _ = self.backend.set_memory(&self.state.memory);
        for index in self.indices() {
            if !self.state.memory.is_empty()
                && let Err(error) = self.start(index)
            {
                warn!("vring {index} does not continue: {error}");
            }
        }
    }
}

impl Vring {
    fn to_image(&self) -> VringImage<Arc<OwnedFd>> {
        VringImage {
            size: self.size,
            areas: self
                .areas
                .map(|areas| [areas.desc, areas.avail, areas.used]),
            used_log: self.used_log,
            base: self.base.map(|base| [base.first, base.current]),
            kick: match &self.kick {
                Kick::Unset => KickImage::Unset,
                Kick::Poll => KickImage::Poll,
                Kick::Fd(fd) => KickImage::Fd(Arc::clone(fd)),
            },
            call: self.call.clone(),
            err: self.err.clone(),
            enabled: self.enabled,
        }
    }

    fn from_image(image: VringImage<Arc<OwnedFd>>) -> Self {
        let areas = |[desc, avail, used]: [u64; 3]| VringAreas { desc, avail, used };
        let base = |[first, current]: [u32; 2]| VringBase { first, current };
        Self {
            size: image.size,
            areas: image.areas.map(areas),
            used_log: image.used_log,
            base: image.base.map(base),
            kick: match image.kick {
                KickImage::Unset => Kick::Unset,
                KickImage::Poll => Kick::Poll,
                KickImage::Fd(fd) => Kick::Fd(fd),
            },
            call: image.call,
            err: image.err,
            enabled: image.enabled,
            ..Self::default()
        }
    }
}
