//! What a person is told when a TAP cannot be had: one sentence with what to do.

use std::io;

use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::uplink::UplinkError;

use crate::rtnetlink::Link;
use crate::sys;

/// `/dev/net/tun` did not open.
pub(super) fn no_tun(error: &io::Error) -> UplinkError {
    UplinkError(match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => format!(
            "there is no TUN driver behind /dev/net/tun ({error}); load it with `modprobe tun`, and in a container pass the device in"
        ),
        Some(libc::EACCES | libc::EPERM) => format!(
            "/dev/net/tun may not be opened by user {} ({error}); give that user read and write access to it, and in a container allow device c 10:200",
            sys::effective_uid()
        ),
        _ => format!("/dev/net/tun cannot be opened ({error}); see to that device first"),
    })
}

/// TUNSETIFF failed; `link` is the interface of that name, if there is one.
pub(super) fn attach_refused(name: &str, link: Option<&Link>, error: &io::Error) -> UplinkError {
    let user = sys::effective_uid();
    let wanted = "mode tap multi_queue vnet_hdr";
    UplinkError(match (error.raw_os_error(), link) {
        (Some(libc::EPERM), None) => format!(
            "user {user} may not make TAP {name} ({error}); have it made with `ip tuntap add dev {name} mode tap user {user} multi_queue vnet_hdr`, or give this program CAP_NET_ADMIN"
        ),
        (Some(libc::EPERM), Some(_)) => format!(
            "TAP {name} does not belong to user {user} ({error}); have it made with `ip tuntap add dev {name} mode tap user {user} multi_queue vnet_hdr`, or give this program CAP_NET_ADMIN"
        ),
        (Some(libc::EINVAL), Some(link)) if link.is_tap && !link.is_multi_queue => format!(
            "TAP {name} takes one queue only; remove it and make it with `ip tuntap add dev {name} {wanted}`"
        ),
        (Some(libc::EINVAL), Some(link)) if !link.is_tap => format!(
            "interface {name} is no TAP but {}; name another one, or make one with `ip tuntap add dev NAME {wanted}`",
            kind_of(link)
        ),
        (Some(libc::EBUSY), _) => {
            format!("TAP {name} is held by another process; stop that process or name another TAP")
        }
        (Some(libc::E2BIG), _) => format!(
            "TAP {name} has as many queues as the kernel allows (256); use fewer queue pairs, or stop the other processes that hold some"
        ),
        _ => format!("TAP {name} cannot be opened ({error}); try another name"),
    })
}

fn kind_of(link: &Link) -> String {
    match link.kind.as_str() {
        "" => "a network card or loopback".into(),
        "tun" => "a TUN (which carries packets, not frames)".into(),
        kind => format!("a {kind}"),
    }
}

/// Somebody else has queues of the TAP: flows would be spread over both.
pub(super) fn held_by_other(name: &str, others: u32) -> UplinkError {
    UplinkError(format!(
        "TAP {name} is held by another process, with {others} of its queues; stop that process or name another TAP"
    ))
}

/// The interface table is out of reach.
pub(super) fn no_link_table(error: &io::Error) -> UplinkError {
    UplinkError(format!(
        "the kernel's interfaces cannot be looked up ({error}); allow this program AF_NETLINK sockets"
    ))
}

/// An ioctl that every TAP of a recent kernel takes failed.
pub(super) fn setup_failed(name: &str, error: &io::Error) -> UplinkError {
    UplinkError(format!(
        "TAP {name} cannot be set up for virtio-net headers and several queues ({error}); Linux 4.0 or later is needed"
    ))
}

/// The interface was deleted.
pub(super) fn interface_gone(name: &str) -> UplinkError {
    UplinkError(format!(
        "TAP {name} is gone; make it again and restart this program"
    ))
}

/// An interface of ours did not go up.
pub(super) fn bring_up_failed(name: &str, error: &io::Error) -> UplinkError {
    UplinkError(format!(
        "TAP {name} cannot be brought up ({error}); give this program CAP_NET_ADMIN"
    ))
}

/// An existing interface is down: a warning.
pub(super) fn is_down(name: &str) -> String {
    format!("TAP {name} is down and carries nothing; bring it up with `ip link set {name} up`")
}

/// There is no bridge of that name.
pub(super) fn no_bridge(bridge: &str) -> UplinkError {
    UplinkError(format!(
        "there is no bridge {bridge}; make it with `ip link add {bridge} type bridge`, or name another one"
    ))
}

/// The interface named as the bridge is none.
pub(super) fn not_a_bridge(bridge: &str) -> UplinkError {
    UplinkError(format!(
        "interface {bridge} is no bridge; name one, or make one with `ip link add NAME type bridge`"
    ))
}

/// The TAP is a port already, elsewhere.
pub(super) fn in_another_bridge(name: &str, bridge: &str) -> UplinkError {
    UplinkError(format!(
        "TAP {name} is a port of another bridge than {bridge}; take it out with `ip link set {name} nomaster`, or leave bridge={bridge} away"
    ))
}

/// The kernel did not make the TAP a port.
pub(super) fn join_refused(name: &str, bridge: &str, error: &io::Error) -> UplinkError {
    UplinkError(format!(
        "TAP {name} cannot be put into bridge {bridge} ({error}); do it with `ip link set {name} master {bridge}`, or give this program CAP_NET_ADMIN"
    ))
}

/// The MTU is too small and cannot be raised.
pub(super) fn mtu_refused(name: &str, have: u32, want: u32, error: &io::Error) -> io::Error {
    let text = format!(
        "TAP {name} has an MTU of {have} and it cannot be set to {want} ({error}); do it with `ip link set {name} mtu {want}`, or use an MTU of {have}"
    );
    io::Error::new(error.kind(), text)
}

/// The kernel does not take the header length or the offloads.
pub(super) fn format_refused(name: &str, format: FrameFormat, error: &io::Error) -> io::Error {
    let text = match error.raw_os_error() {
        Some(libc::EBADFD) => interface_gone(name).0,
        _ => format!(
            "TAP {name} does not take {format:?} ({error}); turn offloads off in the guest's network card"
        ),
    };
    io::Error::new(error.kind(), text)
}

/// The kernel does not attach or detach a queue.
pub(super) fn queue_refused(name: &str, attached: bool, error: &io::Error) -> io::Error {
    let text = match error.raw_os_error() {
        // A queue without an interface is one that can be neither attached nor detached.
        Some(libc::EINVAL | libc::EBADFD) => interface_gone(name).0,
        _ => format!(
            "a queue of TAP {name} cannot be {} ({error}); check who may use that TAP",
            if attached { "attached" } else { "detached" }
        ),
    };
    io::Error::new(error.kind(), text)
}
