//! virtionetctl: plans for guests, checks of configuration files, and the status of a running
//! virtionetd. It needs no privileges, and does not link the data path.

mod args;
mod status;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use virtionet_config::Config;

use crate::args::{Args, Command};

fn main() -> ExitCode {
    match Args::parse().command {
        Command::Plan(args) => plan(&args),
        Command::Check { files } => check(&files),
        Command::Status { control, json } => match status::print(control, json) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                report(&error);
                ExitCode::FAILURE
            }
        },
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
