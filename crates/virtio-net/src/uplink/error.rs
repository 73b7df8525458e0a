//! Why an uplink cannot be opened or set up.

use std::error::Error;
use std::io;

use crate::header::FrameFormat;

/// Why an uplink, or one of its queues, cannot be opened or set up, with one variant for each
/// cause.
///
/// The text is one sentence for an operator, which says what to do; it contains the kernel's error
/// already, so print [`Error::source`] only where the text is not printed.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// `/dev/net/tun` does not exist, or no driver is behind it.
    #[error(
        "there is no TUN driver behind /dev/net/tun ({source}); load it with `modprobe tun`, and in a container pass the device in"
    )]
    TunDriverMissing {
        /// The kernel's error.
        source: io::Error,
    },
    /// The daemon's user may not open `/dev/net/tun`.
    #[error(
        "/dev/net/tun may not be opened by user {user} ({source}); give that user read and write access to it, and in a container allow device c 10:200"
    )]
    TunAccessDenied {
        /// The effective user.
        user: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// `/dev/net/tun` cannot be opened for another reason.
    #[error("/dev/net/tun cannot be opened ({source}); check that device and its permissions")]
    TunOpenFailed {
        /// The kernel's error.
        source: io::Error,
    },
    /// The daemon's user may not create a TAP.
    #[error(
        "user {user} may not make TAP {name} ({source}); have it made with `ip tuntap add dev {name} mode tap user {user} multi_queue vnet_hdr`, or give this program CAP_NET_ADMIN"
    )]
    TapCreationDenied {
        /// The interface's name.
        name: String,
        /// The effective user.
        user: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// The TAP belongs to another user.
    #[error(
        "TAP {name} does not belong to user {user} ({source}); have it made with `ip tuntap add dev {name} mode tap user {user} multi_queue vnet_hdr`, or give this program CAP_NET_ADMIN"
    )]
    TapNotOwned {
        /// The interface's name.
        name: String,
        /// The effective user.
        user: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// The TAP was created without `multi_queue`.
    #[error(
        "TAP {name} takes one queue only; remove it and make it with `ip tuntap add dev {name} mode tap multi_queue vnet_hdr`"
    )]
    TapSingleQueue {
        /// The interface's name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// The interface of that name is not a TAP.
    #[error(
        "interface {name} is no TAP but {kind}; name another one, or make one with `ip tuntap add dev NAME mode tap multi_queue vnet_hdr`"
    )]
    NotATap {
        /// The interface's name.
        name: String,
        /// The kind of the interface, with an article: `a bridge`.
        kind: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// Another process uses the TAP, so that it cannot have a further queue.
    #[error("TAP {name} is held by another process; stop that process or name another TAP")]
    TapBusy {
        /// The interface's name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// Another process has queues of the TAP, between which the kernel would spread the flows.
    #[error(
        "TAP {name} is held by another process, with {queues} of its queues; stop that process or name another TAP"
    )]
    TapShared {
        /// The interface's name.
        name: String,
        /// How many queues other processes have.
        queues: u32,
    },
    /// The TAP has as many queues as the kernel allows.
    #[error(
        "TAP {name} has as many queues as the kernel allows (256); use fewer queue pairs, or stop the other processes that hold some"
    )]
    TapQueuesExhausted {
        /// The interface's name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// The TAP cannot be opened for another reason.
    #[error("TAP {name} cannot be opened ({source}); try another name")]
    TapOpenFailed {
        /// The interface's name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel does not support a setting that every TAP of a recent kernel has.
    #[error(
        "TAP {name} cannot be set up for virtio-net headers and several queues ({source}); Linux 4.0 or later is needed"
    )]
    TapSetupFailed {
        /// The interface's name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// The TAP was deleted. It is opened again when an interface of that name is there again.
    #[error(
        "TAP {name} was deleted; make it again with `ip tuntap add dev {name} mode tap user {user} multi_queue vnet_hdr`"
    )]
    TapGone {
        /// The interface's name.
        name: String,
        /// The effective user, who must own the new TAP.
        user: u32,
        /// The kernel's error, where a system call failed.
        source: Option<io::Error>,
    },
    /// The TAP is down.
    #[error("TAP {name} is down and carries nothing; bring it up with `ip link set {name} up`")]
    TapDown {
        /// The interface's name.
        name: String,
    },
    /// The TAP is in another network namespace than this program.
    #[error(
        "TAP {name} was moved to another network namespace, where this program cannot change it; move it back, or set it up there and restart this program there"
    )]
    TapMoved {
        /// The interface's name.
        name: String,
    },
    /// A TAP that this program created cannot be brought up.
    #[error("TAP {name} cannot be brought up ({source}); give this program CAP_NET_ADMIN")]
    TapBringUpFailed {
        /// The interface's name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel's table of interfaces cannot be read.
    #[error(
        "the kernel's interfaces cannot be looked up ({source}); allow this program AF_NETLINK sockets"
    )]
    LinkTableUnavailable {
        /// The kernel's error.
        source: io::Error,
    },
    /// No bridge has that name.
    #[error(
        "there is no bridge {bridge}; make it with `ip link add {bridge} type bridge`, or name another one"
    )]
    BridgeMissing {
        /// The bridge's name.
        bridge: String,
    },
    /// The interface named as the bridge is not one.
    #[error(
        "interface {bridge} is no bridge; name one, or make one with `ip link add NAME type bridge`"
    )]
    NotABridge {
        /// The interface's name.
        bridge: String,
    },
    /// The TAP is a port of another bridge than the one that is configured.
    #[error(
        "TAP {name} is a port of another bridge than {bridge}; take it out with `ip link set {name} nomaster`, or leave bridge={bridge} away"
    )]
    TapInOtherBridge {
        /// The interface's name.
        name: String,
        /// The bridge that is configured.
        bridge: String,
    },
    /// The kernel does not make the TAP a port of the bridge.
    #[error(
        "TAP {name} cannot be put into bridge {bridge} ({source}); do it with `ip link set {name} master {bridge}`, or give this program CAP_NET_ADMIN"
    )]
    BridgeJoinFailed {
        /// The interface's name.
        name: String,
        /// The bridge's name.
        bridge: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// The interface's MTU is too small and cannot be raised.
    #[error(
        "TAP {name} has an MTU of {mtu} and it cannot be set to {wanted} ({source}); do it with `ip link set {name} mtu {wanted}`, or use an MTU of {mtu}"
    )]
    MtuRefused {
        /// The interface's name.
        name: String,
        /// Its MTU.
        mtu: u32,
        /// The MTU that is needed.
        wanted: u32,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel does not accept the header's length or the offloads.
    #[error(
        "TAP {name} does not take {format:?} ({source}); turn offloads off in the guest's network device"
    )]
    FormatRefused {
        /// The interface's name.
        name: String,
        /// The format that the driver negotiated.
        format: FrameFormat,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel does not attach a queue.
    #[error("a queue of TAP {name} cannot be attached ({source}); check who may use that TAP")]
    QueueAttachFailed {
        /// The interface's name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel does not detach a queue.
    #[error("a queue of TAP {name} cannot be detached ({source}); check who may use that TAP")]
    QueueDetachFailed {
        /// The interface's name.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// Two owners in this process name the same TAP.
    #[error("TAP {name} belongs to {owner} already; name another one for {claimant}")]
    TapClaimed {
        /// The interface's name.
        name: String,
        /// The owner: `a device`, `switch NAME`.
        owner: String,
        /// The second owner that names it.
        claimant: String,
    },
    /// The switch has another TAP as its host port already.
    #[error(
        "switch {switch} has tap={existing} already, not tap={requested}; name the same TAP at each of its devices, or at one of them only"
    )]
    SwitchHostPortExists {
        /// The switch's name.
        switch: String,
        /// The TAP that it has.
        existing: String,
        /// The TAP that was requested.
        requested: String,
    },
    /// The switch cannot have a further port.
    #[error("switch {switch} has {ports} ports already; use another switch for further devices")]
    SwitchFull {
        /// The switch's name.
        switch: String,
        /// How many ports it has.
        ports: usize,
    },
    /// A port of a switch has no queue pair of that index.
    #[error("a port of a switch has no queue pair {pair}; use at most {max_pairs}")]
    SwitchPairOutOfRange {
        /// The queue pair's index.
        pair: u16,
        /// How many queue pairs a port can have.
        max_pairs: u16,
    },
    /// The worker cannot wait on the uplink queue's descriptor.
    #[error("cannot wait for frames of the uplink: {source}")]
    PollSetupFailed {
        /// The kernel's error.
        source: io::Error,
    },
    /// An error of an uplink that is not part of this workspace.
    #[error("{source}")]
    Other {
        /// A stable code in kebab case.
        code: &'static str,
        /// The error, whose text follows the same rules as the others'.
        source: Box<dyn Error + Send + Sync>,
    },
}

impl UplinkError {
    /// The cause as a stable code in kebab case, for programs; the text may change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::TunDriverMissing { .. } => "tun-driver-missing",
            Self::TunAccessDenied { .. } => "tun-access-denied",
            Self::TunOpenFailed { .. } => "tun-open-failed",
            Self::TapCreationDenied { .. } => "tap-creation-denied",
            Self::TapNotOwned { .. } => "tap-not-owned",
            Self::TapSingleQueue { .. } => "tap-single-queue",
            Self::NotATap { .. } => "not-a-tap",
            Self::TapBusy { .. } => "tap-busy",
            Self::TapShared { .. } => "tap-shared",
            Self::TapQueuesExhausted { .. } => "tap-queues-exhausted",
            Self::TapOpenFailed { .. } => "tap-open-failed",
            Self::TapSetupFailed { .. } => "tap-setup-failed",
            Self::TapGone { .. } => "tap-gone",
            Self::TapDown { .. } => "tap-down",
            Self::TapMoved { .. } => "tap-moved",
            Self::TapBringUpFailed { .. } => "tap-bring-up-failed",
            Self::LinkTableUnavailable { .. } => "link-table-unavailable",
            Self::BridgeMissing { .. } => "bridge-missing",
            Self::NotABridge { .. } => "not-a-bridge",
            Self::TapInOtherBridge { .. } => "tap-in-other-bridge",
            Self::BridgeJoinFailed { .. } => "bridge-join-failed",
            Self::MtuRefused { .. } => "mtu-refused",
            Self::FormatRefused { .. } => "format-refused",
            Self::QueueAttachFailed { .. } => "queue-attach-failed",
            Self::QueueDetachFailed { .. } => "queue-detach-failed",
            Self::TapClaimed { .. } => "tap-claimed",
            Self::SwitchHostPortExists { .. } => "switch-host-port-exists",
            Self::SwitchFull { .. } => "switch-full",
            Self::SwitchPairOutOfRange { .. } => "switch-pair-out-of-range",
            Self::PollSetupFailed { .. } => "poll-setup-failed",
            Self::Other { code, .. } => code,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the cable is unplugged; plug it in")]
    struct Unplugged;

    #[test]
    fn error_has_its_code_its_text_and_the_kernels_error() {
        let error = UplinkError::TapBusy {
            name: "tap0".into(),
            source: io::ErrorKind::ResourceBusy.into(),
        };
        assert_eq!(error.code(), "tap-busy");
        assert!(error.to_string().starts_with("TAP tap0 is held by"));
        assert!(error.source().is_some());
        let gone = UplinkError::TapGone {
            name: "tap0".into(),
            user: 1000,
            source: None,
        };
        assert!(gone.source().is_none());
        assert_eq!(
            gone.to_string(),
            "TAP tap0 was deleted; make it again with `ip tuntap add dev tap0 mode tap user 1000 multi_queue vnet_hdr`"
        );
    }

    #[test]
    fn error_of_another_uplink_keeps_its_own_code_and_text() {
        let error = UplinkError::Other {
            code: "cable-unplugged",
            source: Box::new(Unplugged),
        };
        assert_eq!(error.code(), "cable-unplugged");
        assert_eq!(error.to_string(), Unplugged.to_string());
    }
}
