//! The program as a process, with front-ends of the tests instead of QEMU.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rustix::process::{Signal, kill_process};
use virtionet_control::client;
use virtionet_control::v1::DeviceReport;
use virtionet_guest::frame::{FrameSpec, Transport};
use virtionet_guest::net::MODERN;
use virtionet_guest::test_frontend::{TestFrontend, TestFrontendConfig};
use virtionet_placement::{allowed_cpus, set_thread_affinity};

const TIMEOUT: Duration = Duration::from_secs(20);

/// A directory for the sockets of one test, which is removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let name = format!("virtionetd-program-{}-{test}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// `KEY=` and the path of `name`.
    fn key(&self, key: &str, name: &str) -> String {
        format!("{key}={}", self.path(name).display())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// A running program, which is killed if the test fails.
struct Program(Option<Child>);

impl Program {
    fn start(arguments: &[String]) -> Self {
        Self::spawn(Command::new(env!("CARGO_BIN_EXE_virtionetd")).args(arguments))
    }

    fn spawn(command: &mut Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        // As under systemd, so that no state is left in a folder of the host.
        command.env("RUNTIME_DIRECTORY", env!("CARGO_TARGET_TMPDIR"));
        Self(Some(command.spawn().unwrap()))
    }

    fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(self.0.as_ref().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for the end of the process. Returns its exit status and its log.
    fn end(mut self) -> (Option<i32>, String) {
        let Output { status, stderr, .. } = self.0.take().unwrap().wait_with_output().unwrap();
        (status.code(), String::from_utf8(stderr).unwrap())
    }

    /// Ends it with SIGTERM.
    fn terminate(self) -> (Option<i32>, String) {
        self.signal(Signal::TERM);
        self.end()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn wait_until(what: &str, is_done: impl Fn() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn frontend(socket: &Path) -> TestFrontend {
    let mut config = TestFrontendConfig::new(1, 64, MODERN);
    config.connect_timeout = TIMEOUT;
    TestFrontend::connect(socket, &config).unwrap()
}

fn devices(control: &Path) -> Vec<DeviceReport> {
    client::devices(control).unwrap().devices
}

#[test]
fn two_devices_of_a_switch_reach_each_other_and_sigterm_ends_the_program() {
    let directory = Directory::new("switch");
    let control = directory.path("control");
    let device = |name: &str| {
        let socket = directory.key("socket-path", name);
        format!("--device=name={name},{socket},uplink=switch:lan")
    };
    let program = Program::start(&[
        device("a"),
        device("b"),
        directory.key("--control", "control"),
    ]);
    let [mut a, mut b] = ["a", "b"].map(|name| frontend(&directory.path(name)));
    let frame = FrameSpec::v4(Transport::Udp).build(b"hello").unwrap();
    a.pairs[0].tx.send(&frame).unwrap();
    let received = b.pairs[0].rx.wait_frames(1, TIMEOUT).unwrap();
    assert_eq!(received[0].bytes, frame.bytes);

    let reports = devices(&control);
    let names: Vec<_> = reports.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(reports[0].pairs[0].tx.counters.get("frames"), Some(1));
    assert_eq!(reports[1].pairs[0].rx.counters.get("frames"), Some(1));

    // A second front-end is refused, and SIGHUP changes nothing.
    let mut second = UnixStream::connect(directory.path("a")).unwrap();
    second.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap(), 0);
    program.signal(Signal::HUP);
    b.pairs[0].tx.send(&frame).unwrap();
    a.pairs[0].rx.wait_frames(1, TIMEOUT).unwrap();

    drop(b);
    wait_until("the device is free again", || {
        !devices(&control)[1].connected
    });
    let (status, log) = program.terminate();
    assert_eq!(status, Some(0), "{log}");
    for line in [
        "a: listening on ",
        "SIGHUP: the configuration is read again: 0 devices added",
        "was refused; a device serves one front-end at a time",
        "b: front-end gone",
        "signal 15: ending",
    ] {
        assert!(log.contains(line), "no line {line:?} in {log}");
    }
    for name in ["a", "b", "control"] {
        assert!(!directory.path(name).exists(), "{name} was not removed");
    }
}

#[test]
fn socket_in_use_is_an_error_of_one_sentence_and_the_first_program_keeps_it() {
    let directory = Directory::new("in-use");
    let arguments = [
        directory.key("--socket-path", "vnet"),
        "--uplink=null".into(),
    ];
    let first = Program::start(&arguments);
    wait_until("it listens", || directory.path("vnet").exists());
    drop(frontend(&directory.path("vnet")));
    let (status, log) = Program::start(&arguments).end();
    assert_eq!(status, Some(1));
    let text = format!(
        "socket {} is in use by another process; stop that or choose another path",
        directory.path("vnet").display()
    );
    assert!(log.contains(&text), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
    drop(frontend(&directory.path("vnet")));
    assert_eq!(first.terminate().0, Some(0));
}

#[test]
fn placement_on_a_cpu_that_does_not_exist_is_an_error_of_usage() {
    let directory = Directory::new("usage");
    let (status, log) = Program::start(&[
        directory.key("--socket-path", "vnet"),
        "--uplink=null".into(),
        "--placement=list:1000".into(),
    ])
    .end();
    assert_eq!(status, Some(2), "{log}");
    assert!(log.contains("placement list:1000 names CPU 1000"), "{log}");
    assert!(!directory.path("vnet").exists());
}

#[test]
fn control_socket_that_cannot_be_made_is_an_error() {
    let directory = Directory::new("control");
    let (status, log) = Program::start(&[
        directory.key("--socket-path", "vnet"),
        directory.key("--control", "none/control"),
        "--uplink=null".into(),
    ])
    .end();
    assert_eq!(status, Some(1), "{log}");
    assert!(log.contains("none/control"), "{log}");
    assert!(!directory.path("vnet").exists());
}

#[test]
fn client_waits_for_its_front_end_and_says_why() {
    let directory = Directory::new("client");
    let control = directory.path("control");
    let program = Program::start(&[
        directory.key("--socket-path", "vnet"),
        directory.key("--control", "control"),
        "--client".into(),
        "--uplink=null".into(),
    ]);
    wait_until("the control socket answers", || {
        client::devices(&control).is_ok_and(|report| !report.devices[0].warnings.is_empty())
    });
    let warning = devices(&control)[0].warnings[0].clone();
    assert!(
        warning.contains("the socket does not exist yet"),
        "{warning}"
    );
    let listener = UnixListener::bind(directory.path("vnet")).unwrap();
    let (socket, _) = listener.accept().unwrap();
    let config = TestFrontendConfig::new(1, 64, MODERN);
    let frontend = TestFrontend::from_socket(socket, &config).unwrap();
    let device = devices(&control).remove(0);
    assert!(device.connected);
    assert!(!device.warnings.contains(&warning), "{:?}", device.warnings);
    drop(frontend);
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn inherited_connection_is_the_only_one_and_the_program_ends_with_it() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    // The shell passes its standard input on as descriptor 3.
    let script = "exec \"$0\" --fd=3 --uplink=null 3<&0 </dev/null";
    let program = Program::spawn(
        Command::new("sh")
            .args(["-c", script, env!("CARGO_BIN_EXE_virtionetd")])
            .stdin(OwnedFd::from(theirs)),
    );
    let config = TestFrontendConfig::new(1, 64, MODERN);
    let mut frontend = TestFrontend::from_socket(ours, &config).unwrap();
    let frame = FrameSpec::v4(Transport::Udp).build(b"hello").unwrap();
    frontend.pairs[0].tx.send(&frame).unwrap();
    frontend.pairs[0].tx.drain(TIMEOUT).unwrap();
    drop(frontend);
    let (status, log) = program.end();
    assert_eq!(status, Some(0), "{log}");
    assert!(log.contains("inherited connection, "), "{log}");
}

/// A thread of this process with the name of a vCPU thread of QEMU. It ends with the sender.
fn start_vcpu(index: u16) -> mpsc::Sender<()> {
    let (end, ended) = mpsc::channel::<()>();
    let (ready, is_ready) = mpsc::channel();
    let thread = thread::Builder::new().name(format!("CPU {index}/KVM"));
    let run = move || {
        let cpu = allowed_cpus().unwrap().nth_cyclic(index.into());
        set_thread_affinity(None, &cpu).unwrap();
        ready.send(()).unwrap();
        ended.recv().unwrap_err();
    };
    thread.spawn(run).unwrap();
    is_ready.recv().unwrap();
    end
}

#[test]
fn vcpus_are_shared_among_the_queue_pairs_that_the_driver_uses() {
    let directory = Directory::new("vcpus");
    let control = directory.path("control");
    let _vcpus = [0, 1].map(start_vcpu);
    let program = Program::start(&[
        directory.key("--socket-path", "vnet"),
        directory.key("--control", "control"),
        "--uplink=null".into(),
        "--queues=2".into(),
    ]);
    let mut config = TestFrontendConfig::new(2, 64, MODERN);
    config.connect_timeout = TIMEOUT;
    let mut frontend = TestFrontend::connect(&directory.path("vnet"), &config).unwrap();
    let vcpus = || -> Vec<Vec<u32>> {
        let pairs = devices(&control).remove(0).pairs;
        pairs.into_iter().map(|pair| pair.vcpus).collect()
    };
    wait_until("each queue pair has a vCPU", || vcpus() == [[0], [1]]);
    frontend.enable(1, false).unwrap();
    wait_until("the first queue pair has both vCPUs", || {
        vcpus()[0] == [0, 1]
    });
    frontend.enable(1, true).unwrap();
    wait_until("each queue pair has a vCPU", || vcpus() == [[0], [1]]);
    drop(frontend);
    assert_eq!(program.terminate().0, Some(0));
}

/// The thread of the process with this name.
fn thread_named(process: i32, name: &str) -> Option<Pid> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    tasks.filter_map(Result::ok).find_map(|task| {
        let comm = fs::read_to_string(task.path().join("comm")).ok()?;
        let tid = task.file_name().to_str()?.parse().ok()?;
        (comm.trim_end() == name).then(|| Pid::from_raw(tid))
    })
}

/// A debugger holds one worker, as a system call that never returns would.
#[test]
fn program_ends_2_s_after_sigterm_and_names_a_thread_that_is_held() {
    let directory = Directory::new("held");
    let program = Program::start(&[
        directory.key("--socket-path", "vnet"),
        "--name=vnet".into(),
        "--uplink=null".into(),
    ]);
    let frontend = frontend(&directory.path("vnet"));
    let find_worker = || thread_named(program.pid().as_raw_nonzero().get(), "vnet-q0");
    // A thread names itself once it runs.
    wait_until("the worker has its name", || find_worker().is_some());
    let worker = find_worker().unwrap();
    match ptrace::seize(worker, ptrace::Options::empty()) {
        Err(Errno::EPERM) => return eprintln!("skipped: this machine forbids ptrace"),
        seized => seized.unwrap(),
    }
    ptrace::interrupt(worker).unwrap();
    waitpid(worker, Some(WaitPidFlag::__WALL)).unwrap();
    program.signal(Signal::TERM);
    // The worker ends with the process, and is reported to its debugger, which is this thread.
    waitpid(worker, Some(WaitPidFlag::__WALL)).unwrap();
    let (status, log) = program.end();
    assert_eq!(status, Some(1), "{log}");
    assert!(
        log.contains(
            "ended without waiting any longer for vnet, vnet-q0; something outside holds them up"
        ),
        "{log}"
    );
    drop(frontend);
}
