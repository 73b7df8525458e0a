//! Side-by-side measurements: virtionetd and its parts against a peer, both in one run.
//!
//! [`groups`] lists what can be measured. Each group ([`ring`], [`tap`], [`footprint`], [`iperf`])
//! gives an [`outcome`]: rows of ours against the peer's, taken in turns ([`sampling`]). [`meta`]
//! says on what machine and with which versions; [`table`] and [`chart`] show it to people.

pub mod chart;
pub mod footprint;
pub mod groups;
pub mod iperf;
pub mod meta;
pub mod outcome;
pub mod rig;
pub mod ring;
pub mod sampling;
pub mod table;
pub mod tap;
