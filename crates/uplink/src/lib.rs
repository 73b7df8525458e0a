//! The uplinks, to which devices transmit their frames: a multiqueue TAP, a switch between the
//! devices of this process, and null, which discards all frames.

pub mod null;
mod rtnetlink;
pub mod switch;
mod sys;
pub mod tap;
