//! The command line of virtionetctl.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use virtionet_plan::PlanArgs;

const EXIT_STATUS: &str = "\
Exit status:
  0  the command succeeded
  1  something failed, such as a virtionetd that does not answer
  2  the command line, the request for a plan or a configuration file cannot be used";

/// Plan guests, check configuration files, and show the status of a running virtionetd or upgrade it.
#[derive(Debug, Parser)]
#[command(
    name = "virtionetctl",
    version,
    disable_help_subcommand = true,
    max_term_width = 100,
    after_help = EXIT_STATUS
)]
pub struct Args {
    /// The command that is executed.
    #[command(subcommand)]
    pub command: Command,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print how many queue pairs each network device of a guest should have, and why, with the
    /// command lines of QEMU, libvirt and virtionetd for it
    Plan(Box<PlanArgs>),

    /// Report all problems of configuration files, each one with its line. No other file is opened
    Check {
        /// The configuration files
        #[arg(value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },

    /// Print the devices of a running virtionetd: the queue pairs with vCPU, worker, CPU and rates
    /// over one second, the drops with their reasons, warnings and recommendations
    Status {
        /// The path of virtionetd's control socket [default: the value of the environment variable
        /// VIRTIONETD_CONTROL, or /run/virtionetd.ctl]
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,

        /// Print the daemon's report as JSON, as GET /v1/devices answers it
        #[arg(long)]
        json: bool,
    },

    /// Start a new virtionetd that takes all devices over from the running one, without a disconnect.
    /// If that fails, the running one goes on
    Upgrade {
        /// The path of virtionetd's control socket [default: the value of the environment variable
        /// VIRTIONETD_CONTROL, or /run/virtionetd.ctl]
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,

        /// The new virtionetd [default: the one in the folder of virtionetctl]
        #[arg(long, value_name = "PATH")]
        binary: Option<PathBuf>,

        /// The arguments of the new virtionetd; --take-over is added [default: those of the running
        /// one]
        #[arg(last = true, value_name = "ARGUMENT")]
        arguments: Vec<OsString>,
    },
}
