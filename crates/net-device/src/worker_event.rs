//! The events that a worker waits for, and the numbers that epoll carries for them.

/// An event that wakes a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerEvent {
    /// Something changed: a vring, the placement, or whether the worker must end.
    Wake,
    /// Something happened to one of the worker's queue pairs.
    Pair {
        /// The queue pair's position among those of the worker.
        position: u16,
        /// What happened.
        event: PairEvent,
    },
}

/// An event of a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairEvent {
    /// The driver made chains available for TX.
    TxKick,
    /// The driver made buffers available for RX.
    RxKick,
    /// A frame waits in the uplink.
    UplinkReadable,
}

/// The number of tokens of each queue pair. One of them is not used.
const TOKENS_PER_PAIR: u64 = 4;
const WAKE_TOKEN: u64 = 0;

impl WorkerEvent {
    /// The number that epoll carries for the event.
    #[must_use]
    pub fn to_token(self) -> u64 {
        match self {
            Self::Wake => WAKE_TOKEN,
            Self::Pair { position, event } => {
                u64::from(position) * TOKENS_PER_PAIR + event.to_number()
            }
        }
    }

    /// The event of `token`, if there is one.
    #[must_use]
    pub fn from_token(token: u64) -> Option<Self> {
        if token == WAKE_TOKEN {
            return Some(Self::Wake);
        }
        Some(Self::Pair {
            position: u16::try_from(token / TOKENS_PER_PAIR).ok()?,
            event: PairEvent::from_number(token % TOKENS_PER_PAIR)?,
        })
    }
}

impl PairEvent {
    /// Numbers begin at 1, so that no token of the first queue pair is that of a wake-up.
    fn to_number(self) -> u64 {
        match self {
            Self::TxKick => 1,
            Self::RxKick => 2,
            Self::UplinkReadable => 3,
        }
    }

    fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::TxKick),
            2 => Some(Self::RxKick),
            3 => Some(Self::UplinkReadable),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_event_has_a_token_of_its_own_and_is_found_by_it() {
        let mut events = vec![WorkerEvent::Wake];
        for position in [0, 1, 2, u16::MAX] {
            for event in [
                PairEvent::TxKick,
                PairEvent::RxKick,
                PairEvent::UplinkReadable,
            ] {
                events.push(WorkerEvent::Pair { position, event });
            }
        }
        let tokens: BTreeSet<u64> = events.iter().map(|event| event.to_token()).collect();
        assert_eq!(tokens.len(), events.len());
        for event in events {
            assert_eq!(WorkerEvent::from_token(event.to_token()), Some(event));
        }
        assert_eq!(WorkerEvent::from_token(4), None);
        assert_eq!(WorkerEvent::from_token(u64::MAX), None);
    }
}
