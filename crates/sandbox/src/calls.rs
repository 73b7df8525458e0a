//! The system calls of each kind of thread.
//!
//! The lists come from the notes `// syscalls:` beside the calls in all crates, and from what the
//! C library and Rust's standard library do on their own: allocate memory, start and end threads,
//! wait for locks, handle signals. A call that has several forms on x86_64 is listed there in both.
//!
//! Arguments are limited where that is a comparison of numbers: a filter sees no memory, so paths
//! are [`files`](crate::files)' subject.

use linux_raw_sys::general::UFFD_USER_MODE_ONLY;
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE};

use crate::ThreadKind;

/// A system call, and the arguments with which it is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its name in section 2 of the manual.
    pub name: &'static str,
    /// Its number on this architecture.
    pub number: i64,
    /// Its arguments.
    pub arguments: Arguments,
}

impl Call {
    pub(crate) const fn new(name: &'static str, number: i64, arguments: Arguments) -> Self {
        Self {
            name,
            number,
            arguments,
        }
    }
}

/// What is said about the arguments of a call, which are counted from 0. Only the lower 32 bits of
/// an argument are looked at, which is all that the kernel uses of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arguments {
    /// Nothing.
    Any,
    /// This one is one of these values.
    OneOf(u8, &'static [u32]),
    /// The bits of `mask` in this one are those of `value`.
    Bits {
        /// Which argument.
        argument: u8,
        /// The bits that matter.
        mask: u32,
        /// What they must be.
        value: u32,
    },
    /// This one is the number of this process.
    OwnProcess(u8),
}

/// A list of calls: `read` stands for `SYS_read` with any arguments, `ioctl(...)` for those given.
macro_rules! calls {
    ($($name:ident : $number:ident $(($arguments:expr))?),* $(,)?) => {
        &[$(Call::new(stringify!($name), libc::$number, calls!(@ $($arguments)?))),*]
    };
    (@) => { Arguments::Any };
    (@ $arguments:expr) => { $arguments };
}

mod never_used;

use never_used::{NEVER_USED, NEVER_USED_X86};

/// Every kind of thread: memory, locks, signals, and its own end.
const RUNTIME: &[Call] = calls![
    read: SYS_read,
    write: SYS_write,
    close: SYS_close,
    futex: SYS_futex,
    sched_yield: SYS_sched_yield,
    brk: SYS_brk,
    mmap: SYS_mmap(NOT_EXECUTABLE),
    munmap: SYS_munmap,
    mremap: SYS_mremap,
    madvise: SYS_madvise,
    rt_sigreturn: SYS_rt_sigreturn,
    rt_sigprocmask: SYS_rt_sigprocmask,
    // The handlers of the standard library and of lost guest memory put back what was before, so
    // that the fault ends the process.
    rt_sigaction: SYS_rt_sigaction(Arguments::OneOf(0, &[SIGABRT, SIGBUS, SIGSEGV])),
    sigaltstack: SYS_sigaltstack,
    tgkill: SYS_tgkill(Arguments::OwnProcess(0)),
    getpid: SYS_getpid,
    gettid: SYS_gettid,
    // Where the vDSO does not do it.
    clock_gettime: SYS_clock_gettime,
    clock_nanosleep: SYS_clock_nanosleep,
    restart_syscall: SYS_restart_syscall,
    exit: SYS_exit,
    exit_group: SYS_exit_group,
];

/// Threads that start other threads, and what those do before they are confined themselves.
const START_THREADS: &[Call] = calls![
    clone: SYS_clone(THREAD_OF_THIS_PROCESS),
    // Answered by ENOSYS for the whole process.
    clone3: SYS_clone3,
    getrandom: SYS_getrandom,
    mprotect: SYS_mprotect(NOT_EXECUTABLE),
    rseq: SYS_rseq,
    set_robust_list: SYS_set_robust_list,
    sched_getaffinity: SYS_sched_getaffinity,
    prctl: SYS_prctl(Arguments::OneOf(0, &[PR_SET_NAME, PR_CAP_AMBIENT])),
    seccomp: SYS_seccomp(Arguments::OneOf(0, &[libc::SECCOMP_SET_MODE_FILTER])),
    capget: SYS_capget,
    // Can only lower: nothing above what the thread has is permitted.
    capset: SYS_capset,
];

/// Waiting for descriptors.
const POLL: &[Call] = calls![ppoll: SYS_ppoll];
#[cfg(target_arch = "x86_64")]
const POLL_X86: &[Call] = calls![poll: SYS_poll];
#[cfg(not(target_arch = "x86_64"))]
const POLL_X86: &[Call] = &[];

#[cfg(target_arch = "x86_64")]
const EPOLL_WAIT: &[Call] = calls![epoll_wait: SYS_epoll_wait];
#[cfg(not(target_arch = "x86_64"))]
const EPOLL_WAIT: &[Call] = calls![epoll_pwait: SYS_epoll_pwait];

/// Carrying frames: from and to TAPs, guests' memory and eventfds.
///
/// A debug build also tries fcntl(F_GETFD) before it closes a descriptor, and does not mind that it
/// is refused.
const WORKER: &[Call] = calls![
    readv: SYS_readv,
    writev: SYS_writev,
    ppoll: SYS_ppoll,
    ioctl: SYS_ioctl(Arguments::OneOf(1, &[TUNSETQUEUE])),
    sched_setaffinity: SYS_sched_setaffinity,
    sched_getaffinity: SYS_sched_getaffinity,
    set_mempolicy: SYS_set_mempolicy,
];

const SWITCH_FORWARDER: &[Call] = calls![
    readv: SYS_readv,
    writev: SYS_writev,
];

/// Looking at files: of /proc and /sys, and at what descriptors are.
const READ_FILES: &[Call] = calls![
    getrandom: SYS_getrandom,
    openat: SYS_openat,
    fstat: SYS_fstat,
    newfstatat: SYS_newfstatat,
    statx: SYS_statx,
    getdents64: SYS_getdents64,
    lseek: SYS_lseek,
    pread64: SYS_pread64,
    readlinkat: SYS_readlinkat,
    fcntl: SYS_fcntl(FCNTL),
];
#[cfg(target_arch = "x86_64")]
const READ_FILES_X86: &[Call] = calls![
    open: SYS_open,
    stat: SYS_stat,
    lstat: SYS_lstat,
    readlink: SYS_readlink,
];
#[cfg(not(target_arch = "x86_64"))]
const READ_FILES_X86: &[Call] = &[];

/// Removing the file of a socket.
const UNLINK: &[Call] = calls![unlinkat: SYS_unlinkat, statx: SYS_statx];
#[cfg(target_arch = "x86_64")]
const UNLINK_X86: &[Call] = calls![unlink: SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const UNLINK_X86: &[Call] = &[];

/// Connecting to a unix socket, and exchanging messages on it.
const UNIX_CLIENT: &[Call] = calls![
    socket: SYS_socket(Arguments::OneOf(0, &[AF_UNIX])),
    connect: SYS_connect,
    setsockopt: SYS_setsockopt,
    getsockopt: SYS_getsockopt,
    sendto: SYS_sendto,
    recvfrom: SYS_recvfrom,
    shutdown: SYS_shutdown,
    fcntl: SYS_fcntl(FCNTL),
    ioctl: SYS_ioctl(Arguments::OneOf(1, &[FIONBIO])),
];

/// Serving a front-end, opening what its vrings need, and placing vrings' memory.
const SESSION: &[Call] = calls![
    accept4: SYS_accept4,
    getpeername: SYS_getpeername,
    recvmsg: SYS_recvmsg,
    sendmsg: SYS_sendmsg,
    fstatfs: SYS_fstatfs,
    fallocate: SYS_fallocate,
    pwrite64: SYS_pwrite64,
    eventfd2: SYS_eventfd2,
    epoll_create1: SYS_epoll_create1,
    epoll_ctl: SYS_epoll_ctl,
    ioctl: SYS_ioctl(TUN_IOCTLS),
    sched_getattr: SYS_sched_getattr(OWN_THREAD),
    sched_setattr: SYS_sched_setattr(OWN_THREAD),
    // Waiting for pages of guest memory (postcopy), in user mode only.
    userfaultfd: SYS_userfaultfd(Arguments::OneOf(0, &[USERFAULTFD_OF_USER_MODE])),
    ioctl: SYS_ioctl(USERFAULTFD_IOCTLS),
    geteuid: SYS_geteuid,
    get_mempolicy: SYS_get_mempolicy,
    set_mempolicy: SYS_set_mempolicy,
];

/// Placing workers, and reopening TAPs.
const PLACER: &[Call] = calls![
    ioctl: SYS_ioctl(TUN_IOCTLS),
    geteuid: SYS_geteuid,
];

/// The HTTP server on a unix socket.
const CONTROL: &[Call] = calls![
    accept4: SYS_accept4,
    epoll_ctl: SYS_epoll_ctl,
    recvfrom: SYS_recvfrom,
    sendto: SYS_sendto,
    readv: SYS_readv,
    writev: SYS_writev,
    shutdown: SYS_shutdown,
    getsockopt: SYS_getsockopt,
    sched_getaffinity: SYS_sched_getaffinity,
    geteuid: SYS_geteuid,
    capget: SYS_capget,
];

/// Making a socket and its file.
const MAKE_SOCKET: &[Call] = calls![
    bind: SYS_bind,
    listen: SYS_listen,
    fchmod: SYS_fchmod,
    fchmodat: SYS_fchmodat,
    fchownat: SYS_fchownat,
    // The file of the socket, by the socket, or else by its path and its owner.
    ioctl: SYS_ioctl(Arguments::OneOf(1, &[SIOCUNIXFILE])),
    geteuid: SYS_geteuid,
];
#[cfg(target_arch = "x86_64")]
const MAKE_SOCKET_X86: &[Call] = calls![chmod: SYS_chmod];
#[cfg(not(target_arch = "x86_64"))]
const MAKE_SOCKET_X86: &[Call] = &[];

/// Opening what a device needs that is added, and letting its thread limit itself to its own files.
const MANAGER: &[Call] = calls![
    socket: SYS_socket(Arguments::OneOf(0, &[AF_NETLINK])),
    ioctl: SYS_ioctl(Arguments::OneOf(1, &[request(libc::TUNGETIFF)])),
    flock: SYS_flock,
    memfd_create: SYS_memfd_create,
    landlock_create_ruleset: SYS_landlock_create_ruleset,
    landlock_add_rule: SYS_landlock_add_rule,
    landlock_restrict_self: SYS_landlock_restrict_self,
];

/// Waiting for the next daemon.
const HANDOVER: &[Call] = calls![
    accept4: SYS_accept4,
    getsockopt: SYS_getsockopt,
    geteuid: SYS_geteuid,
    // Closing a socket of another user.
    fcntl: SYS_fcntl(FCNTL),
];

/// Waiting for signals, handing over, ending the other threads.
const MAIN: &[Call] = calls![
    recvfrom: SYS_recvfrom,
    sendto: SYS_sendto,
    ioctl: SYS_ioctl(Arguments::OneOf(1, &[TUNSETQUEUE])),
    fcntl: SYS_fcntl(FCNTL),
    // The next daemon is waited for, but not long.
    setsockopt: SYS_setsockopt,
    // The helper, when it ends.
    wait4: SYS_wait4,
    waitid: SYS_waitid,
];

/// Unknown descriptors of front-ends, which may be sockets.
const CLOSER: &[Call] = calls![setsockopt: SYS_setsockopt, fcntl: SYS_fcntl(FCNTL)];

/// Asking the helper.
const ASK_HELPER: &[Call] = calls![sendmsg: SYS_sendmsg, recvmsg: SYS_recvmsg];

/// Answering the daemon: opening queues of TAPs, changing interfaces, writing CPU masks,
/// connecting. Beside it, making and removing sockets.
const HELPER: &[Call] = calls![
    fstat: SYS_fstat,
    newfstatat: SYS_newfstatat,
    socket: SYS_socket(Arguments::OneOf(0, &[AF_UNIX, AF_NETLINK])),
    connect: SYS_connect,
    ioctl: SYS_ioctl(Arguments::OneOf(1, &[request(libc::TUNSETIFF), FIONBIO])),
    openat: SYS_openat,
    fcntl: SYS_fcntl(FCNTL),
    getrandom: SYS_getrandom,
];

const WATCHDOG: &[Call] = calls![membarrier: SYS_membarrier];

const NOT_EXECUTABLE: Arguments = Arguments::Bits {
    argument: 2,
    mask: bits(libc::PROT_EXEC),
    value: 0,
};

/// The thread is the calling one, such as a worker that is not confined as one yet.
const OWN_THREAD: Arguments = Arguments::OneOf(0, &[0]);

const THREAD_OF_THIS_PROCESS: Arguments = Arguments::Bits {
    argument: 0,
    mask: bits(libc::CLONE_THREAD | NEW_NAMESPACES),
    value: bits(libc::CLONE_THREAD),
};

const NEW_NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

const FCNTL: Arguments = Arguments::OneOf(
    1,
    &[
        bits(libc::F_GETFD),
        bits(libc::F_SETFD),
        bits(libc::F_GETFL),
        bits(libc::F_SETFL),
        bits(libc::F_DUPFD_CLOEXEC),
        bits(libc::F_ADD_SEALS),
        bits(libc::F_GET_SEALS),
    ],
);

const TUN_IOCTLS: Arguments = Arguments::OneOf(
    1,
    &[
        request(libc::TUNSETIFF),
        TUNSETQUEUE,
        request(libc::TUNSETVNETHDRSZ),
        request(libc::TUNSETVNETLE),
        request(libc::TUNSETOFFLOAD),
    ],
);

/// The flags of a descriptor that reports accesses in user mode only. One that also reports those of
/// the kernel is a tool to attack it with.
const USERFAULTFD_OF_USER_MODE: u32 =
    UFFD_USER_MODE_ONLY | bits(libc::O_CLOEXEC) | bits(libc::O_NONBLOCK);
const USERFAULTFD_OF_KERNEL_MODE: Arguments = Arguments::Bits {
    argument: 0,
    mask: UFFD_USER_MODE_ONLY,
    value: 0,
};
const USERFAULTFD_IOCTLS: Arguments = Arguments::OneOf(
    1,
    &[UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE],
);

const TUNSETQUEUE: u32 = request(libc::TUNSETQUEUE);
const FIONBIO: u32 = request(libc::FIONBIO);
/// `SIOCPROTOPRIVATE` of unix sockets (linux/un.h).
const SIOCUNIXFILE: u32 = 0x89e0;
const AF_UNIX: u32 = bits(libc::AF_UNIX);
const AF_NETLINK: u32 = bits(libc::AF_NETLINK);
const PR_SET_NAME: u32 = bits(libc::PR_SET_NAME);
const PR_CAP_AMBIENT: u32 = bits(libc::PR_CAP_AMBIENT);
const SIGABRT: u32 = bits(libc::SIGABRT);
const SIGBUS: u32 = bits(libc::SIGBUS);
const SIGSEGV: u32 = bits(libc::SIGSEGV);

/// The bits of a number that the C library declares as signed.
const fn bits(number: i32) -> u32 {
    number.cast_unsigned()
}

/// An ioctl's request, of which the kernel uses 32 bits.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
const fn request(request: libc::Ioctl) -> u32 {
    request as u32
}

/// The calls that a thread of `kind` may make.
pub(crate) fn of_kind(kind: ThreadKind) -> Vec<Call> {
    let groups: &[&[Call]] = match kind {
        ThreadKind::Main => &[
            RUNTIME,
            START_THREADS,
            MAIN,
            ASK_HELPER,
            UNLINK,
            UNLINK_X86,
            POLL,
            POLL_X86,
        ],
        ThreadKind::Session => &[
            RUNTIME,
            START_THREADS,
            WORKER,
            EPOLL_WAIT,
            READ_FILES,
            READ_FILES_X86,
            UNIX_CLIENT,
            UNLINK,
            UNLINK_X86,
            POLL,
            POLL_X86,
            SESSION,
        ],
        ThreadKind::Worker => &[RUNTIME, WORKER, EPOLL_WAIT],
        ThreadKind::SwitchForwarder => &[RUNTIME, SWITCH_FORWARDER, POLL, POLL_X86],
        ThreadKind::Placer => &[
            RUNTIME,
            START_THREADS,
            READ_FILES,
            READ_FILES_X86,
            UNIX_CLIENT,
            POLL,
            POLL_X86,
            PLACER,
            ASK_HELPER,
        ],
        ThreadKind::Qmp => &[
            RUNTIME,
            READ_FILES,
            READ_FILES_X86,
            UNIX_CLIENT,
            POLL,
            POLL_X86,
            SCHED_GETAFFINITY,
            ASK_HELPER,
        ],
        ThreadKind::Control => &[RUNTIME, EPOLL_WAIT, READ_FILES, READ_FILES_X86, CONTROL],
        ThreadKind::Manager => &[
            RUNTIME,
            START_THREADS,
            WORKER,
            EPOLL_WAIT,
            READ_FILES,
            READ_FILES_X86,
            UNIX_CLIENT,
            UNLINK,
            UNLINK_X86,
            POLL,
            POLL_X86,
            SESSION,
            MAKE_SOCKET,
            MAKE_SOCKET_X86,
            MANAGER,
        ],
        ThreadKind::Log => &[RUNTIME],
        ThreadKind::Closer => &[RUNTIME, CLOSER],
        ThreadKind::Watchdog => &[RUNTIME, WATCHDOG],
        ThreadKind::Handover => &[RUNTIME, HANDOVER],
        ThreadKind::Helper => &[
            RUNTIME,
            ASK_HELPER,
            HELPER,
            MAKE_SOCKET,
            MAKE_SOCKET_X86,
            UNLINK,
            UNLINK_X86,
        ],
    };
    groups.concat()
}

const SCHED_GETAFFINITY: &[Call] = calls![sched_getaffinity: SYS_sched_getaffinity];

/// The calls that end the process.
#[must_use]
pub fn never_used() -> Vec<Call> {
    [NEVER_USED, NEVER_USED_X86].concat()
}

/// Starting a thread or process with flags that a filter cannot see.
pub(crate) fn clone3() -> Vec<Call> {
    vec![Call::new("clone3", libc::SYS_clone3, Arguments::Any)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn names(kind: ThreadKind) -> BTreeSet<&'static str> {
        kind.calls().iter().map(|call| call.name).collect()
    }

    #[test]
    fn worker_has_at_most_thirty_calls() {
        let names = names(ThreadKind::Worker);
        assert!(names.len() <= 30, "{}: {names:?}", names.len());
    }

    /// The table of the documentation, one line for each kind.
    fn documented_table() -> String {
        let mut table = String::from("| thread | calls | names |\n|---|---|---|\n");
        for kind in ThreadKind::ALL {
            let names: Vec<&str> = names(kind).into_iter().collect();
            table += &format!("| {kind} | {} | {} |\n", names.len(), names.join(", "));
        }
        table
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn table_in_the_documentation_is_that_of_the_lists() {
        let page = include_str!("../../../docs/sandbox.md");
        let expected = documented_table();
        assert!(
            page.contains(&expected),
            "replace the table of calls in docs/sandbox.md by this one:\n\n{expected}"
        );
    }

    #[test]
    fn no_list_contains_a_call_that_ends_the_process() {
        for kind in ThreadKind::ALL {
            for call in kind.calls() {
                let never = never_used();
                let found = never
                    .iter()
                    .find(|never| never.number == call.number && overlap(never, &call));
                assert_eq!(found, None, "{kind}");
            }
        }
    }

    /// Whether a call with some arguments may be both, which have the same number.
    fn overlap(never: &Call, allowed: &Call) -> bool {
        match (never.arguments, allowed.arguments) {
            (
                Arguments::Bits {
                    argument,
                    mask,
                    value,
                },
                Arguments::OneOf(same, values),
            ) => argument != same || values.iter().any(|allowed| allowed & mask == value),
            _ => true,
        }
    }

    #[test]
    fn who_starts_a_thread_may_do_what_that_thread_may() {
        for kind in ThreadKind::ALL {
            let own = kind.calls();
            for started in kind.starts() {
                let lacks: Vec<Call> = started
                    .calls()
                    .into_iter()
                    .filter(|call| !own.iter().any(|allowed| includes(allowed, call)))
                    .collect();
                assert_eq!(lacks, [], "{kind} starts {started}");
                assert!(
                    kind.capabilities().contains(started.capabilities()),
                    "{started}"
                );
            }
        }
    }

    /// Whether `allowed` allows all that `call` does.
    fn includes(allowed: &Call, call: &Call) -> bool {
        allowed.number == call.number
            && match (allowed.arguments, call.arguments) {
                (Arguments::Any, _) => true,
                (Arguments::OneOf(a, wide), Arguments::OneOf(b, narrow)) => {
                    a == b && narrow.iter().all(|value| wide.contains(value))
                }
                (wide, narrow) => wide == narrow,
            }
    }

    #[test]
    fn threads_that_read_what_guests_write_open_and_create_nothing() {
        for kind in [
            ThreadKind::Worker,
            ThreadKind::SwitchForwarder,
            ThreadKind::Closer,
            ThreadKind::Log,
            ThreadKind::Watchdog,
        ] {
            for name in [
                "openat", "open", "socket", "connect", "clone", "capset", "unlinkat",
            ] {
                assert!(!names(kind).contains(name), "{kind}: {name}");
            }
        }
    }
}
