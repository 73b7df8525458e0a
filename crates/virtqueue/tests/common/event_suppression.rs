//! The model of event suppression: when the driver or the device must be notified.

use super::setup::Setup;

/// The notifications that one side has asked for, in terms of the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EventSuppression {
    /// A notification for every publication.
    Always,
    /// No notification.
    Never,
    /// A notification for the next publication, because nothing was pending when it was asked for.
    Next,
    /// A notification at a position that was passed `ago` descriptors (packed) or chains (split)
    /// ago.
    Passed { ago: u64 },
    /// The position is not known to the model.
    Unknown,
}

impl EventSuppression {
    /// The state that the memory of a new virtqueue expresses.
    pub fn new(setup: Setup) -> Self {
        match setup.event_idx && !setup.packed {
            true => Self::Unknown,
            false => Self::Always,
        }
    }

    /// One side asked for notifications when `more` descriptors or chains were pending already.
    pub fn enable(&mut self, setup: Setup, more: u64) {
        *self = match (setup.event_idx, more) {
            (false, _) => Self::Always,
            (true, 0) => Self::Next,
            (true, ago) => Self::Passed { ago },
        };
    }

    pub fn disable(&mut self, setup: Setup) {
        if setup.packed || !setup.event_idx {
            *self = Self::Never;
        }
    }

    /// Checks the decision on a notification for `count` published descriptors or chains.
    pub fn record(&mut self, setup: Setup, count: u64, signalled: bool) {
        // A passed position is passed again after two laps, or when the 16-bit index wraps.
        let period = match setup.packed {
            true => 2 * u64::from(setup.size),
            false => 65_536,
        };
        match self {
            _ if count == 0 => assert!(!signalled, "a notification without a publication"),
            Self::Always => assert!(signalled, "no notification although all are wanted"),
            Self::Never => assert!(!signalled, "a notification that is not wanted"),
            Self::Next => {
                assert!(signalled, "the waiting driver or device is not notified");
                *self = Self::Passed { ago: count };
            }
            Self::Passed { ago } => {
                *ago += count;
                let due = *ago > period;
                *ago = (*ago - 1) % period + 1;
                assert_eq!(signalled, due, "{count} more");
            }
            Self::Unknown => {}
        }
    }
}
