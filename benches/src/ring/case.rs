//! The cases of this group, and the result of a burst.

/// The descriptors of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainShape {
    /// One descriptor.
    Single,
    /// Two descriptors: one for the header and one for the frame.
    Direct,
    /// The same two descriptors in an indirect table.
    Indirect,
}

/// How virtio-queue dequeues chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DequeueMethod {
    /// One chain at a time, which is marked as used before the next one.
    Pop,
    /// With an iterator that reads the available index once. The chains are marked as used after
    /// it.
    Iter,
}

impl DequeueMethod {
    /// Returns the name of the peer in the results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pop => "virtio-queue pop",
            Self::Iter => "virtio-queue iter",
        }
    }
}

/// The work of a device in one burst.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BurstResult {
    /// Chains that were dequeued and marked as used.
    pub chains: u32,
    /// Bytes in all segments of the chains.
    pub bytes: usize,
    /// Whether the driver wants an interrupt.
    pub needs_call: bool,
}

/// One case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingCase {
    /// The descriptors of each chain.
    pub shape: ChainShape,
    /// Number of chains in a burst.
    pub burst: u16,
    /// Whether VIRTIO_F_EVENT_IDX is negotiated.
    pub event_idx: bool,
    /// How the peer dequeues chains.
    pub method: DequeueMethod,
}

/// The cases. The last one is the first one with the other method of the peer.
pub const CASES: [RingCase; 7] = {
    let plain = RingCase {
        shape: ChainShape::Direct,
        burst: 64,
        event_idx: false,
        method: DequeueMethod::Pop,
    };
    [
        plain,
        RingCase { burst: 32, ..plain },
        RingCase {
            event_idx: true,
            ..plain
        },
        RingCase {
            shape: ChainShape::Indirect,
            ..plain
        },
        RingCase {
            shape: ChainShape::Single,
            ..plain
        },
        RingCase {
            shape: ChainShape::Single,
            event_idx: true,
            ..plain
        },
        RingCase {
            method: DequeueMethod::Iter,
            ..plain
        },
    ]
};

impl RingCase {
    /// Returns the name in the results.
    #[must_use]
    pub fn name(&self) -> String {
        let shape = match self.shape {
            ChainShape::Single => "1 descriptor",
            ChainShape::Direct => "2 descriptors",
            ChainShape::Indirect => "2 indirect",
        };
        let event_idx = if self.event_idx { ", EVENT_IDX" } else { "" };
        format!("{shape}, bursts of {}{event_idx}", self.burst)
    }
}
