//! The requests that configure, start and stop vrings.

use tracing::debug;
use vhost::vhost_user::message::FrontendReq;

use super::{NO_REPLY_PAYLOAD, PACKED, RequestOutcome, Session, end_session};
use crate::backend::VringStart;
use crate::backend_error::BackendError;
use crate::error::{ProtocolError, RequestError, SessionError};
use crate::protocol_features::VHOST_USER_F_PROTOCOL_FEATURES;
use crate::request::{VringAreas, VringEventFd};
use crate::vring::{Kick, Vring, VringBase};
use crate::vring_state::VringEvent;
use crate::wire::ReplyPayload;

impl Session<'_> {
    pub(super) fn set_vring_num(&mut self, ring: u16, size: u16) -> RequestOutcome {
        if !size.is_power_of_two() && self.virtio_features() & PACKED == 0 {
            return Err(RequestError::VringSize(size.into()).into());
        }
        let vring = self.vring(ring)?;
        if vring.size.replace(size) != Some(size) {
            self.pause(ring);
        }
        self.start_or_end_session(ring)
    }

    /// Front-ends send the addresses of a running vring again to log writes to its used ring, or no
    /// longer. That alone does not stop it.
    pub(super) fn set_vring_addr(
        &mut self,
        ring: u16,
        areas: VringAreas,
        used_log: Option<u64>,
    ) -> RequestOutcome {
        let vring = self.vring(ring)?;
        let is_log_new = std::mem::replace(&mut vring.used_log, used_log) != used_log;
        if is_log_new && vring.is_started() {
            self.backend.set_used_log(ring, used_log);
        }
        let vring = self.vring(ring)?;
        if vring.areas.replace(areas) != Some(areas) {
            self.pause(ring);
        }
        self.start_or_end_session(ring)
    }

    pub(super) fn set_vring_base(&mut self, ring: u16, base: u32) -> RequestOutcome {
        if base > u16::MAX.into() && self.virtio_features() & PACKED == 0 {
            return Err(RequestError::VringBase(base).into());
        }
        self.vring(ring)?;
        self.pause(ring);
        self.vring(ring)?.base = Some(VringBase::known(base));
        self.start_or_end_session(ring)
    }

    pub(super) fn get_vring_base(&mut self, ring: u16) -> RequestOutcome {
        if let Err(refusal) = self.vring(ring) {
            let request = FrontendReq::GET_VRING_BASE;
            return Err(end_session(ProtocolError::Unanswerable {
                request,
                refusal,
            }));
        }
        self.stop(ring);
        self.backend.forget_progress(ring);
        let vring = self.vring(ring)?;
        let base = vring.base.map_or(0, |base| base.current);
        vring.base = vring.base.map(|base| VringBase::known(base.current));
        Ok(Some(ReplyPayload::VringState {
            index: ring.into(),
            num: base,
        }))
    }

    pub(super) fn set_vring_kick(&mut self, kick: VringEventFd) -> RequestOutcome {
        let is_started = self.vring(kick.ring)?.is_started();
        if is_started {
            self.backend.set_kick(kick.ring, kick.fd.clone())?;
        }
        self.vring(kick.ring)?.kick = Kick::new(kick.fd);
        if is_started {
            return NO_REPLY_PAYLOAD;
        }
        self.start_or_end_session(kick.ring)
    }

    pub(super) fn set_vring_call(&mut self, call: VringEventFd) -> RequestOutcome {
        let vring = self.vring(call.ring)?;
        vring.call.clone_from(&call.fd);
        if vring.is_started() {
            self.backend.set_call(call.ring, call.fd);
        }
        self.backend.on_vring_announced(call.ring);
        NO_REPLY_PAYLOAD
    }

    pub(super) fn set_vring_err(&mut self, err: VringEventFd) -> RequestOutcome {
        let vring = self.vring(err.ring)?;
        vring.err.clone_from(&err.fd);
        if vring.is_started() {
            self.backend.set_err(err.ring, err.fd);
        }
        NO_REPLY_PAYLOAD
    }

    pub(super) fn set_vring_enable(&mut self, ring: u16, enabled: bool) -> RequestOutcome {
        let vring = self.vring(ring)?;
        vring.enabled = Some(enabled);
        if vring.is_started() {
            self.backend.set_enabled(ring, enabled);
        }
        NO_REPLY_PAYLOAD
    }

    /// Whether the vring carries frames: the value of the last SET_VRING_ENABLE, or the default if
    /// none has come.
    fn is_enabled(&self, vring: &Vring) -> bool {
        let negotiated = self.state.features.unwrap_or(0) & VHOST_USER_F_PROTOCOL_FEATURES != 0;
        vring.enabled.unwrap_or(!negotiated)
    }

    /// Enables or disables the started vrings for which no SET_VRING_ENABLE has come.
    pub(super) fn update_enabled(&self) {
        for (index, vring) in (0..).zip(&self.state.vrings) {
            if vring.is_started() && vring.enabled.is_none() {
                self.backend.set_enabled(index, self.is_enabled(vring));
            }
        }
    }

    // --- starting and stopping ------------------------------------------------------------------

    /// Starts a vring that is ready, or ends the session if there is no guest memory at all.
    fn start_or_end_session(&mut self, ring: u16) -> RequestOutcome {
        if self.state.memory.is_empty() && self.pending_start(ring).is_some() {
            return Err(end_session(SessionError::NotShared));
        }
        self.start(ring)?;
        NO_REPLY_PAYLOAD
    }

    pub(super) fn start(&mut self, ring: u16) -> Result<(), BackendError> {
        let Some(start) = self.pending_start(ring) else {
            return Ok(());
        };
        let areas = start.layout.areas(start.features & PACKED != 0);
        if !self.state.memory.knows_areas(&areas) {
            debug!(ring, "vring waits for the translation of its areas");
            return Ok(());
        }
        debug!(
            ring,
            size = start.layout.size,
            base = start.base,
            enabled = start.enabled,
            "vring starts"
        );
        self.backend.start_vring(ring, start)?;
        self.change_state(ring, VringEvent::Start);
        self.state.postcopy.note_start();
        Ok(())
    }

    /// The configuration with which a stopped vring starts, if it is complete.
    pub(super) fn pending_start(&self, ring: u16) -> Option<VringStart> {
        let vring = &self.state.vrings[usize::from(ring)];
        if vring.is_started() || self.must_not_write() {
            return None;
        }
        vring.to_vring_start(
            self.is_enabled(vring),
            self.virtio_features(),
            &self.state.memory,
        )
    }

    /// Stops a vring until a new SET_VRING_KICK starts it again.
    pub(super) fn stop(&mut self, ring: u16) {
        self.pause(ring);
        self.state.vrings[usize::from(ring)].kick = Kick::Unset;
        self.forget_translations_if_idle();
    }

    /// Stops a vring, if it is started, and stores its base.
    pub(super) fn pause(&mut self, ring: u16) {
        if !self.state.vrings[usize::from(ring)].is_started() {
            return;
        }
        let base = self.backend.stop_vring(ring);
        self.change_state(ring, VringEvent::Stop);
        if let Some(base) = base {
            self.state.vrings[usize::from(ring)].stopped_at(base);
        }
        debug!(ring, base, "vring stopped");
    }

    /// Changes the state of a vring by the same table that the device uses.
    pub(super) fn change_state(&mut self, ring: u16, event: VringEvent) {
        let Some(vring) = self.state.vrings.get_mut(usize::from(ring)) else {
            return;
        };
        match vring.state.after(event) {
            Ok(state) => vring.state = state,
            Err(error) => tracing::error!("vring {ring}: {error}"),
        }
    }
}
