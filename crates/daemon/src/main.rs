//! virtionetd: a guest's network device in a process of its own.

use std::process::ExitCode;

use virtionet_config::Command;
use virtionet_config::cli;
use virtionetd::{RunError, logging, supervisor, sys};

fn main() -> ExitCode {
    sys::limit_malloc_arenas();
    let config = match cli::parse(std::env::args_os()) {
        Ok(Command::PrintCapabilities) => return exit(cli::print_capabilities()),
        Ok(Command::Serve(config)) => config,
        Err(refusal) => return ExitCode::from(refusal.report()),
    };
    if let Err(error) = logging::init(config.verbosity) {
        return exit(Err(error));
    }
    match supervisor::run(config) {
        Err(error @ RunError::Usage { .. }) => {
            eprintln!("virtionetd: {error}");
            ExitCode::from(2)
        }
        ended => exit(ended),
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
