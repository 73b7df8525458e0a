//! The command line of virtionetctl.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args as ArgumentGroup, Parser, Subcommand};
use virtionet_plan::PlanArgs;

const EXIT_STATUS: &str = "\
Exit status:
  0  the command succeeded
  1  something failed, such as a virtionetd that does not answer
  2  the command line, the request for a plan or a configuration file cannot be used";

/// Plan guests, check configuration files, and show, change or upgrade a running virtionetd.
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

/// How a running virtionetd is asked, and how its answer is printed.
#[derive(Debug, ArgumentGroup)]
pub struct ControlArgs {
    /// The path of virtionetd's control socket [default: the value of the environment variable
    /// VIRTIONETD_CONTROL, or /run/virtionetd.ctl]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Print the daemon's answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// What is shown of switches.
#[derive(Debug, Subcommand)]
pub enum SwitchCommand {
    /// Print the switches, with their ports and the number of addresses that they know
    Show {
        /// The only switch that is shown
        #[arg(value_name = "NAME")]
        name: Option<String>,

        #[command(flatten)]
        #[allow(missing_docs)]
        control: ControlArgs,
    },

    /// Print the addresses that a switch has learned, and the devices behind them
    Addresses {
        /// The switch
        #[arg(value_name = "NAME")]
        name: String,

        #[command(flatten)]
        #[allow(missing_docs)]
        control: ControlArgs,
    },
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

    /// Print one line for each device of a running virtionetd
    List {
        #[command(flatten)]
        #[allow(missing_docs)]
        control: ControlArgs,
    },

    /// Print one device of a running virtionetd
    Show {
        /// The device
        #[arg(value_name = "NAME")]
        name: String,

        #[command(flatten)]
        #[allow(missing_docs)]
        control: ControlArgs,
    },

    /// Add a device to a running virtionetd, which must have been started with --allow-add. A device
    /// that is there already, with the same values, stays as it is
    Add {
        /// The device's name
        #[arg(value_name = "NAME")]
        name: String,

        /// The keys of a `[[device]]` of the configuration file, such as socket-path=/run/v/a.sock
        /// tap=vnet1 queues=4. Keys that are missing have their defaults
        #[arg(value_name = "KEY=VALUE", required = true)]
        values: Vec<String>,

        #[command(flatten)]
        #[allow(missing_docs)]
        control: ControlArgs,
    },

    /// Remove a device from a running virtionetd. What its guest has sent is sent, and the connection
    /// with the front-end is closed
    Remove {
        /// The device
        #[arg(value_name = "NAME")]
        name: String,

        #[command(flatten)]
        #[allow(missing_docs)]
        control: ControlArgs,
    },

    /// Change a device while it works: link=down closes the connection with the front-end until link=up
    Set {
        /// The device
        #[arg(value_name = "NAME")]
        name: String,

        /// What is changed
        #[arg(value_name = "KEY=VALUE", required = true)]
        values: Vec<String>,

        #[command(flatten)]
        #[allow(missing_docs)]
        control: ControlArgs,
    },

    /// Let a running virtionetd read its configuration file again, and add, remove and change devices
    /// accordingly
    Reload {
        /// Only print what would change
        #[arg(long)]
        dry_run: bool,

        #[command(flatten)]
        #[allow(missing_docs)]
        control: ControlArgs,
    },

    /// Print what the switches of a running virtionetd know
    #[command(subcommand)]
    Switch(SwitchCommand),

    /// Print whether a running virtionetd serves its devices. The exit status is 1 if it does not
    Health {
        #[command(flatten)]
        #[allow(missing_docs)]
        control: ControlArgs,
    },

    /// Print the version of a running virtionetd
    Version {
        #[command(flatten)]
        #[allow(missing_docs)]
        control: ControlArgs,
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
