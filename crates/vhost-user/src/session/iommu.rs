//! What a session does for a guest whose device is behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM).
//!
//! The addresses of its driver, those of SET_VRING_ADDR included, are I/O virtual addresses. The
//! front-end says what they mean when it is asked:
//!
//! ```text
//! worker      miss ─ Iotlb ─ event
//! session               └─> VHOST_USER_BACKEND_IOTLB_MSG (MISS)  ──> front-end, on the channel of
//!                                                                    SET_BACKEND_REQ_FD
//! session     start vrings that waited, wake workers <── VHOST_USER_IOTLB_MSG (UPDATE)
//! session     all vrings drop what they know, then the answer <── VHOST_USER_IOTLB_MSG (INVALIDATE)
//! ```
//!
//! The session never waits for an answer to a miss: the front-end may itself wait for the answer to
//! a request. A vring whose areas have no translation yet does not start, and the session tries again
//! at each update.
//!
//! A front-end tells of a translation that ends only while it has a started vring. So all
//! translations are forgotten while no vring is started.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketType, send, sockopt};
use tracing::{debug, warn};
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;
use virtionet_virtqueue::memory::{Iotlb, Translation, UpdateEffect};

use super::{NO_REPLY_PAYLOAD, RequestOutcome, Session};
use crate::error::RequestError;
use crate::foreign_fd::ForeignFd;
use crate::iotlb_message::{IotlbMessage, encode_miss};
use crate::vring::Vring;
use crate::wire::IdleEvent;

/// The feature bit with which addresses are I/O virtual addresses.
pub(super) const ACCESS_PLATFORM: u64 = 1 << VIRTIO_F_ACCESS_PLATFORM;

/// The time after which a vring that waits for the translations of its areas is looked at again.
const START_INTERVAL: Duration = Duration::from_secs(1);

/// The translations, and the channel on which missing ones are asked for.
#[derive(Debug, Default)]
pub(super) struct IommuState {
    /// `Some` while VIRTIO_F_ACCESS_PLATFORM is negotiated.
    translations: Option<Translations>,
    /// The channel of SET_BACKEND_REQ_FD.
    channel: Option<ForeignFd>,
}

#[derive(Debug)]
struct Translations {
    iotlb: Arc<Iotlb>,
    /// The event that is signalled after a miss.
    missed: Arc<OwnedFd>,
}

impl IommuState {
    /// The state after a front-end has accepted `features` and set this channel. No translation is
    /// known, so each is asked for.
    pub(super) fn of_features(features: u64, channel: Option<OwnedFd>) -> io::Result<Self> {
        let is_translated = features & ACCESS_PLATFORM != 0;
        Ok(Self {
            translations: is_translated.then(Translations::new).transpose()?,
            channel: channel.map(ForeignFd::new),
        })
    }

    /// The translations, if addresses have to be translated.
    pub(super) fn iotlb(&self) -> Option<Arc<Iotlb>> {
        let translations = self.translations.as_ref()?;
        Some(Arc::clone(&translations.iotlb))
    }

    /// A copy of the descriptor of the channel.
    pub(super) fn copy_of_channel(&self) -> io::Result<Option<OwnedFd>> {
        let channel = self.channel.as_ref().and_then(ForeignFd::as_fd);
        channel.map(|fd| fd.try_clone_to_owned()).transpose()
    }
}

impl Translations {
    fn new() -> io::Result<Self> {
        // syscalls: eventfd2
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let missed = Arc::new(event);
        let event = Arc::clone(&missed);
        let iotlb = Iotlb::new(move || {
            // The write fails only when 2^64 events are pending.
            let _ = rustix::io::write(&*event, &1u64.to_ne_bytes());
        });
        Ok(Self {
            iotlb: Arc::new(iotlb),
            missed,
        })
    }
}

impl Session<'_> {
    /// The event that happens when there are misses to send. It also happens from time to time
    /// while a vring waits to start, in case the front-end does not answer.
    pub(super) fn miss_event(&self) -> Option<IdleEvent<'_>> {
        let translations = self.state.iommu.translations.as_ref()?;
        let is_waiting = self
            .indices()
            .any(|index| self.pending_start(index).is_some());
        Some(IdleEvent {
            fd: translations.missed.as_fd(),
            interval: is_waiting.then_some(START_INTERVAL),
        })
    }

    /// Tries again to start what waits for translations, and sends the misses.
    pub(super) fn handle_miss_event(&mut self) {
        self.start_translated();
        self.send_misses();
    }

    /// The translations, if addresses have to be translated.
    pub(super) fn iotlb(&self) -> Option<Arc<Iotlb>> {
        self.state.iommu.iotlb()
    }

    /// Begins or ends the translation of addresses, as the features `bits` demand. Returns whether
    /// that is a change, after which guest memory must be applied again.
    pub(super) fn set_translated(&mut self, bits: u64) -> Result<bool, RequestError> {
        let wanted = bits & ACCESS_PLATFORM != 0;
        if wanted == self.state.iommu.translations.is_some() {
            return Ok(false);
        }
        self.state.iommu.translations = match wanted {
            true => Some(Translations::new().map_err(RequestError::NoMissEvent)?),
            false => None,
        };
        Ok(true)
    }

    /// Forgets all translations if no vring is started.
    pub(super) fn forget_translations_if_idle(&self) {
        if let Some(translations) = &self.state.iommu.translations
            && !self.state.vrings.iter().any(Vring::is_started)
        {
            translations.iotlb.clear();
        }
    }

    /// Takes the channel for the session's own requests. It is written without waiting, and never
    /// read, because no request asks for an answer.
    pub(super) fn set_backend_channel(&mut self, fd: ForeignFd) -> RequestOutcome {
        let is_stream = fd.as_fd().is_some_and(|fd| {
            // syscalls: getsockopt
            sockopt::socket_domain(fd) == Ok(AddressFamily::UNIX)
                && sockopt::socket_type(fd) == Ok(SocketType::STREAM)
        });
        if !is_stream {
            return Err(RequestError::BackendChannel.into());
        }
        self.state.iommu.channel = Some(fd);
        NO_REPLY_PAYLOAD
    }

    pub(super) fn handle_iotlb(&mut self, message: IotlbMessage) -> RequestOutcome {
        let iotlb = self.iotlb().ok_or(RequestError::NotTranslated)?;
        match message {
            IotlbMessage::Update(translation) => self.add_translation(&iotlb, translation)?,
            IotlbMessage::Invalidate(range) => {
                iotlb.invalidate(range);
                self.backend.forget_translations(range, &self.state.memory);
            }
        }
        NO_REPLY_PAYLOAD
    }

    fn add_translation(
        &mut self,
        iotlb: &Iotlb,
        translation: Translation,
    ) -> Result<(), RequestError> {
        let (user_addr, size) = (translation.user_addr, translation.size());
        if !self.state.memory.has_user_range(user_addr, size) {
            return Err(RequestError::TranslationOutside { user_addr, size });
        }
        if iotlb.update(translation) == UpdateEffect::Replaced {
            self.backend
                .forget_translations(translation.range, &self.state.memory);
        }
        self.start_translated();
        // A burst needs many translations, which are asked for together. With a look after each
        // answer a worker would take the CPU from the front-end that gives them.
        if !iotlb.expects_answers() {
            self.backend.on_translations();
        }
        Ok(())
    }

    /// Starts the vrings that waited for the translations of their areas.
    fn start_translated(&mut self) {
        for index in self.indices() {
            if let Err(error) = self.start(index)
                && let Some(suppressed) = self.log.failed_starts.allow()
            {
                warn!(suppressed, "vring {index} does not start: {error}");
            }
        }
    }

    /// Sends the misses that wait. What cannot be sent now is not kept: the virtqueue that needs the
    /// address notes it again after a while.
    fn send_misses(&mut self) {
        let Some(translations) = &self.state.iommu.translations else {
            return;
        };
        // It fails when another call has emptied the event.
        // syscalls: read
        let _ = rustix::io::read(&*translations.missed, &mut [0; 8]);
        let misses = translations.iotlb.take_misses();
        let Some(channel) = self.state.iommu.channel.as_ref().and_then(ForeignFd::as_fd) else {
            return;
        };
        for miss in misses {
            debug!(?miss, "vhost-user: no translation");
            let bytes = encode_miss(miss);
            // syscalls: sendto
            let sent = send(channel, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            match sent {
                Ok(sent) if sent == bytes.len() => {}
                Err(Errno::AGAIN | Errno::INTR) => return,
                // What follows half a message could not be understood.
                result => {
                    if let Some(suppressed) = self.log.refusals.allow() {
                        warn!(
                            suppressed,
                            "the front-end cannot be asked for translations any more: {result:?} for the channel of SET_BACKEND_REQ_FD"
                        );
                    }
                    self.state.iommu.channel = None;
                    return;
                }
            }
        }
    }
}
