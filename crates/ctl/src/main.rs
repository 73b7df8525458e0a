//! virtionetctl: plans for guests, checks of configuration files, and the status of a running
//! virtionetd. It needs no privilege and links nothing of the data path.

mod args;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use virtionet_config::cli::Cli;
use virtionet_config::Config;

use crate::args::{Args, Command};

fn main() -> ExitCode {
    match Args::parse().command {
        Command::Plan(args) => plan(&args),
        Command::Check { files } => check(&files),
    }
}

fn plan(args: &virtionet_plan::PlanArgs) -> ExitCode {
    match virtionet_plan::run(args, &mut io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("virtionetctl: {error}");
            ExitCode::from(error.status())
        }
    }
}

/// Says for each file how many devices it describes, or all that is wrong with it.
fn check(files: &[PathBuf]) -> ExitCode {
    let mut status = ExitCode::SUCCESS;
    for file in files {
        let cli = Cli {
            config: Some(file.clone()),
            ..Cli::default()
        };
        // Where standard output is closed, the exit status is all that is left.
        match Config::resolve(cli) {
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
