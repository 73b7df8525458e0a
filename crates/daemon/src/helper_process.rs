//! Starting the helper, noticing that it has ended, and the program that it runs.
//!
//! The helper is this program once more, started with [`ARGUMENT`] before the daemon gives its
//! rights up. It has address space, log thread and sandbox of its own. [`virtionet_helper`] says
//! what it does.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::thread::{capabilities, set_name};
use virtionet_base::rights;
use virtionet_config::uplink::{TapConfig, UplinkConfig};
use virtionet_config::{Config, DeviceConfig, HelperConfig, SandboxMode, Socket};
use virtionet_helper::{Client, Rule, take_rules};
use virtionet_net_device::sys;
use virtionet_placement::interrupts::{IRQBALANCE_SOCKETS, IrqAffinity};
use virtionet_process::{logging, sandbox};
use virtionet_sandbox::ThreadKind;

/// The first argument of the helper, which is followed by the name of the sandbox mode and the
/// number of `-v` flags.
pub const ARGUMENT: &str = "helper";

/// The name by which ps shows it.
const PROCESS_NAME: &str = "virtionetd: helper";

/// How long it may take to end.
const END_TIMEOUT: Duration = Duration::from_millis(500);
/// Pause between two checks of whether it has ended.
const END_INTERVAL: Duration = Duration::from_millis(1);

/// The helper of this process.
#[derive(Debug)]
pub struct HelperProcess {
    child: Mutex<Child>,
    client: Client,
}

impl HelperProcess {
    /// Starts the helper that `config` needs, and leaves it what this process lacks the right for;
    /// `None` if it needs none: the process keeps what it has, or has nothing to keep.
    ///
    /// # Errors
    /// When it cannot be started.
    // syscalls: socketpair clone execve sendmsg setsockopt
    pub fn start(config: &Config) -> io::Result<Option<Self>> {
        let gives_up = config.sandbox == SandboxMode::On || config.identity.user.is_some();
        let Some(allowed) = config.helper.as_ref().filter(|_| gives_up && has_rights()) else {
            return Ok(None);
        };
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let child = Command::new("/proc/self/exe")
            .arg0(PROCESS_NAME)
            .args([
                ARGUMENT,
                config.sandbox.name(),
                &config.verbosity.to_string(),
            ])
            .stdin(theirs)
            .stdout(Stdio::null())
            .spawn()?;
        let client = Client::new(ours, rules(config, allowed)?)?;
        rights::delegate_to(Box::new(client.clone()));
        Ok(Some(Self {
            child: Mutex::new(child),
            client,
        }))
    }

    /// The number of the process; `None` when it is gone.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.client.is_open().then(|| self.child.lock().id())
    }

    /// Looks whether the helper has ended, and reports it once. To be called after SIGCHLD.
    // syscalls: wait4
    pub fn check(&self) {
        let ended = self.child.lock().try_wait();
        if let Ok(Some(status)) = ended
            && self.client.close()
        {
            report_end(status);
        }
    }

    /// Lets the helper end and waits for that, but not long. A process that outlived this one would
    /// hold up a service manager, which waits until the service has none.
    // syscalls: wait4 clock_nanosleep
    pub fn end(&self) {
        self.client.close();
        let deadline = Instant::now() + END_TIMEOUT;
        loop {
            let ended = self.child.lock().try_wait();
            if !matches!(ended, Ok(None)) || Instant::now() >= deadline {
                return;
            }
            thread::sleep(END_INTERVAL);
        }
    }
}

fn report_end(status: ExitStatus) {
    tracing::error!(
        "the helper ended ({status}): TAPs that are deleted, queues that are added, MTUs and CPU masks may need it; restart virtionetd when that suits its guests"
    );
}

/// Whether this thread has a capability that the helper would keep.
fn has_rights() -> bool {
    let kept = ThreadKind::Helper.capabilities();
    capabilities(None).is_ok_and(|now| now.permitted.intersects(kept))
}

fn writes_affinity(config: &Config) -> bool {
    config
        .devices
        .iter()
        .any(|device| device.irq_affinity == IrqAffinity::Apply)
}

/// What `config` names, and what it allows beside that.
fn rules(config: &Config, allowed: &HelperConfig) -> io::Result<Vec<Rule>> {
    let mut rules: Vec<Rule> = config.devices.iter().flat_map(device_rules).collect();
    rules.extend(config.own_sockets().map(Rule::own_socket_at));
    if writes_affinity(config) {
        rules.push(Rule::Affinity);
        let sockets = IRQBALANCE_SOCKETS.parse().map_err(io::Error::other)?;
        rules.push(Rule::Sockets(sockets));
    }
    if let Some(added) = &config.allow_add {
        rules.extend(added.taps.iter().cloned().map(Rule::Taps));
        rules.extend(added.bridges.iter().cloned().map(Rule::Bridges));
        let sockets = || added.sockets.iter().cloned();
        rules.extend(
            sockets()
                .map(Rule::Sockets)
                .chain(sockets().map(Rule::OwnSockets)),
        );
    }
    rules.extend(allowed.taps.iter().cloned().map(Rule::Taps));
    rules.extend(allowed.bridges.iter().cloned().map(Rule::Bridges));
    rules.extend(allowed.sockets.iter().cloned().map(Rule::Sockets));
    Ok(rules)
}

fn device_rules(device: &DeviceConfig) -> Vec<Rule> {
    let mut rules = Vec::new();
    let tap = match &device.uplink {
        UplinkConfig::Tap(tap) => Some(tap),
        UplinkConfig::Switch(switch) => switch.tap.as_ref(),
        UplinkConfig::Null => None,
    };
    if let Some(TapConfig { name, bridge }) = tap {
        rules.push(Rule::Tap(name.clone()));
        rules.extend(bridge.clone().map(Rule::Bridge));
    }
    let socket = match &device.socket {
        Socket::Connect { path } => Some(path),
        Socket::Listen { .. } | Socket::Inherited(_) => None,
    };
    let sockets = socket.into_iter().chain(&device.qmp);
    rules.extend(sockets.map(|path| Rule::socket_at(path)));
    rules
}

/// The program of the helper, whose arguments follow [`ARGUMENT`]. It ends with the daemon.
pub fn run(arguments: &[String]) -> ExitCode {
    let [mode, verbosity] = arguments else {
        return refuse();
    };
    let Some(mode) = SandboxMode::find(mode) else {
        return refuse();
    };
    match serve(mode, verbosity.parse().unwrap_or(0)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::print_error(&format!("helper: {error}; restart virtionetd"));
            ExitCode::FAILURE
        }
    }
}

fn refuse() -> ExitCode {
    logging::print_error("the helper is started by virtionetd itself, and not by hand");
    ExitCode::from(2)
}

fn serve(mode: SandboxMode, verbosity: u8) -> io::Result<()> {
    // Its file is called exe.
    let _ = set_name(c"virtionetd-help");
    // An inherited socket of a front-end must not stay open here.
    sys::close_all_above(io::stderr().as_fd());
    let socket: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    // The rules say which files it needs.
    let Some(server) = take_rules(socket)? else {
        return Ok(());
    };
    let affinity = server.writes_affinity();
    sandbox::prepare_helper(
        mode,
        server.own_sockets(),
        server.socket_folders(),
        affinity,
    )
    .map_err(io::Error::other)?;
    logging::init(verbosity, sandbox::confine_log).map_err(io::Error::other)?;
    sandbox::confine_process().map_err(io::Error::other)?;
    sandbox::confine_thread(ThreadKind::Helper);
    server.serve()
}
