//! The parts of the virtionetd program.
//!
//! Reading order, from the wire to the frame: [`serve`] (processes and threads), [`card`] (one
//! device), [`pair`] and [`worker`] (a queue pair and its thread), [`slot`] (a running ring).

pub mod advice;
pub mod card;
pub mod cli;
pub mod config;
pub mod control;
pub mod follow;
pub mod host;
pub mod interrupts;
pub mod inventory;
pub mod logging;
pub mod metrics;
pub mod pair;
pub mod placer;
pub mod plan;
pub mod poll;
pub mod report;
pub mod serve;
pub mod slot;
pub mod sys;
pub mod told;
pub mod worker;
