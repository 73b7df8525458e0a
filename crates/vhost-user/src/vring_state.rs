//! The states of a vring.
//!
//! ```text
//!              Start                    Fault
//!   Stopped ───────────▶ Running ─────────────────▶ Quarantined
//!      ▲  ▲                 │                            │
//!      │  └─────────────────┘                            │
//!      │        Stop, Unmap                              │
//!      └─────────────────────────────────────────────────┘
//!                           Stop, Unmap
//! ```
//!
//! Both the device and the session use this table. The device holds the state together with the
//! virtqueue, under one lock. The session derives the state from what the device returns: a vring
//! runs from the success of [`crate::Backend::start_vring`] until [`crate::Backend::stop_vring`] or
//! [`crate::Backend::set_memory`] returns where it stopped. [`VringEvent::Fault`] is not reported
//! to the session, because a quarantined vring needs the same requests as a running one.

/// The state of a vring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum VringState {
    /// It was not started, or it was stopped. The device does not access its memory.
    #[default]
    Stopped,
    /// The device serves it.
    Running,
    /// The guest broke its indices. The device does not serve it until it is configured again.
    Quarantined,
}

/// An event that changes the state of a vring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VringEvent {
    /// The session started it.
    Start,
    /// The session stopped it.
    Stop,
    /// The new memory table does not contain its areas.
    Unmap,
    /// The guest broke its indices.
    Fault,
}

/// The error of an event that is not possible in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} is not possible while the vring is {state:?}; please report this as a bug")]
pub struct InvalidTransition {
    /// The state, which does not change.
    pub state: VringState,
    /// The event.
    pub event: VringEvent,
}

impl VringState {
    /// All states.
    pub const ALL: [Self; 3] = [Self::Stopped, Self::Running, Self::Quarantined];

    /// The state that follows `event`.
    ///
    /// # Errors
    /// When the event is not possible in this state.
    pub fn after(self, event: VringEvent) -> Result<Self, InvalidTransition> {
        use VringEvent::{Fault, Start, Stop, Unmap};
        match (self, event) {
            (Self::Stopped, Start) => Ok(Self::Running),
            (Self::Running | Self::Quarantined, Stop | Unmap) => Ok(Self::Stopped),
            (Self::Running, Fault) => Ok(Self::Quarantined),
            (Self::Stopped, Stop | Unmap | Fault)
            | (Self::Running, Start)
            | (Self::Quarantined, Start | Fault) => Err(InvalidTransition { state: self, event }),
        }
    }

    /// Whether the vring was started and has not been stopped since, so that the device holds its
    /// virtqueue.
    #[must_use]
    pub fn is_started(self) -> bool {
        match self {
            Self::Stopped => false,
            Self::Running | Self::Quarantined => true,
        }
    }

    /// The state as a number, for an atomic that other threads read.
    #[must_use]
    pub fn to_number(self) -> u8 {
        match self {
            Self::Stopped => 0,
            Self::Running => 1,
            Self::Quarantined => 2,
        }
    }

    /// The state of which [`VringState::to_number`] returns `number`; `Stopped` for other numbers.
    #[must_use]
    pub fn from_number(number: u8) -> Self {
        let state = Self::ALL.get(usize::from(number));
        state.copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::VringEvent::{Fault, Start, Stop, Unmap};
    use super::VringState::{Quarantined, Running, Stopped};
    use super::*;

    #[test]
    fn event_in_each_state_leads_to_the_state_of_the_table() {
        let table = [
            (Stopped, Start, Some(Running)),
            (Stopped, Stop, None),
            (Stopped, Unmap, None),
            (Stopped, Fault, None),
            (Running, Start, None),
            (Running, Stop, Some(Stopped)),
            (Running, Unmap, Some(Stopped)),
            (Running, Fault, Some(Quarantined)),
            (Quarantined, Start, None),
            (Quarantined, Stop, Some(Stopped)),
            (Quarantined, Unmap, Some(Stopped)),
            (Quarantined, Fault, None),
        ];
        assert_eq!(table.len(), VringState::ALL.len() * 4);
        for (state, event, next) in table {
            let expected = next.ok_or(InvalidTransition { state, event });
            assert_eq!(state.after(event), expected, "{state:?} {event:?}");
        }
    }

    #[test]
    fn state_converted_to_a_number_and_back_is_unchanged() {
        for state in VringState::ALL {
            assert_eq!(VringState::from_number(state.to_number()), state);
        }
    }
}
