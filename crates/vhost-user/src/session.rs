//! The state of a session, and the effect of each request on it.
//!
//! # When a vring runs
//! A vring starts when its size, addresses and base are known and SET_VRING_KICK has come, in any
//! order. It stops at GET_VRING_BASE, at a reset (RESET_DEVICE, RESET_OWNER, a device status of 0)
//! and at the end of the connection. The session then forgets the kick descriptor, so that a
//! front-end can configure the vring again, message by message, before its next SET_VRING_KICK
//! starts it. The session keeps the call and err descriptors. If a running vring gets a new size,
//! address or base, the session stops it and starts it again.
//!
//! If a vring could not start, the session tries again when the vring's configuration or the memory
//! table changes.

mod fault_guard;
mod iommu;
mod migration;
mod postcopy;
mod serving;
mod suspended;
mod vrings;

use std::sync::Arc;

use tracing::{debug, warn};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtionet_base::MAX_QUEUE_PAIRS;
use virtionet_virtqueue::memory::{GuestMemory, MAX_REGIONS, MappedRegion, RegionSpec};

use crate::backend::{Backend, UnmappedVring};
use crate::error::{DecodeError, ProtocolError, RefusedRequest, RequestError, SessionError};
use crate::foreign_fd::ForeignFd;
use crate::memory_file;
use crate::protocol_features::{self, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES};
use crate::request::{Request, has_own_reply};
use crate::session_log::SessionLog;
use crate::vring::Vring;
use crate::vring_state::VringEvent;
use crate::wire::{Header, Message, Reply, ReplyPayload};
use iommu::IommuState;
use migration::LogBaseState;
use postcopy::Postcopy;
pub use serving::{Served, SessionEnd, SessionStart, serve, serve_from};
pub use suspended::{
    ImageError, KickImage, RegionImage, SessionImage, SuspendedSession, VringImage,
};

/// The features that the session itself has, not its device.
const SESSION_FEATURES: u64 = VHOST_USER_F_PROTOCOL_FEATURES | VHOST_F_LOG_ALL;
const PACKED: u64 = 1 << VIRTIO_F_RING_PACKED;
const REPLY_ACK: u64 = VhostUserProtocolFeatures::REPLY_ACK.bits();

/// The state of one front-end's session, without its socket.
pub struct Session<'b> {
    backend: &'b dyn Backend,
    /// The number of queue pairs, each of which has two of the vrings below.
    queue_pairs: u16,
    state: SessionState,
    first_refusal: Option<RefusedRequest>,
    log: &'b SessionLog,
}

/// What the front-end has set. A session that continues in another process needs all of it.
#[derive(Debug, Default)]
struct SessionState {
    vrings: Vec<Vring>,
    /// The guest's memory, with the log if writes are logged.
    memory: Arc<GuestMemory>,
    log_base: LogBaseState,
    iommu: IommuState,
    postcopy: Postcopy,
    /// The features that SET_FEATURES set, including those that concern the session itself.
    features: Option<u64>,
    protocol_features: u64,
    status: u8,
    /// The MTU that the front-end set and the device took.
    mtu: Option<u16>,
}

/// Why a request was not done.
enum Failure {
    Refused(RequestError),
    EndSession(SessionError),
}

impl<E: Into<RequestError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Refused(error.into())
    }
}

/// The payload of a request's own reply, if it has one.
type RequestOutcome = Result<Option<ReplyPayload>, Failure>;

/// The outcome of a request that succeeded and has no reply of its own.
const NO_REPLY_PAYLOAD: RequestOutcome = Ok(None);

impl<'b> Session<'b> {
    /// Creates the session before its first message.
    pub fn new(backend: &'b dyn Backend, log: &'b SessionLog) -> Self {
        Self::with_state(backend, log, SessionState::default())
    }

    /// Creates the session of a front-end that has set `state`.
    fn with_state(backend: &'b dyn Backend, log: &'b SessionLog, mut state: SessionState) -> Self {
        let queue_pairs = backend.max_queue_pairs().min(MAX_QUEUE_PAIRS);
        let vrings = 2 * usize::from(queue_pairs);
        state.vrings.resize_with(vrings, Vring::default);
        Self {
            backend,
            queue_pairs,
            state,
            first_refusal: None,
            log,
        }
    }

    /// Does what a message asks. Returns the reply that the front-end must get, if there is one.
    ///
    /// # Errors
    /// When the session must end.
    pub fn handle(&mut self, message: Message) -> Result<Option<Reply>, SessionError> {
        let Message {
            header,
            payload,
            fds,
        } = message;
        let outcome = match Request::decode(header.code, &payload, fds) {
            Ok(request) => self.dispatch(request),
            Err(DecodeError::Refused(refusal)) => Err(refusal.into()),
            Err(DecodeError::Protocol(error)) => return Err(error.into()),
        };
        match outcome {
            Ok(Some(payload)) => Ok(Some(Reply {
                code: header.code,
                payload,
            })),
            Ok(None) => Ok(self.acknowledge(header, 0)),
            Err(Failure::Refused(refusal)) => self.refuse(header, refusal),
            Err(Failure::EndSession(error)) => Err(error),
        }
    }

    /// Refuses a request. One whose answer the front-end waits for, and for which it does not take
    /// an acknowledgement instead, ends the session: the front-end would wait for ever.
    fn refuse(
        &mut self,
        header: Header,
        refusal: RequestError,
    ) -> Result<Option<Reply>, SessionError> {
        let acknowledgement = self.acknowledge(header, 1);
        let request = FrontendReq::try_from(header.code).ok();
        match request.filter(|request| has_own_reply(*request)) {
            Some(request) if acknowledgement.is_none() => {
                Err(ProtocolError::Unanswerable { request, refusal }.into())
            }
            _ => {
                self.note_refusal(header.code, refusal);
                Ok(acknowledgement)
            }
        }
    }

    /// Stops every vring that runs, as at the end of a connection.
    pub fn stop_all(&mut self) {
        for index in self.indices() {
            self.stop(index);
        }
    }

    /// Stops every vring, and ends their lives.
    fn reset_all(&mut self) {
        self.stop_all();
        for index in self.indices() {
            self.backend.forget_progress(index);
        }
    }

    fn dispatch(&mut self, request: Request) -> RequestOutcome {
        debug!(?request, "vhost-user");
        self.check_awaited(&request)?;
        match request {
            Request::GetFeatures => reply_u64(self.offered_features()),
            Request::SetFeatures(bits) => self.set_features(bits),
            Request::SetOwner => NO_REPLY_PAYLOAD,
            Request::ResetOwner => self.reset_owner(),
            Request::SetMemTable(regions) => self.set_mem_table(regions),
            Request::AddMemReg(spec, file) => self.add_mem_reg(spec, file),
            Request::RemMemReg(spec) => self.rem_mem_reg(spec),
            Request::AcknowledgeMemory(result) => self.acknowledge_memory(result),
            Request::PostcopyAdvise => self.postcopy_advise(),
            Request::PostcopyListen => self.postcopy_listen(),
            Request::PostcopyEnd => self.postcopy_end(),
            Request::SetLogBase(log) => self.set_log_base(log),
            Request::SetLogFd => NO_REPLY_PAYLOAD,
            Request::GetMaxMemSlots => reply_u64(u64::try_from(MAX_REGIONS).unwrap_or(u64::MAX)),
            Request::SetVringNum { ring, size } => self.set_vring_num(ring, size),
            Request::SetVringAddr {
                ring,
                areas,
                used_log,
            } => self.set_vring_addr(ring, areas, used_log),
            Request::SetVringBase { ring, base } => self.set_vring_base(ring, base),
            Request::GetVringBase { ring } => self.get_vring_base(ring),
            Request::SetVringKick(kick) => self.set_vring_kick(kick),
            Request::SetVringCall(call) => self.set_vring_call(call),
            Request::SetVringErr(err) => self.set_vring_err(err),
            Request::SetVringEnable { ring, enabled } => self.set_vring_enable(ring, enabled),
            Request::GetProtocolFeatures => reply_u64(self.protocol_features_to_offer()),
            Request::SetProtocolFeatures(bits) => self.set_protocol_features(bits),
            Request::GetQueueNum => reply_u64(self.queue_pairs.into()),
            Request::NetSetMtu(mtu) => self.net_set_mtu(mtu),
            Request::ResetDevice => self.reset_device(),
            Request::GetStatus => reply_u64(self.state.status.into()),
            Request::SetStatus(status) => self.set_status(status),
            Request::SendRarp(mac) => self.send_rarp(mac),
            Request::SetBackendReqFd(fd) => self.set_backend_channel(fd),
            Request::Iotlb(message) => self.handle_iotlb(message),
            Request::NotOffered(_) => Err(RequestError::NotOffered.into()),
            Request::Unknown(_) => Err(RequestError::Unknown.into()),
        }
    }

    // --- features -------------------------------------------------------------------------------

    fn offered_features(&self) -> u64 {
        self.backend.features() | SESSION_FEATURES
    }

    fn offered_protocol_features(&self) -> u64 {
        self.backend.protocol_features() & protocol_features::OFFERED
    }

    fn set_features(&mut self, bits: u64) -> RequestOutcome {
        let surplus = bits & !self.offered_features();
        if surplus != 0 {
            return Err(RequestError::Features(surplus).into());
        }
        let changes = bits ^ self.state.features.unwrap_or(0);
        if changes & PACKED != 0 && self.state.vrings.iter().any(Vring::is_started) {
            return Err(RequestError::FormatWhileRunning.into());
        }
        self.forget_translations_if_idle();
        if self.state.features == Some(bits) {
            return NO_REPLY_PAYLOAD;
        }
        let mut memory = self.memory_with_log_of(bits)?;
        if self.set_translated(bits)? && memory.is_none() {
            memory = Some(self.with_log(&self.state.memory)?);
        }
        let is_new = self.state.features.is_none() || changes & !SESSION_FEATURES != 0;
        self.state.features = Some(bits);
        if is_new {
            self.backend.set_features(self.virtio_features());
        }
        if let Some(memory) = memory {
            self.apply_memory(memory);
        }
        if changes & VHOST_USER_F_PROTOCOL_FEATURES != 0 {
            self.update_enabled();
        }
        NO_REPLY_PAYLOAD
    }

    /// The negotiated virtio features, without those that concern the session itself.
    fn virtio_features(&self) -> u64 {
        self.state.features.unwrap_or(0) & !SESSION_FEATURES
    }

    fn set_protocol_features(&mut self, bits: u64) -> RequestOutcome {
        let surplus = bits & !self.offered_protocol_features();
        if surplus != 0 {
            return Err(RequestError::ProtocolFeatures(surplus).into());
        }
        self.state.protocol_features = bits;
        self.backend.set_protocol_features(bits);
        NO_REPLY_PAYLOAD
    }

    // --- memory ---------------------------------------------------------------------------------

    fn set_mem_table(&mut self, regions: Vec<(RegionSpec, ForeignFd)>) -> RequestOutcome {
        if self.state.postcopy.is_listening() {
            return self.set_mem_table_in_postcopy(regions);
        }
        let regions = regions
            .into_iter()
            .map(|(spec, fd)| self.map_region(spec, fd).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        self.apply_memory(self.with_log(&GuestMemory::new(regions)?)?);
        NO_REPLY_PAYLOAD
    }

    fn map_region(&self, spec: RegionSpec, fd: ForeignFd) -> Result<MappedRegion, RequestError> {
        let file = memory_file::from_fd(fd, "guest memory", &self.log.memory_on_disk)?;
        Ok(MappedRegion::map(spec, file)?)
    }

    fn add_mem_reg(&mut self, spec: RegionSpec, fd: ForeignFd) -> RequestOutcome {
        if self.state.postcopy.is_listening() {
            return self.add_mem_reg_in_postcopy(spec, fd);
        }
        let region = self.map_region(spec, fd)?;
        self.apply_memory(self.with_log(&self.state.memory.with_region(region)?)?);
        NO_REPLY_PAYLOAD
    }

    fn rem_mem_reg(&mut self, spec: RegionSpec) -> RequestOutcome {
        self.apply_memory(self.with_log(&self.state.memory.without_region(spec)?)?);
        NO_REPLY_PAYLOAD
    }

    fn apply_memory(&mut self, memory: GuestMemory) {
        self.state.memory = Arc::new(memory.with_iotlb(self.iotlb()));
        let unmapped = self.backend.set_memory(&self.state.memory);
        for vring in &unmapped {
            self.note_unmapped(vring);
        }
        // A vring whose addresses were not in memory before may start now. If it cannot, the
        // request that changed the table is still valid.
        for index in self.indices() {
            let was_unmapped = unmapped.iter().any(|vring| vring.index == index);
            if !self.state.memory.is_empty()
                && !was_unmapped
                && let Err(error) = self.start(index)
                && let Some(suppressed) = self.log.failed_starts.allow()
            {
                warn!(suppressed, "vring {index} does not start: {error}");
            }
        }
    }

    /// Records that the device stopped a vring. The vring keeps its kick descriptor, so that it
    /// starts again with a memory table that contains it.
    fn note_unmapped(&mut self, unmapped: &UnmappedVring) {
        let UnmappedVring { index, base, error } = unmapped;
        if let Some(suppressed) = self.log.failed_starts.allow() {
            warn!(
                suppressed,
                "vring {index} stopped at base {base:#x}: {error}"
            );
        }
        self.change_state(*index, VringEvent::Unmap);
        if let Some(vring) = self.state.vrings.get_mut(usize::from(*index)) {
            vring.stopped_at(*base);
        }
    }

    // --- the device -----------------------------------------------------------------------------

    fn net_set_mtu(&mut self, mtu: u16) -> RequestOutcome {
        self.backend.set_mtu(mtu)?;
        self.state.mtu = Some(mtu);
        NO_REPLY_PAYLOAD
    }

    /// Stops all vrings and keeps all other state, as the protocol recommends for this deprecated
    /// request.
    fn reset_owner(&mut self) -> RequestOutcome {
        self.reset_all();
        NO_REPLY_PAYLOAD
    }

    /// Resets the vrings and the device status. The memory table stays, because front-ends send
    /// only the changes of it. The features stay, because some front-ends negotiate only before
    /// they start vrings for the first time.
    fn reset_device(&mut self) -> RequestOutcome {
        self.reset_all();
        self.state.vrings.iter_mut().for_each(Vring::reset);
        self.state.status = 0;
        NO_REPLY_PAYLOAD
    }

    /// Sets the device status. A status of 0 is the driver's reset (virtio 1.3 §2.1.2), after which
    /// the device must not access memory.
    fn set_status(&mut self, status: u8) -> RequestOutcome {
        self.state.status = status;
        if status == 0 {
            self.reset_all();
        }
        NO_REPLY_PAYLOAD
    }

    // --- vrings --------------------------------------------------------------------------------

    fn vring(&mut self, ring: u16) -> Result<&mut Vring, RequestError> {
        let queue_pairs = self.queue_pairs;
        self.state
            .vrings
            .get_mut(usize::from(ring))
            .ok_or(RequestError::NoSuchVring { ring, queue_pairs })
    }

    fn indices(&self) -> std::ops::Range<u16> {
        0..2 * self.queue_pairs
    }

    // --- replies --------------------------------------------------------------------------------

    /// The acknowledgement, if REPLY_ACK is negotiated and the request asks for one.
    fn acknowledge(&self, header: Header, result: u64) -> Option<Reply> {
        let wanted = header.need_reply && self.state.protocol_features & REPLY_ACK != 0;
        wanted.then_some(Reply {
            code: header.code,
            payload: ReplyPayload::U64(result),
        })
    }

    fn note_refusal(&mut self, code: u32, error: RequestError) {
        let request = FrontendReq::try_from(code)
            .map_or_else(|_| format!("request {code}"), |code| format!("{code:?}"));
        let refused = RefusedRequest { request, error };
        if let Some(suppressed) = self.log.refusals.allow() {
            warn!(suppressed, "{refused}");
        }
        self.first_refusal.get_or_insert(refused);
    }
}

fn reply_u64(value: u64) -> RequestOutcome {
    Ok(Some(ReplyPayload::U64(value)))
}

fn end_session(error: impl Into<SessionError>) -> Failure {
    Failure::EndSession(error.into())
}

#[cfg(test)]
mod tests;
