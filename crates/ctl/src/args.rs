//! The command line of virtionetctl.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use virtionet_plan::PlanArgs;

/// Plans for guests, checks of configuration files, and the status of a running virtionetd.
#[derive(Debug, Parser)]
#[command(name = "virtionetctl", version, disable_help_subcommand = true, max_term_width = 100)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print how many queue pairs each network device of a guest should have, and why, with the
    /// command lines of QEMU, libvirt and virtionetd for it
    Plan(Box<PlanArgs>),

    /// Report what is wrong with configuration files, each problem with its line; nothing that they
    /// name is opened
    Check {
        /// The files
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
}
