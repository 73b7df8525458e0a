//! The session's state and what each request does to it.
//!
//! # When a ring runs
//! It starts when its size, addresses and base are known and SET_VRING_KICK has come, in whatever
//! order; it stops at GET_VRING_BASE, at a reset (RESET_DEVICE, RESET_OWNER, a device status of 0)
//! and at the end of the connection. Stopping forgets the kick descriptor, so that a front-end can
//! configure the ring anew, message by message, before its next SET_VRING_KICK starts it. Call and
//! err descriptors are kept. A new size, address or base of a running ring stops it and starts it
//! again.
//!
//! A ring that could not start is tried again when it or the memory table changes.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tracing::{debug, warn};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtionet_virtqueue::memory::{GuestMemory, MAX_REGIONS, Region, RegionSpec};

use crate::backend::{Backend, BackendError};
use crate::error::{DecodeError, PeerError, Refusal, SessionError};
use crate::features::{self, F_PROTOCOL_FEATURES};
use crate::quiet::Quiet;
use crate::request::{Areas, Notifier, Request};
use crate::sys::peer_pid;
use crate::vring::{Kick, Vring};
use crate::wire::{Answer, Channel, Header, Incoming, Message, Reply};

const PACKED: u64 = 1 << VIRTIO_F_RING_PACKED;
/// Ring indices have 8 bits.
const MAX_PAIRS: u16 = 128;
const REPLY_ACK: u64 = VhostUserProtocolFeatures::REPLY_ACK.bits();

/// How a session came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The front-end closed the connection.
    Disconnected,
    /// The stop descriptor became readable.
    Stopped,
}

/// Serves one front-end until it goes away, `stop` becomes readable (it is not read), or an error
/// ends the session. In every case no ring runs afterwards.
///
/// # Errors
/// See [`SessionError`].
pub fn serve(
    stream: UnixStream,
    backend: &dyn Backend,
    stop: BorrowedFd<'_>,
) -> Result<Ended, SessionError> {
    let pid = peer_pid(&stream);
    let channel = Channel::new(stream, stop)?;
    let mut session = Session::new(backend);
    backend.connected(pid);
    let result = run(&channel, &mut session);
    session.stop_all();
    backend.disconnected();
    result
}

fn run(channel: &Channel<'_>, session: &mut Session<'_>) -> Result<Ended, SessionError> {
    loop {
        let message = match channel.receive()? {
            Incoming::Message(message) => message,
            Incoming::Closed => return Ok(Ended::Disconnected),
            Incoming::Stopped => return Ok(Ended::Stopped),
        };
        // When a reply cannot go out, the next receive says why.
        if let Some(reply) = session.handle(message)? {
            channel.send(reply)?;
        }
    }
}

/// One front-end's session without its socket.
pub struct Session<'b> {
    backend: &'b dyn Backend,
    /// Queue pairs, each with two of the rings below.
    pairs: u16,
    vrings: Vec<Vring>,
    memory: Arc<GuestMemory>,
    /// What SET_FEATURES said, VHOST_USER_F_PROTOCOL_FEATURES included.
    features: Option<u64>,
    protocol_features: u64,
    status: u8,
    refusals: Quiet,
    failed_starts: Quiet,
}

/// Why a request was not done.
enum Failure {
    Refused(Refusal),
    Ends(SessionError),
}

impl<E: Into<Refusal>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Refused(error.into())
    }
}

/// The answer of its own that a request has, if it has one.
type Outcome = Result<Option<Answer>, Failure>;

/// The outcome of a request that is done and has no answer of its own.
const DONE: Outcome = Ok(None);

impl<'b> Session<'b> {
    /// A session in which nothing has been said yet.
    pub fn new(backend: &'b dyn Backend) -> Self {
        let pairs = backend.max_pairs().min(MAX_PAIRS);
        Self {
            backend,
            pairs,
            vrings: (0..2 * pairs).map(|_| Vring::default()).collect(),
            memory: Arc::default(),
            features: None,
            protocol_features: 0,
            status: 0,
            refusals: Quiet::default(),
            failed_starts: Quiet::default(),
        }
    }

    /// Does what a message asks; the reply, if there is one, goes back to the front-end.
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
            Err(DecodeError::Peer(error)) => return Err(error.into()),
        };
        match outcome {
            Ok(Some(answer)) => Ok(Some(Reply {
                code: header.code,
                answer,
            })),
            Ok(None) => Ok(self.acknowledge(header, 0)),
            Err(Failure::Refused(refusal)) => {
                self.log_refusal(header.code, &refusal);
                Ok(self.acknowledge(header, 1))
            }
            Err(Failure::Ends(error)) => Err(error),
        }
    }

    /// Stops every ring that runs, as at the end of a connection.
    pub fn stop_all(&mut self) {
        for index in self.indices() {
            self.stop(index);
        }
    }

    fn dispatch(&mut self, request: Request) -> Outcome {
        debug!(?request, "vhost-user");
        match request {
            Request::GetFeatures => answer(self.offered()),
            Request::SetFeatures(bits) => self.set_features(bits),
            Request::SetOwner => DONE,
            Request::ResetOwner => self.reset_owner(),
            Request::SetMemTable(regions) => self.set_mem_table(regions),
            Request::AddMemReg(spec, file) => self.add_mem_reg(spec, file),
            Request::RemMemReg(spec) => self.rem_mem_reg(spec),
            Request::GetMaxMemSlots => answer(u64::try_from(MAX_REGIONS).unwrap_or(u64::MAX)),
            Request::SetVringNum { ring, size } => self.set_vring_num(ring, size),
            Request::SetVringAddr { ring, areas } => self.set_vring_addr(ring, areas),
            Request::SetVringBase { ring, base } => self.set_vring_base(ring, base),
            Request::GetVringBase { ring } => self.get_vring_base(ring),
            Request::SetVringKick(kick) => self.set_vring_kick(kick),
            Request::SetVringCall(call) => self.set_vring_call(call),
            Request::SetVringErr(err) => self.set_vring_err(err),
            Request::SetVringEnable { ring, enabled } => self.set_vring_enable(ring, enabled),
            Request::GetProtocolFeatures => answer(features::OFFERED),
            Request::SetProtocolFeatures(bits) => self.set_protocol_features(bits),
            Request::GetQueueNum => answer(self.pairs.into()),
            Request::NetSetMtu(mtu) => self.net_set_mtu(mtu),
            Request::ResetDevice => self.reset_device(),
            Request::GetStatus => answer(self.status.into()),
            Request::SetStatus(status) => self.set_status(status),
            Request::SendRarp(_) | Request::NotOffered(_) => Err(Refusal::NotOffered.into()),
            Request::Unknown(_) => Err(Refusal::Unknown.into()),
        }
    }

    // --- features -------------------------------------------------------------------------------

    fn offered(&self) -> u64 {
        self.backend.features() | F_PROTOCOL_FEATURES
    }

    fn set_features(&mut self, bits: u64) -> Outcome {
        let surplus = bits & !self.offered();
        if surplus != 0 {
            return Err(Refusal::Features(surplus).into());
        }
        let changes = bits ^ self.features.unwrap_or(0);
        if changes & PACKED != 0 && self.vrings.iter().any(|vring| vring.running) {
            return Err(Refusal::FormatWhileRunning.into());
        }
        if self.features == Some(bits) {
            return DONE;
        }
        self.features = Some(bits);
        self.backend.set_features(self.virtio_features());
        if changes & F_PROTOCOL_FEATURES != 0 {
            self.tell_enabled();
        }
        DONE
    }

    /// The virtio features in force, without the protocol's own bit.
    fn virtio_features(&self) -> u64 {
        self.features.unwrap_or(0) & !F_PROTOCOL_FEATURES
    }

    fn set_protocol_features(&mut self, bits: u64) -> Outcome {
        let surplus = bits & !features::OFFERED;
        if surplus != 0 {
            return Err(Refusal::ProtocolFeatures(surplus).into());
        }
        self.protocol_features = bits;
        self.backend.negotiated(bits);
        DONE
    }

    // --- memory ---------------------------------------------------------------------------------

    fn set_mem_table(&mut self, regions: Vec<(RegionSpec, File)>) -> Outcome {
        let regions = regions
            .into_iter()
            .map(|(spec, file)| Region::map(spec, file).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        self.use_memory(GuestMemory::new(regions)?);
        DONE
    }

    fn add_mem_reg(&mut self, spec: RegionSpec, file: File) -> Outcome {
        let region = Region::map(spec, file)?;
        self.use_memory(self.memory.with(region)?);
        DONE
    }

    fn rem_mem_reg(&mut self, spec: RegionSpec) -> Outcome {
        self.use_memory(self.memory.without(spec)?);
        DONE
    }

    fn use_memory(&mut self, memory: GuestMemory) {
        self.memory = Arc::new(memory);
        self.backend.set_memory(&self.memory);
        // A ring whose addresses were not in memory before may start now; if not, that is no fault
        // of the request that changed the table.
        for index in self.indices() {
            if !self.memory.is_empty()
                && let Err(error) = self.start(index)
            {
                self.failed_starts
                    .log(|held_back| warn!(held_back, "ring {index} does not start: {error}"));
            }
        }
    }

    // --- rings ----------------------------------------------------------------------------------

    fn set_vring_num(&mut self, ring: u16, size: u16) -> Outcome {
        if !size.is_power_of_two() && self.virtio_features() & PACKED == 0 {
            return Err(Refusal::RingSize(size.into()).into());
        }
        let vring = self.vring(ring)?;
        if vring.size.replace(size) != Some(size) {
            self.pause(ring);
        }
        self.start_or_end(ring)
    }

    fn set_vring_addr(&mut self, ring: u16, areas: Areas) -> Outcome {
        let vring = self.vring(ring)?;
        if vring.areas.replace(areas) != Some(areas) {
            self.pause(ring);
        }
        self.start_or_end(ring)
    }

    fn set_vring_base(&mut self, ring: u16, base: u32) -> Outcome {
        if base > u16::MAX.into() && self.virtio_features() & PACKED == 0 {
            return Err(Refusal::RingBase(base).into());
        }
        self.vring(ring)?;
        self.pause(ring);
        self.vring(ring)?.base = Some(base);
        self.start_or_end(ring)
    }

    fn get_vring_base(&mut self, ring: u16) -> Outcome {
        if let Err(refusal) = self.vring(ring) {
            let request = FrontendReq::GET_VRING_BASE;
            return Err(ends(PeerError::Unanswerable { request, refusal }));
        }
        self.stop(ring);
        Ok(Some(Answer::VringState {
            index: ring.into(),
            num: self.vring(ring)?.base.unwrap_or(0),
        }))
    }

    fn set_vring_kick(&mut self, kick: Notifier) -> Outcome {
        let vring = self.vring(kick.ring)?;
        vring.kick = Kick::new(kick.fd.clone());
        if vring.running {
            self.backend.set_kick(kick.ring, kick.fd)?;
            return DONE;
        }
        self.start_or_end(kick.ring)
    }

    fn set_vring_call(&mut self, call: Notifier) -> Outcome {
        let vring = self.vring(call.ring)?;
        vring.call.clone_from(&call.fd);
        if vring.running {
            self.backend.set_call(call.ring, call.fd);
        }
        self.backend.ring_named(call.ring);
        DONE
    }

    fn set_vring_err(&mut self, err: Notifier) -> Outcome {
        let vring = self.vring(err.ring)?;
        vring.err.clone_from(&err.fd);
        if vring.running {
            self.backend.set_err(err.ring, err.fd);
        }
        DONE
    }

    fn set_vring_enable(&mut self, ring: u16, enabled: bool) -> Outcome {
        let vring = self.vring(ring)?;
        vring.enabled = Some(enabled);
        if vring.running {
            self.backend.set_enabled(ring, enabled);
        }
        DONE
    }

    /// Whether frames pass: what SET_VRING_ENABLE said last, else what holds without it.
    fn enabled(&self, vring: &Vring) -> bool {
        let negotiated = self.features.unwrap_or(0) & F_PROTOCOL_FEATURES != 0;
        vring.enabled.unwrap_or(!negotiated)
    }

    /// Says so to the rings that run and go by the rule of no SET_VRING_ENABLE.
    fn tell_enabled(&self) {
        for (index, vring) in (0..).zip(&self.vrings) {
            if vring.running && vring.enabled.is_none() {
                self.backend.set_enabled(index, self.enabled(vring));
            }
        }
    }

    // --- the device -----------------------------------------------------------------------------

    fn net_set_mtu(&mut self, mtu: u16) -> Outcome {
        self.backend.set_mtu(mtu)?;
        DONE
    }

    /// Deprecated; the protocol's text recommends to stop all rings and to forget nothing else.
    fn reset_owner(&mut self) -> Outcome {
        self.stop_all();
        DONE
    }

    /// The memory table outlives a reset: front-ends send only what changes in it. So do the
    /// features: front-ends negotiate before they start rings, and not all of them after a reset.
    fn reset_device(&mut self) -> Outcome {
        self.stop_all();
        self.vrings.iter_mut().for_each(Vring::reset);
        self.status = 0;
        DONE
    }

    /// A status of 0 is the driver's reset (virtio 1.3 §2.1.2): the device must leave memory alone.
    fn set_status(&mut self, status: u8) -> Outcome {
        self.status = status;
        if status == 0 {
            self.stop_all();
        }
        DONE
    }

    // --- starting and stopping ------------------------------------------------------------------

    /// Starts a ring that is ready; a ring without any memory ends the session.
    fn start_or_end(&mut self, ring: u16) -> Outcome {
        if self.memory.is_empty() && self.ready(ring).is_some() {
            return Err(ends(SessionError::NotShared));
        }
        self.start(ring)?;
        DONE
    }

    fn start(&mut self, ring: u16) -> Result<(), BackendError> {
        let Some(start) = self.ready(ring) else {
            return Ok(());
        };
        debug!(
            ring,
            size = start.layout.size,
            base = start.base,
            enabled = start.enabled,
            "ring starts"
        );
        self.backend.start_ring(ring, start)?;
        self.vrings[usize::from(ring)].running = true;
        Ok(())
    }

    /// What a ring that is to start, and does not run, starts with.
    fn ready(&self, ring: u16) -> Option<crate::RingStart> {
        let vring = &self.vrings[usize::from(ring)];
        if vring.running {
            return None;
        }
        vring.start(self.enabled(vring), self.virtio_features(), &self.memory)
    }

    /// Stops a ring for good: it starts again only at a new SET_VRING_KICK.
    fn stop(&mut self, ring: u16) {
        self.pause(ring);
        self.vrings[usize::from(ring)].kick = Kick::Unset;
    }

    /// Stops a ring, if it runs, and remembers where it stands.
    fn pause(&mut self, ring: u16) {
        let vring = &mut self.vrings[usize::from(ring)];
        if !std::mem::take(&mut vring.running) {
            return;
        }
        let base = self.backend.stop_ring(ring);
        vring.base = base.or(vring.base);
        debug!(ring, base = vring.base, "ring stops");
    }

    fn vring(&mut self, ring: u16) -> Result<&mut Vring, Refusal> {
        let pairs = self.pairs;
        self.vrings
            .get_mut(usize::from(ring))
            .ok_or(Refusal::NoSuchRing { ring, pairs })
    }

    fn indices(&self) -> std::ops::Range<u16> {
        0..2 * self.pairs
    }

    // --- replies --------------------------------------------------------------------------------

    /// The acknowledgement, once REPLY_ACK is negotiated and when this request wants one.
    fn acknowledge(&self, header: Header, result: u64) -> Option<Reply> {
        let wanted = header.need_reply && self.protocol_features & REPLY_ACK != 0;
        wanted.then_some(Reply {
            code: header.code,
            answer: Answer::U64(result),
        })
    }

    fn log_refusal(&mut self, code: u32, refusal: &Refusal) {
        let name = FrontendReq::try_from(code)
            .map_or_else(|_| format!("request {code}"), |code| format!("{code:?}"));
        self.refusals
            .log(|held_back| warn!(held_back, "{name} refused: {refusal}"));
    }
}

fn answer(value: u64) -> Outcome {
    Ok(Some(Answer::U64(value)))
}

fn ends(error: impl Into<SessionError>) -> Failure {
    Failure::Ends(error.into())
}

#[cfg(test)]
mod tests;
