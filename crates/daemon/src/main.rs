//! virtionetd: a guest's network card in a process of its own.

use std::process::ExitCode;

use virtionetd::cli;
use virtionetd::config::Command;
use virtionetd::logging;
use virtionetd::plan::{self, PlanArgs};
use virtionetd::serve::{self, RunError};
use virtionetd::sys;

fn main() -> ExitCode {
    sys::use_one_arena();
    let config = match cli::parse(std::env::args_os()) {
        Ok(Command::PrintCapabilities) => return exit(cli::print_capabilities()),
        Ok(Command::Check(file)) => return ExitCode::from(cli::check(&file)),
        Ok(Command::Plan(args)) => return plan(&args),
        Ok(Command::Serve(config)) => config,
        Err(refusal) => return ExitCode::from(refusal.report()),
    };
    if let Err(error) = logging::init(config.verbosity) {
        return exit(Err(error));
    }
    match serve::run(config) {
        Err(error @ RunError::Usage(..)) => {
            eprintln!("virtionetd: {error}");
            ExitCode::from(2)
        }
        ended => exit(ended),
    }
}

fn plan(args: &PlanArgs) -> ExitCode {
    match plan::run(args, &mut std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("virtionetd: {error}");
            ExitCode::from(error.status())
        }
    }
}

fn exit(result: Result<(), impl std::fmt::Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("virtionetd: {error}");
            ExitCode::FAILURE
        }
    }
}
