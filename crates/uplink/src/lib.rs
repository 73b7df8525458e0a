//! Where a device's frames go: a multiqueue TAP, a switch between the devices of this process, or
//! nowhere.

mod rtnetlink;
pub mod null;
pub mod switch;
mod sys;
pub mod tap;
