//! A session on its socket: from the first message, or from where it was suspended, to its end.

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use super::fault_guard::FaultGuard;
use super::{Session, SuspendedSession};
use crate::backend::Backend;
use crate::error::SessionError;
use crate::session_log::SessionLog;
use crate::stop::{StopDemand, StopSignal};
use crate::sys::peer_pid;
use crate::wire::{Channel, Incoming, PendingConnections};

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionEnd {
    /// The front-end closed the connection.
    Disconnected,
    /// The stop descriptor became readable.
    Stopped,
}

/// What a session begins with.
#[derive(Debug)]
pub enum SessionStart {
    /// A front-end that has connected.
    Connected(UnixStream),
    /// A session that was suspended, here or in another process.
    Suspended(Box<SuspendedSession>),
}

/// What became of a session.
#[derive(Debug)]
pub enum Served {
    /// It ended.
    Ended(SessionEnd),
    /// It is suspended. No vring runs; the uplink's queues stay as they are.
    Suspended(Box<SuspendedSession>),
}

/// Serves one front-end until it goes away, `stop` becomes readable (it is not read), or an error
/// ends the session. In every case, a panic included, no vring runs afterwards. Meanwhile `others`
/// are refused.
///
/// # Errors
/// See [`SessionError`].
pub fn serve(
    stream: UnixStream,
    backend: &dyn Backend,
    stop: BorrowedFd<'_>,
    others: Option<&dyn PendingConnections>,
    log: &SessionLog,
) -> Result<SessionEnd, SessionError> {
    match serve_from(SessionStart::Connected(stream), backend, &stop, others, log)? {
        Served::Ended(end) => Ok(end),
        Served::Suspended(_) => Ok(SessionEnd::Stopped),
    }
}

/// Does so from `start` on. Where `stop` demands a suspension, the session is suspended instead of
/// ended. If it was stopped within a message or a reply, its connection is closed.
///
/// # Errors
/// See [`SessionError`].
pub fn serve_from(
    start: SessionStart,
    backend: &dyn Backend,
    stop: &dyn StopSignal,
    others: Option<&dyn PendingConnections>,
    log: &SessionLog,
) -> Result<Served, SessionError> {
    let (stream, session) = match start {
        SessionStart::Connected(stream) => {
            backend.on_connect(peer_pid(&stream));
            (stream, EndedOnDrop::new(Session::new(backend, log)))
        }
        SessionStart::Suspended(suspended) => suspended.resume(backend, log),
    };
    let mut channel = Channel::new(stream, stop.poll_fd(), others)?;
    // What is declared last is dropped first: the front-end must not see the end of the connection
    // while vrings run, because it may then use their chains itself.
    let mut session = session;
    let mut guard = None;
    FaultGuard::update(&mut guard, &session.session, &channel)?;
    loop {
        let end = run(&mut channel, &mut session.session, &mut guard)?;
        match (end, stop.demand()) {
            // It was suspended, and that is over already.
            (SessionEnd::Stopped, StopDemand::GoOn) => {}
            (SessionEnd::Stopped, StopDemand::Suspend) => {
                if channel.is_between_messages()
                    && let Some(stream) = channel.into_stream()
                {
                    return Ok(Served::Suspended(Box::new(session.suspend(stream))));
                }
                return Ok(Served::Ended(SessionEnd::Disconnected));
            }
            (end, _) => return Ok(Served::Ended(end)),
        }
    }
}

/// Ends a session however it ends, unless it is suspended.
pub(super) struct EndedOnDrop<'b> {
    pub(super) session: Session<'b>,
    at_drop: AtDrop,
}

enum AtDrop {
    EndSession,
    Nothing,
}

impl<'b> EndedOnDrop<'b> {
    pub(super) fn new(session: Session<'b>) -> Self {
        Self {
            session,
            at_drop: AtDrop::EndSession,
        }
    }

    fn suspend(mut self, stream: UnixStream) -> SuspendedSession {
        let suspended = self.session.suspend(stream);
        self.at_drop = AtDrop::Nothing;
        suspended
    }
}

impl Drop for EndedOnDrop<'_> {
    fn drop(&mut self) {
        if let AtDrop::EndSession = self.at_drop {
            // A worker that waits for a page of guest memory holds the lock of its vring.
            self.session.abandon_postcopy();
            self.session.stop_all();
            let refused = self.session.first_refusal.as_ref();
            self.session.backend.on_disconnect(refused);
        }
    }
}

fn run(
    channel: &mut Channel<'_>,
    session: &mut Session<'_>,
    guard: &mut Option<FaultGuard>,
) -> Result<SessionEnd, SessionError> {
    loop {
        let message = match channel.receive(session.miss_event())? {
            Incoming::Message(message) => message,
            Incoming::Event => {
                session.handle_miss_event();
                continue;
            }
            Incoming::Closed => return Ok(SessionEnd::Disconnected),
            Incoming::Stopped => return Ok(SessionEnd::Stopped),
        };
        let reply = session.handle(message)?;
        FaultGuard::update(guard, session, channel)?;
        // When a reply cannot be sent, the next receive returns the reason.
        if let Some(reply) = reply {
            channel.send(&reply)?;
        }
    }
}
