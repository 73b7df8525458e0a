//! Converts the kernel's errors into the causes that they have with a TAP.

use std::io;

use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::uplink::UplinkError;

use crate::rtnetlink::Link;
use crate::sys;

/// `/dev/net/tun` cannot be opened.
pub(super) fn tun_open_failed(source: io::Error) -> UplinkError {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => UplinkError::TunDriverMissing { source },
        Some(libc::EACCES | libc::EPERM) => UplinkError::TunAccessDenied {
            user: sys::effective_uid(),
            source,
        },
        _ => UplinkError::TunOpenFailed { source },
    }
}

/// TUNSETIFF failed; `link` is the interface of that name, if there is one.
pub(super) fn attach_refused(name: &str, link: Option<&Link>, source: io::Error) -> UplinkError {
    let name = name.to_owned();
    let user = sys::effective_uid();
    match (source.raw_os_error(), link) {
        (Some(libc::EPERM), None) => UplinkError::TapCreationDenied { name, user, source },
        (Some(libc::EPERM), Some(_)) => UplinkError::TapNotOwned { name, user, source },
        (Some(libc::EINVAL), Some(link)) if link.is_tap && !link.is_multi_queue => {
            UplinkError::TapSingleQueue { name, source }
        }
        (Some(libc::EINVAL), Some(link)) if !link.is_tap => UplinkError::NotATap {
            name,
            kind: describe_kind(link),
            source,
        },
        (Some(libc::EBUSY), _) => UplinkError::TapBusy { name, source },
        (Some(libc::E2BIG), _) => UplinkError::TapQueuesExhausted { name, source },
        _ => UplinkError::TapOpenFailed { name, source },
    }
}

fn describe_kind(link: &Link) -> String {
    match link.kind.as_str() {
        "" => "a network card or loopback".into(),
        "tun" => "a TUN (which carries packets, not frames)".into(),
        kind => format!("a {kind}"),
    }
}

/// The kernel's table of interfaces cannot be read.
pub(super) fn link_table_unavailable(source: io::Error) -> UplinkError {
    UplinkError::LinkTableUnavailable { source }
}

/// An ioctl failed that every TAP of a recent kernel supports.
pub(super) fn setup_failed(name: &str, source: io::Error) -> UplinkError {
    UplinkError::TapSetupFailed {
        name: name.to_owned(),
        source,
    }
}

/// The interface was deleted.
pub(super) fn interface_gone(name: &str, source: Option<io::Error>) -> UplinkError {
    UplinkError::TapGone {
        name: name.to_owned(),
        user: sys::effective_uid(),
        source,
    }
}

/// The interface exists and is down.
pub(super) fn interface_down(name: &str) -> UplinkError {
    UplinkError::TapDown {
        name: name.to_owned(),
    }
}

/// The interface exists, but not in this program's network namespace.
pub(super) fn interface_moved(name: &str) -> UplinkError {
    UplinkError::TapMoved {
        name: name.to_owned(),
    }
}

/// The kernel does not accept the header's length or the offloads.
pub(super) fn format_refused(name: &str, format: FrameFormat, source: io::Error) -> UplinkError {
    match source.raw_os_error() {
        Some(libc::EBADFD) => interface_gone(name, Some(source)),
        _ => UplinkError::FormatRefused {
            name: name.to_owned(),
            format,
            source,
        },
    }
}

/// The kernel does not attach or detach a queue.
pub(super) fn queue_refused(name: &str, attached: bool, source: io::Error) -> UplinkError {
    let name = name.to_owned();
    match attached {
        true => UplinkError::QueueAttachFailed { name, source },
        false => UplinkError::QueueDetachFailed { name, source },
    }
}
