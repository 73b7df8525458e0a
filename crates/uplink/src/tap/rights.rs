//! The operations on a TAP that need CAP_NET_ADMIN, or to own the TAP. A process that has a helper
//! leaves them to it.

use std::io;
use std::os::fd::BorrowedFd;

use virtionet_base::rights::{LinkChange, with_help};

use crate::rtnetlink::{Link, LinkTable};
use crate::sys;

/// Makes `tun` an attached queue of the TAP `name`; returns the interface's name.
pub(super) fn attach(tun: BorrowedFd<'_>, name: &str) -> io::Result<String> {
    with_help(
        || attach_own(tun, name),
        |helper| helper.attach_tap(tun, name),
    )
}

/// Changes the interface of `link`.
pub(super) fn change_link(links: &LinkTable, link: &Link, change: &LinkChange) -> io::Result<()> {
    with_help(
        || apply(links, link.index, change),
        |helper| helper.change_link(&link.name, change),
    )
}

/// Makes `tun`, an open `/dev/net/tun`, an attached queue of the TAP `name`, with the rights of
/// this thread. Returns the interface's name.
///
/// # Errors
/// The kernel's: EPERM without the right, EINVAL where the interface is no TAP with several queues.
// syscalls: ioctl(TUNSETIFF)
pub fn attach_own(tun: BorrowedFd<'_>, name: &str) -> io::Result<String> {
    sys::attach_device(tun, name)
}

/// Changes the interface `name` with the rights of this thread.
///
/// # Errors
/// The kernel's: ENODEV where there is no such interface, EPERM without the right.
// syscalls: socket read write
pub fn change_own_link(name: &str, change: &LinkChange) -> io::Result<()> {
    let links = LinkTable::open()?;
    apply(&links, index_in(&links, name)?, change)
}

/// The index of the interface `name`.
///
/// # Errors
/// ENODEV where there is none.
// syscalls: socket read write
pub fn find_index(name: &str) -> io::Result<u32> {
    index_in(&LinkTable::open()?, name)
}

fn apply(links: &LinkTable, index: u32, change: &LinkChange) -> io::Result<()> {
    match change {
        LinkChange::Up => links.bring_up(index),
        LinkChange::Mtu(mtu) => links.set_mtu(index, *mtu),
        LinkChange::Port(bridge) => links.set_master(index, index_in(links, bridge)?),
    }
}

fn index_in(links: &LinkTable, name: &str) -> io::Result<u32> {
    let missing = || io::Error::from_raw_os_error(libc::ENODEV);
    Ok(links.find_by_name(name)?.ok_or_else(missing)?.index)
}
