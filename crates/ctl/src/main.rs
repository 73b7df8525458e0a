//! virtionetctl: plans for guests, checks of configuration files, and the status, the changes and the
//! upgrade of a running virtionetd. It does not link the data path. Only an upgrade needs the privileges of the
//! daemon, which it starts.

mod args;
mod control_socket;
mod devices;
mod status;
mod upgrade;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use virtionet_config::Config;

use crate::args::{Args, Command, SwitchCommand};
use crate::upgrade::Upgrade;

fn main() -> ExitCode {
    match Args::parse().command {
        Command::Plan(args) => plan(&args),
        Command::Check { files } => check(&files),
        Command::Status { control, json } => exit(status::print(control, json)),
        Command::List { control } => exit(devices::list(control)),
        Command::Show { name, control } => exit(devices::show(&name, control)),
        Command::Add {
            name,
            values,
            control,
        } => exit(devices::add(&name, &values, control)),
        Command::Remove { name, control } => exit(devices::remove(&name, control)),
        Command::Set {
            name,
            values,
            control,
        } => exit(devices::set(&name, &values, control)),
        Command::Reload { dry_run, control } => exit(devices::reload(dry_run, control)),
        Command::Switch(SwitchCommand::Show { name, control }) => {
            exit(devices::show_switches(name.as_deref(), control))
        }
        Command::Switch(SwitchCommand::Addresses { name, control }) => {
            exit(devices::show_addresses(&name, control))
        }
        Command::Health { control } => exit(devices::health(control)),
        Command::Version { control } => exit(devices::version(control)),
        Command::Upgrade {
            control,
            binary,
            arguments,
        } => exit(upgrade::run(Upgrade {
            control,
            program: binary,
            arguments,
        })),
    }
}

fn exit(result: Result<(), impl std::error::Error>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn plan(args: &virtionet_plan::PlanArgs) -> ExitCode {
    match virtionet_plan::run(args, &mut io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(error.status())
        }
    }
}

/// Prints for each file the number of devices that it describes, or all its problems.
fn check(files: &[PathBuf]) -> ExitCode {
    let mut status = ExitCode::SUCCESS;
    for file in files {
        // An error of writing is ignored, because the exit status reports the result too.
        match Config::from_file(file) {
            Ok(config) => {
                let (count, file) = (config.devices.len(), file.display());
                let plural = if count == 1 { "" } else { "s" };
                let _ = writeln!(io::stdout(), "{file}: {count} device{plural}, ok");
            }
            Err(error) => {
                let _ = writeln!(io::stderr(), "{error}");
                status = ExitCode::from(2);
            }
        }
    }
    status
}

fn report(error: &dyn std::error::Error) {
    // An error of writing is ignored, because the exit status reports the failure too.
    let _ = writeln!(io::stderr(), "virtionetctl: {error}");
}
