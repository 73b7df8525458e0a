//! Side-by-side measurements: virtionetd and its parts against a peer, both in one run.
//!
//! [`groups`] lists what can be measured. Each group ([`ring`], [`tap`], [`peers`], [`footprint`],
//! [`iperf`], [`guests`], [`queues`]) gives an [`outcome`]: rows of ours against the peer's, taken in turns
//! ([`sampling`]). [`meta`] says on what machine and with which versions; [`table`] and [`chart`]
//! show it to people.
//! [`instructions`] counts what the data path takes, instead of timing it, and has no peer but the
//! figures that are committed.

pub mod chart;
pub mod footprint;
pub mod groups;
pub mod guests;
pub mod harness;
pub mod instructions;
pub mod iperf;
pub mod measure;
pub mod meta;
pub mod outcome;
pub mod peers;
pub mod queues;
pub mod ring;
pub mod sampling;
pub mod table;
pub mod tap;
