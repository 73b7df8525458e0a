//! What a session does for a live migration: the log of written pages, and the announcement of the
//! guest's address where it has arrived.
//!
//! Writes are logged while VHOST_F_LOG_ALL is negotiated and SET_LOG_BASE has given a log. Both come
//! and go while vrings run, in any order. QEMU sends the log first when a migration begins; if the
//! driver starts the device again during a migration, the vrings start before the log comes.
//!
//! | | no log yet | log | log refused |
//! |---|---|---|---|
//! | VHOST_F_LOG_ALL | vrings run, nothing is logged | writes are logged | vrings are stopped |
//! | without | nothing is logged | nothing is logged | nothing is logged |
//!
//! Vrings that wrote before the log came make the session log all of memory: what they wrote is not
//! known. A front-end takes no notice of the answer to SET_LOG_BASE, so a log that is refused must
//! not lead to writes that it does not hear of.

use std::sync::Arc;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use virtionet_virtqueue::memory::{DirtyLog, GuestMemory, LogError};

use super::{NO_REPLY_PAYLOAD, RequestOutcome, Session};
use crate::error::RequestError;
use crate::memory_file;
use crate::protocol_features::VHOST_F_LOG_ALL;
use crate::request::LogBase;
use crate::vring::Vring;
use crate::wire::ReplyPayload;

const LOG_SHMFD: u64 = VhostUserProtocolFeatures::LOG_SHMFD.bits();

/// The outcome of the last SET_LOG_BASE.
#[derive(Debug, Default)]
pub(super) enum LogBaseState {
    /// None has come.
    #[default]
    Unset,
    /// The log cannot be used.
    Refused,
    /// The log.
    Set(Arc<DirtyLog>),
}

impl Session<'_> {
    /// Sets the log. With LOG_SHMFD the front-end waits for an answer, and gets one even if the log
    /// is refused. The protocol does not define it: QEMU looks at its header only, and the front-end
    /// of rust-vmm wants the log's size and offset, of which it takes a size of 0 for an error.
    pub(super) fn set_log_base(&mut self, base: LogBase) -> RequestOutcome {
        if self.state.protocol_features & LOG_SHMFD == 0 {
            return Err(RequestError::LogWithoutFile.into());
        }
        let (mut size, mut offset) = (base.size, base.offset);
        if let Err(refusal) = self.replace_log(base) {
            (size, offset) = (0, 0);
            self.state.log_base = LogBaseState::Refused;
            if self.wants_log() {
                // It may not run unlogged, and nothing may be written to the old log.
                self.stop_writing();
            }
            self.note_refusal(FrontendReq::SET_LOG_BASE.into(), refusal);
        }
        Ok(Some(ReplyPayload::Log { size, offset }))
    }

    fn replace_log(&mut self, base: LogBase) -> Result<(), RequestError> {
        let LogBase { size, offset, fd } = base;
        let fd = fd.ok_or(RequestError::LogWithoutFile)?;
        let file = memory_file::from_fd(fd, "the dirty log", &self.log.memory_on_disk)?;
        let log = Arc::new(DirtyLog::map(file, size, offset)?);
        let memory = self.state.memory.with_log(Some(Arc::clone(&log)))?;
        self.state.log_base = LogBaseState::Set(log);
        if self.wants_log() {
            let has_written = self.state.vrings.iter().any(Vring::is_started);
            self.apply_memory(memory);
            if has_written {
                self.state.memory.log_all();
            }
        }
        Ok(())
    }

    /// The memory with its log changed as the features `bits` demand; `None` when they change
    /// nothing.
    pub(super) fn memory_with_log_of(
        &self,
        bits: u64,
    ) -> Result<Option<GuestMemory>, RequestError> {
        let wants_log = bits & VHOST_F_LOG_ALL != 0;
        if wants_log == self.wants_log() {
            return Ok(None);
        }
        let log = match &self.state.log_base {
            LogBaseState::Refused if wants_log => return Err(RequestError::LogRefused),
            LogBaseState::Set(log) if wants_log => Some(Arc::clone(log)),
            _ => None,
        };
        Ok(Some(self.state.memory.with_log(log)?))
    }

    /// The same memory with the log, if writes are logged, and marked if its pages may be missing.
    pub(super) fn with_log(&self, memory: &GuestMemory) -> Result<GuestMemory, LogError> {
        let log = match &self.state.log_base {
            LogBaseState::Set(log) if self.wants_log() => Some(Arc::clone(log)),
            _ => None,
        };
        let is_in_postcopy = self.state.postcopy.is_listening();
        Ok(memory.with_log(log)?.with_postcopy(is_in_postcopy))
    }

    fn wants_log(&self) -> bool {
        self.state.features.unwrap_or(0) & VHOST_F_LOG_ALL != 0
    }

    /// Whether nothing may be written to guest memory, because it would have to be logged and
    /// cannot be.
    pub(super) fn must_not_write(&self) -> bool {
        self.wants_log() && matches!(self.state.log_base, LogBaseState::Refused)
    }

    /// Stops all vrings until there is a log or none is wanted.
    fn stop_writing(&mut self) {
        for index in self.indices() {
            self.pause(index);
        }
        if let Ok(memory) = self.state.memory.with_log(None) {
            self.apply_memory(memory);
        }
    }

    /// Announces the guest's address on the uplink.
    pub(super) fn send_rarp(&mut self, mac: [u8; 6]) -> RequestOutcome {
        const GROUP: u8 = 1;
        if mac[0] & GROUP != 0 || mac == [0; 6] {
            return Err(RequestError::Mac(mac).into());
        }
        self.backend.announce(mac);
        NO_REPLY_PAYLOAD
    }
}
