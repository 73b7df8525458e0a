//! The calls that end the process.

use super::{Arguments, Call, USERFAULTFD_OF_KERNEL_MODE};

/// The calls that no thread of the process makes, and no library tries: executing programs, looking
/// into other processes, changing mounts, namespaces, users or the kernel. One of them ends the
/// process.
pub(super) const NEVER_USED: &[Call] = calls![
    execve: SYS_execve,
    execveat: SYS_execveat,
    ptrace: SYS_ptrace,
    process_vm_readv: SYS_process_vm_readv,
    process_vm_writev: SYS_process_vm_writev,
    pidfd_getfd: SYS_pidfd_getfd,
    kcmp: SYS_kcmp,
    mount: SYS_mount,
    umount2: SYS_umount2,
    pivot_root: SYS_pivot_root,
    chroot: SYS_chroot,
    open_tree: SYS_open_tree,
    move_mount: SYS_move_mount,
    fsopen: SYS_fsopen,
    fsconfig: SYS_fsconfig,
    fsmount: SYS_fsmount,
    fspick: SYS_fspick,
    mount_setattr: SYS_mount_setattr,
    unshare: SYS_unshare,
    setns: SYS_setns,
    setuid: SYS_setuid,
    setgid: SYS_setgid,
    setreuid: SYS_setreuid,
    setregid: SYS_setregid,
    setresuid: SYS_setresuid,
    setresgid: SYS_setresgid,
    setgroups: SYS_setgroups,
    setfsuid: SYS_setfsuid,
    setfsgid: SYS_setfsgid,
    init_module: SYS_init_module,
    finit_module: SYS_finit_module,
    delete_module: SYS_delete_module,
    kexec_load: SYS_kexec_load,
    bpf: SYS_bpf,
    perf_event_open: SYS_perf_event_open,
    userfaultfd: SYS_userfaultfd(USERFAULTFD_OF_KERNEL_MODE),
    io_uring_setup: SYS_io_uring_setup,
    open_by_handle_at: SYS_open_by_handle_at,
    add_key: SYS_add_key,
    request_key: SYS_request_key,
    keyctl: SYS_keyctl,
    swapon: SYS_swapon,
    swapoff: SYS_swapoff,
    acct: SYS_acct,
    quotactl: SYS_quotactl,
    reboot: SYS_reboot,
    settimeofday: SYS_settimeofday,
    clock_settime: SYS_clock_settime,
    adjtimex: SYS_adjtimex,
    clock_adjtime: SYS_clock_adjtime,
    sethostname: SYS_sethostname,
    setdomainname: SYS_setdomainname,
    personality: SYS_personality,
    syslog: SYS_syslog,
    vhangup: SYS_vhangup,
];
/// Those that only x86_64 has.
#[cfg(target_arch = "x86_64")]
pub(super) const NEVER_USED_X86: &[Call] = calls![
    iopl: SYS_iopl,
    ioperm: SYS_ioperm,
    modify_ldt: SYS_modify_ldt,
    fork: SYS_fork,
    vfork: SYS_vfork,
    mknod: SYS_mknod,
];
#[cfg(not(target_arch = "x86_64"))]
pub(super) const NEVER_USED_X86: &[Call] = &[];
