//! virtionetctl: plans for guests, checks of configuration files, and the status of a running
//! virtionetd. It needs no privilege and links nothing of the data path.

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

/// Prints for each file how many devices it describes, or everything that is wrong with it.
fn check(files: &[PathBuf]) -> ExitCode {
    let mut status = ExitCode::SUCCESS;
    for file in files {
        // An error of writing is ignored: the exit status is the result all the same.
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
    // Where standard error is closed, the exit status still reports the failure.
    let _ = writeln!(io::stderr(), "virtionetctl: {error}");
}
