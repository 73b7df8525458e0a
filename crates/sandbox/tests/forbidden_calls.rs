//! What a confined thread tries and does not get, for every kind of thread. Each try is a process
//! of its own, which runs one of the ignored tests here.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::env;
use std::fs::File;
use std::io::{Error, ErrorKind};
use std::os::unix::process::ExitStatusExt;
use std::panic::catch_unwind;
use std::process::{Command, Output};
use std::ptr;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, setrlimit};
use virtionet_sandbox::{Enforcement, FileRules, LandlockState, Sandbox, ThreadKind};

const KIND: &str = "SANDBOX_TEST_KIND";
const CALL: &str = "SANDBOX_TEST_CALL";

/// Runs the ignored test `name` in a process of its own.
fn run(name: &str, kind: ThreadKind, call: &str) -> Output {
    Command::new(env::current_exe().unwrap())
        .args([
            "--exact",
            name,
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(KIND, kind.to_string())
        .env(CALL, call)
        .output()
        .unwrap()
}

fn run_to_success(name: &str, kind: ThreadKind) {
    let output = run(name, kind, "");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{kind}: {text}{errors}");
    assert!(text.contains("1 passed"), "{kind}: {text}");
}

fn kind_of_the_child() -> ThreadKind {
    let name = env::var(KIND).unwrap();
    let kind = ThreadKind::ALL
        .into_iter()
        .find(|kind| kind.to_string() == name);
    kind.unwrap()
}

/// In the child: confines the calling thread as `KIND` says.
fn confine(enforcement: Enforcement) -> (ThreadKind, LandlockState) {
    let kind = kind_of_the_child();
    let sandbox = Sandbox::new(enforcement, FileRules::default()).unwrap();
    sandbox.confine_process().unwrap();
    // It starts in a thread that is confined already.
    if let Some(starter) = starter(kind) {
        sandbox.confine_thread(starter).unwrap();
    }
    (kind, sandbox.confine_thread(kind).unwrap())
}

/// The kind of thread that starts those of `kind` after it is confined.
fn starter(kind: ThreadKind) -> Option<ThreadKind> {
    ThreadKind::ALL
        .into_iter()
        .find(|starter| starter.starts().contains(&kind))
}

fn error_of(result: libc::c_long) -> Option<i32> {
    (result < 0).then(|| Error::last_os_error().raw_os_error().unwrap())
}

#[test]
fn what_a_thread_does_not_need_is_refused_in_every_kind_of_thread() {
    for kind in ThreadKind::ALL {
        run_to_success("child_is_refused", kind);
    }
}

#[test]
#[ignore = "runs in a child of another test"]
fn child_is_refused() {
    let has_landlock = cfg!(target_os = "linux") && landlock_works();
    let (kind, _) = confine(Enforcement::Deny);
    let opens_files = kind.calls().iter().any(|call| call.name == "openat");
    if has_landlock || !opens_files {
        for path in ["/etc/passwd", "/", "/dev/null"] {
            let refused = File::open(path).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{path}");
        }
    }
    let eperm = Some(libc::EPERM);
    // SAFETY: every call here is refused before it reads or changes anything, and its pointers are
    // null or to memory that outlives it.
    unsafe {
        let mut families = vec![libc::AF_INET, libc::AF_INET6, libc::AF_PACKET];
        // The helper changes network interfaces, and the manager looks at those of TAPs that it opens.
        if !matches!(kind, ThreadKind::Helper | ThreadKind::Manager) {
            families.push(libc::AF_NETLINK);
        }
        for family in families {
            let socket = libc::syscall(libc::SYS_socket, family, libc::SOCK_STREAM, 0);
            assert_eq!(error_of(socket), eperm, "socket family {family}");
        }
        let executable = libc::PROT_READ | libc::PROT_EXEC;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let map = libc::syscall(libc::SYS_mmap, 0, 4096, executable, private, -1, 0);
        assert_eq!(error_of(map), eperm, "executable memory");
        let namespace = libc::CLONE_NEWUSER | libc::SIGCHLD;
        let clone = libc::syscall(libc::SYS_clone, namespace, 0, 0, 0, 0);
        assert_eq!(error_of(clone), eperm, "new namespace");
        let process = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
        assert_eq!(error_of(process), eperm, "new process");
        let parent = libc::getppid();
        let signal = libc::syscall(libc::SYS_tgkill, parent, parent, 0);
        assert_eq!(error_of(signal), eperm, "signal to another process");
        let stdin = libc::syscall(libc::SYS_ioctl, 0, libc::TIOCSTI, ptr::null::<u8>());
        assert_eq!(error_of(stdin), eperm, "ioctl of a terminal");
        assert_eq!(error_of(raise_capabilities()), eperm, "capset");
    }
}

/// Whether a thread can be limited in its files at all.
fn landlock_works() -> bool {
    let sandbox = Sandbox::new(Enforcement::Deny, FileRules::default()).unwrap();
    thread::spawn(move || {
        rustix::thread::set_no_new_privs(true).unwrap();
        sandbox.confine_thread(ThreadKind::Log).unwrap() != LandlockState::Off
    })
    .join()
    .unwrap()
}

/// Asks for all capabilities (capset(2)).
fn raise_capabilities() -> libc::c_long {
    // _LINUX_CAPABILITY_VERSION_3 of linux/capability.h, and the calling thread.
    let header: [u32; 2] = [0x2008_0522, 0];
    let all = [u32::MAX; 6];
    // SAFETY: the kernel reads both arrays, which have the size of this version's structures.
    unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), all.as_ptr()) }
}

#[test]
fn call_that_only_foreign_code_makes_ends_the_process() {
    for kind in ThreadKind::ALL {
        for call in ["execve", "ptrace", "mount", "unshare", "setuid"] {
            let output = run("child_dies", kind, call);
            assert_eq!(
                output.status.signal(),
                Some(libc::SIGSYS),
                "{kind}: {call}: {output:?}"
            );
        }
    }
}

#[test]
#[ignore = "runs in a child of another test"]
fn child_dies() {
    let call = env::var(CALL).unwrap();
    confine(Enforcement::Deny);
    let null = ptr::null::<libc::c_char>();
    // SAFETY: the filter ends the process at each of these; if it did not, they would fail, or
    // change this process alone.
    unsafe {
        match call.as_str() {
            "execve" => libc::syscall(libc::SYS_execve, c"/bin/true".as_ptr(), null, null),
            "ptrace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0),
            "mount" => libc::syscall(libc::SYS_mount, null, null, null, 0, null),
            "unshare" => libc::syscall(libc::SYS_unshare, libc::CLONE_NEWNS),
            "setuid" => libc::syscall(libc::SYS_setuid, 0),
            other => panic!("{other}"),
        };
    }
}

#[test]
fn threads_that_start_while_front_ends_are_served_are_confined_without_a_descriptor() {
    for kind in [ThreadKind::Worker, ThreadKind::Qmp] {
        run_to_success("child_has_no_descriptor_left", kind);
    }
}

#[test]
#[ignore = "runs in a child of another test"]
fn child_has_no_descriptor_left() {
    let kind = kind_of_the_child();
    let sandbox = Sandbox::new(Enforcement::Deny, FileRules::default()).unwrap();
    sandbox.confine_process().unwrap();
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )
    .unwrap();
    assert!(File::open("/").is_err());
    thread::scope(|scope| {
        let confined = scope.spawn(|| sandbox.confine_thread(kind).map(|_| ()));
        confined.join().unwrap().unwrap();
    });
}

#[test]
fn session_and_its_workers_run_allocate_panic_and_end() {
    run_to_success("child_works", ThreadKind::Session);
}

#[test]
#[ignore = "runs in a child of another test"]
fn child_works() {
    let sandbox = Sandbox::new(Enforcement::Deny, FileRules::default()).unwrap();
    confine(Enforcement::Deny);
    for _ in 0..3 {
        let result = thread::scope(|scope| {
            let worker = thread::Builder::new().name("worker".into());
            let work = || {
                sandbox.confine_thread(ThreadKind::Worker).unwrap();
                // Above the threshold of mmap, grown, and freed.
                let mut bytes = vec![1u8; 1 << 20];
                bytes.resize(3 << 20, 2);
                thread::sleep(Duration::from_millis(1));
                thread::yield_now();
                let caught = catch_unwind(|| panic!("caught"));
                (
                    bytes.len(),
                    caught.is_err(),
                    File::open("/proc/self/comm").is_err(),
                )
            };
            worker.spawn_scoped(scope, work).unwrap().join()
        });
        assert_eq!(result.unwrap(), (3 << 20, true, true));
    }
}

#[test]
fn in_log_mode_a_forbidden_call_is_carried_out() {
    run_to_success("child_is_logged", ThreadKind::Worker);
}

#[test]
#[ignore = "runs in a child of another test"]
fn child_is_logged() {
    confine(Enforcement::Log);
    assert!(File::open("/etc/passwd").is_ok());
    // SAFETY: the call only compares its pointers with null, and fails.
    let mounted = unsafe { libc::syscall(libc::SYS_mount, 0, 0, 0, 0, 0) };
    assert!(matches!(
        error_of(mounted),
        Some(libc::EFAULT | libc::EPERM | libc::EINVAL)
    ));
}
