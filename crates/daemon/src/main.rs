//! virtionetd: a guest's network device in a process of its own.

use std::process::ExitCode;

use virtionet_config::cli;
use virtionet_config::{Command, Config};
use virtionet_net_device::sys;
use virtionet_process::{logging, panic_policy, sandbox, scheduling};
use virtionetd::{PassedDescriptors, RunError, default_state_folder, helper_process, supervisor};

fn main() -> ExitCode {
    sys::limit_malloc_arenas();
    // Also for the helper, and for the start of a daemon that takes over.
    let slice = scheduling::request_short_slice();
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    if let [first, rest @ ..] = arguments.as_slice()
        && first == helper_process::ARGUMENT
    {
        return helper_process::run(rest);
    }
    let config = match cli::parse(std::env::args_os()) {
        Ok(Command::PrintCapabilities) => return exit(cli::print_capabilities()),
        Ok(Command::Serve(config)) => Config {
            state_folder: config.state_folder.clone().or_else(default_state_folder),
            ..*config
        },
        Err(refusal) => return ExitCode::from(refusal.report()),
    };
    let passed = PassedDescriptors::take(&config);
    if let Err(error) = sandbox::prepare(&config) {
        return exit(Err(error));
    }
    if let Err(error) = supervisor::reserve_signals() {
        return exit(Err(error));
    }
    if let Err(error) = logging::init(config.verbosity, sandbox::confine_log) {
        return exit(Err(error));
    }
    slice.log();
    panic_policy::install();
    let ended = supervisor::run(config, passed);
    let status = match &ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(RunError::Usage { .. }) => ExitCode::from(2),
        Err(_) => ExitCode::FAILURE,
    };
    match ended {
        Ok(()) => logging::flush(),
        Err(error) => logging::print_error(&error.to_string()),
    }
    status
}

fn exit(result: Result<(), impl std::fmt::Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::print_error(&error.to_string());
            ExitCode::FAILURE
        }
    }
}
