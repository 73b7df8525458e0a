//! Measures virtionetd and its parts side by side with other implementations, in one run.
//!
//! [`groups`] lists the groups of cases. Each group ([`ring`], [`tap`], [`peers`], [`footprint`],
//! [`iperf`], [`guests`], [`queues`], [`turn`], [`isolation`], [`sandbox`], [`latency`], [`builds`])
//! returns an [`outcome`]:
//! rows of our figures and of those of the other implementation, the peer, measured in turns
//! ([`sampling`]). [`meta`] describes the machine and the versions. [`table`] and [`chart`] present
//! the results.
//!
//! [`instructions`] counts the instructions of the data path instead of measuring time. It compares
//! them with committed figures instead of a peer.

pub mod builds;
pub mod chart;
pub mod footprint;
pub mod groups;
pub mod guests;
pub mod harness;
pub mod instructions;
pub mod iperf;
pub mod isolation;
pub mod latency;
pub mod measure;
pub mod meta;
pub mod outcome;
pub mod peers;
pub mod queues;
pub mod ring;
pub mod sampling;
pub mod sandbox;
pub mod table;
pub mod tap;
pub mod turn;
