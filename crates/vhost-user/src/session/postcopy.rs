//! What a session does for a migration by postcopy: the guest runs at the destination before all of
//! its memory has arrived.
//!
//! ```text
//!          POSTCOPY_ADVISE           POSTCOPY_LISTEN
//!   Off ────────────────────► Advised ──────────────► Listening ◄───┐
//!    ▲   reply: userfaultfd                             │  │ │      │ acknowledgement
//!    └──────────────── POSTCOPY_END ────────────────────┘  └─┴─► memory awaits it
//!                                          SET_MEM_TABLE, ADD_MEM_REG
//!                                          reply: addresses in this process
//! ```
//!
//! A migration that completes without postcopy is over when the first vring starts: `Advised` becomes
//! `Off`. A second POSTCOPY_ADVISE begins anew. Every other request out of order ends the session.
//!
//! The regions that come while `Listening` are registered before they are answered, and used after
//! the acknowledgement, because the front-end can find a page by its address only from then on. QEMU
//! acknowledges once for all regions that it has added, under the name of its last request.
//!
//! **Several queue pairs.** QEMU (10.0) has a postcopy handler for each queue pair, but sends memory for
//! the first one only, and waits for ever for the answer to what it did not send for the second one. It
//! negotiates for each queue pair, too. So a front-end that asks for protocol features after it has set
//! some is not offered PAGEFAULT, and then refuses postcopy before a migration begins.

use std::sync::Arc;

use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};
use virtionet_virtqueue::memory::{GuestMemory, MappedRegion, MissingPages, RegionSpec};

use super::{NO_REPLY_PAYLOAD, RequestOutcome, Session, end_session};
use crate::error::{ProtocolError, RequestError};
use crate::foreign_fd::ForeignFd;
use crate::request::Request;
use crate::vring::Vring;
use crate::wire::ReplyPayload;

const PAGEFAULT: u64 = VhostUserProtocolFeatures::PAGEFAULT.bits();

/// How far a postcopy migration is.
#[derive(Debug, Default)]
pub(super) enum Postcopy {
    /// There is none.
    #[default]
    Off,
    /// There may be one: POSTCOPY_ADVISE has come.
    Advised(Arc<MissingPages>),
    /// Pages may be missing: POSTCOPY_LISTEN has come.
    Listening {
        pages: Arc<MissingPages>,
        /// The memory that the front-end has not acknowledged yet.
        awaiting: Option<GuestMemory>,
    },
}

impl Postcopy {
    pub(super) fn is_off(&self) -> bool {
        matches!(self, Self::Off)
    }

    pub(super) fn is_listening(&self) -> bool {
        matches!(self, Self::Listening { .. })
    }

    /// A vring has started. Before POSTCOPY_LISTEN that means that the guest's memory has arrived.
    pub(super) fn note_start(&mut self) {
        if let Self::Advised(_) = self {
            *self = Self::Off;
        }
    }

    /// For an error: after "came".
    fn describe(&self) -> &'static str {
        match self {
            Self::Off => "before POSTCOPY_ADVISE",
            Self::Advised(_) => "before POSTCOPY_LISTEN",
            Self::Listening { awaiting: None, .. } => "after POSTCOPY_LISTEN",
            Self::Listening { .. } => "before the acknowledgement of a memory table",
        }
    }
}

impl Session<'_> {
    /// The protocol features for the answer to GET_PROTOCOL_FEATURES.
    pub(super) fn protocol_features_to_offer(&self) -> u64 {
        let offered = self.offered_protocol_features();
        let asks_for_another_pair = self.state.protocol_features != 0;
        match asks_for_another_pair || !MissingPages::are_supported() {
            true => offered & !PAGEFAULT,
            false => offered,
        }
    }

    /// The pages that threads may wait for, or will.
    pub(super) fn missing_pages(&self) -> Option<&Arc<MissingPages>> {
        match &self.state.postcopy {
            Postcopy::Off => None,
            Postcopy::Advised(pages) | Postcopy::Listening { pages, .. } => Some(pages),
        }
    }

    /// Ends the session if an acknowledgement of memory is awaited and `request` is something else.
    pub(super) fn check_awaited(&self, request: &Request) -> Result<(), super::Failure> {
        let is_awaiting = matches!(
            self.state.postcopy,
            Postcopy::Listening {
                awaiting: Some(_),
                ..
            }
        );
        match request {
            _ if !is_awaiting => Ok(()),
            Request::AddMemReg(..) | Request::AcknowledgeMemory(_) => Ok(()),
            // The acknowledgement of SET_MEM_TABLE is a number, of the same bytes as an empty table.
            Request::SetMemTable(regions) if regions.is_empty() => Ok(()),
            _ => Err(self.out_of_order("another request")),
        }
    }

    pub(super) fn postcopy_advise(&mut self) -> RequestOutcome {
        self.check_pagefault()?;
        if self.state.postcopy.is_listening() {
            return Err(self.out_of_order("POSTCOPY_ADVISE"));
        }
        let pages = MissingPages::open().map_err(RequestError::from)?;
        let fd = pages.copy_of_fd().map_err(RequestError::PostcopyGuard)?;
        self.state.postcopy = Postcopy::Advised(Arc::new(pages));
        Ok(Some(ReplyPayload::Descriptor(fd)))
    }

    /// Memory that was shared before is not registered: the front-end does not know its addresses.
    /// Therefore no vring may use it.
    pub(super) fn postcopy_listen(&mut self) -> RequestOutcome {
        self.check_pagefault()?;
        let Postcopy::Advised(pages) = &self.state.postcopy else {
            return Err(self.out_of_order("POSTCOPY_LISTEN"));
        };
        if self.state.vrings.iter().any(Vring::is_started) {
            return Err(end_session(ProtocolError::PostcopyOrder {
                request: "POSTCOPY_LISTEN",
                state: "while vrings run",
            }));
        }
        self.state.postcopy = Postcopy::Listening {
            pages: Arc::clone(pages),
            awaiting: None,
        };
        NO_REPLY_PAYLOAD
    }

    pub(super) fn postcopy_end(&mut self) -> RequestOutcome {
        self.check_pagefault()?;
        let Postcopy::Listening { pages, .. } = &self.state.postcopy else {
            return Err(self.out_of_order("POSTCOPY_END"));
        };
        pages.finish();
        self.state.postcopy = Postcopy::Off;
        let memory = self.with_log(&self.state.memory)?;
        self.apply_memory(memory);
        Ok(Some(ReplyPayload::U64(0)))
    }

    /// To be called at the end of a session. Threads that wait for pages go on without them.
    pub(super) fn abandon_postcopy(&mut self) {
        if let Postcopy::Listening { pages, .. } = &self.state.postcopy {
            pages.abandon();
        }
        self.state.postcopy = Postcopy::Off;
    }

    pub(super) fn set_mem_table_in_postcopy(
        &mut self,
        regions: Vec<(RegionSpec, ForeignFd)>,
    ) -> RequestOutcome {
        if regions.is_empty() {
            return self.acknowledge_memory(0);
        }
        let mapped = regions
            .into_iter()
            .map(|(spec, fd)| self.map_registered(spec, fd))
            .collect::<Result<Vec<_>, _>>();
        let table = mapped.and_then(|mapped| {
            let answers = mapped.iter().map(|region| answer(region)).collect();
            self.await_acknowledgement(GuestMemory::new(mapped)?)?;
            Ok(ReplyPayload::Table(answers))
        });
        table
            .map(Some)
            .map_err(|refusal| unanswerable(FrontendReq::SET_MEM_TABLE, refusal))
    }

    pub(super) fn add_mem_reg_in_postcopy(
        &mut self,
        spec: RegionSpec,
        fd: ForeignFd,
    ) -> RequestOutcome {
        let region = self.map_registered(spec, fd).and_then(|region| {
            let current = match &self.state.postcopy {
                Postcopy::Listening {
                    awaiting: Some(memory),
                    ..
                } => memory,
                _ => &*self.state.memory,
            };
            let memory = current.with_region(Arc::clone(&region))?;
            self.await_acknowledgement(memory)?;
            Ok(ReplyPayload::Region(answer(&region)))
        });
        region
            .map(Some)
            .map_err(|refusal| unanswerable(FrontendReq::ADD_MEM_REG, refusal))
    }

    /// The front-end can provide pages of the memory that was sent last, so it is used from now on. It
    /// also says so where it has sent none.
    pub(super) fn acknowledge_memory(&mut self, result: u64) -> RequestOutcome {
        let Postcopy::Listening { awaiting, .. } = &mut self.state.postcopy else {
            return Err(RequestError::Unknown.into());
        };
        if result != 0 {
            return Err(end_session(ProtocolError::PostcopyMemory(result)));
        }
        if let Some(memory) = awaiting.take() {
            self.apply_memory(memory);
        }
        NO_REPLY_PAYLOAD
    }

    /// Maps a region so that accesses to its missing pages are reported.
    fn map_registered(
        &self,
        spec: RegionSpec,
        fd: ForeignFd,
    ) -> Result<Arc<MappedRegion>, RequestError> {
        let region = Arc::new(self.map_region(spec, fd)?);
        if let Some(pages) = self.missing_pages() {
            pages.register(&region)?;
        }
        Ok(region)
    }

    fn await_acknowledgement(&mut self, memory: GuestMemory) -> Result<(), RequestError> {
        let memory = self.with_log(&memory)?;
        if let Postcopy::Listening { awaiting, .. } = &mut self.state.postcopy {
            *awaiting = Some(memory);
        }
        Ok(())
    }

    fn check_pagefault(&self) -> Result<(), RequestError> {
        match self.state.protocol_features & PAGEFAULT {
            0 => Err(RequestError::NotOffered),
            _ => Ok(()),
        }
    }

    fn out_of_order(&self, request: &'static str) -> super::Failure {
        let state = self.state.postcopy.describe();
        end_session(ProtocolError::PostcopyOrder { request, state })
    }
}

/// The answer about a region: its address in this process in the place of the front-end's.
fn answer(region: &MappedRegion) -> RegionSpec {
    RegionSpec {
        user_addr: region.host_base(),
        ..region.spec()
    }
}

/// The front-end waits for an answer that there is not.
fn unanswerable(request: FrontendReq, refusal: RequestError) -> super::Failure {
    end_session(ProtocolError::Unanswerable { request, refusal })
}
