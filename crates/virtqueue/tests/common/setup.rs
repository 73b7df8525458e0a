//! The parameters of a virtqueue under test.

use virtionet_virtqueue::Direction;

/// How a virtqueue is made.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub size: u16,
    pub packed: bool,
    pub event_idx: bool,
    pub start: u16,
    pub direction: Direction,
}
