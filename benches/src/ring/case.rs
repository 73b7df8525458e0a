//! The cases of this group, and what a device reports of a burst.

/// How a chain is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// One descriptor.
    Single,
    /// Two: the header's and the frame's.
    Direct,
    /// The same two in an indirect table.
    Indirect,
}

/// How chains are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DequeueMethod {
    /// One at a time, given back before the next.
    Pop,
    /// By an iterator that reads the available index once, all given back after it.
    Iter,
}

impl DequeueMethod {
    /// The peer's name in the results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pop => "virtio-queue pop",
            Self::Iter => "virtio-queue iter",
        }
    }
}

/// What a device did with one burst.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BurstResult {
    /// Chains taken and given back.
    pub chains: u32,
    /// Bytes in all their pieces.
    pub bytes: usize,
    /// The driver wants an interrupt.
    pub call: bool,
}

/// What a case is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingCase {
    /// How a chain is made.
    pub shape: Shape,
    /// Chains a burst.
    pub burst: u16,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// How the peer takes chains.
    pub method: DequeueMethod,
}

/// The cases: the plain one first, and last once more against another way of the peer's.
pub const CASES: [RingCase; 7] = {
    let plain = RingCase {
        shape: Shape::Direct,
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
            shape: Shape::Indirect,
            ..plain
        },
        RingCase {
            shape: Shape::Single,
            ..plain
        },
        RingCase {
            shape: Shape::Single,
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
    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        let shape = match self.shape {
            Shape::Single => "1 descriptor",
            Shape::Direct => "2 descriptors",
            Shape::Indirect => "2 indirect",
        };
        let event_idx = if self.event_idx { ", EVENT_IDX" } else { "" };
        format!("{shape}, bursts of {}{event_idx}", self.burst)
    }
}
