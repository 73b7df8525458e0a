//! Where a device's frames go: a multiqueue TAP, a switch between the devices of this process, or
//! nowhere.

pub mod null;
mod rtnetlink;
pub mod switch;
mod sys;
pub mod tap;
