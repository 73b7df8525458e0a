//! The network of a test: a namespace for the host, a TAP in it, and the guest's interface at the
//! other end of the TAP.

use anyhow::{Context, Result};

use crate::ethtool;
use crate::guest::Guest;
use crate::netns::Netns;

/// The addresses of the host.
pub const HOST: Addresses = Addresses {
    v4: "10.77.0.1",
    v6: "fd77::1",
};
/// The addresses of the guest.
pub const GUEST: Addresses = Addresses {
    v4: "10.77.0.2",
    v6: "fd77::2",
};
/// The addresses of two guests on one network.
pub const GUESTS: [Addresses; 2] = [
    Addresses {
        v4: "10.77.0.11",
        v6: "fd77::11",
    },
    Addresses {
        v4: "10.77.0.12",
        v6: "fd77::12",
    },
];
/// The name of the TAP in the host's namespace.
pub const TAP: &str = "tap0";
/// The name of the first network interface in the guest.
pub const GUEST_INTERFACE: &str = "eth0";

/// The IPv4 and the IPv6 address of one interface. The prefix lengths are 24 and 64.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// The IPv4 address.
    pub v4: &'static str,
    /// The IPv6 address.
    pub v6: &'static str,
}

/// The host's network, in a namespace of its own.
#[derive(Debug)]
pub struct HostNetwork {
    netns: Netns,
}

impl HostNetwork {
    /// Creates a namespace without a TAP, for a back-end that creates the TAP. Call
    /// [`HostNetwork::configure`] when the TAP exists.
    ///
    /// # Errors
    /// When this process is not root, or the namespace cannot be created.
    pub fn bare() -> Result<Self> {
        Ok(Self {
            netns: Netns::new()?,
        })
    }

    /// Creates a namespace with a persistent TAP, which has virtio-net headers, is up and has its
    /// addresses. The TAP is a multiqueue TAP if `queues`, the number of queue pairs, is more than
    /// 1.
    ///
    /// # Errors
    /// When this process is not root, or the namespace or the TAP cannot be created.
    pub fn with_tap(queues: u16) -> Result<Self> {
        let network = Self::bare()?;
        let multi = if queues > 1 { " multi_queue" } else { "" };
        network
            .netns
            .ip(&format!("tuntap add dev {TAP} mode tap vnet_hdr{multi}"))
            .context("the TAP cannot be created: check that /dev/net/tun exists")?;
        network.configure()?;
        Ok(network)
    }

    /// Adds the host's addresses to the TAP and sets it up.
    ///
    /// # Errors
    /// When the TAP does not exist.
    pub fn configure(&self) -> Result<()> {
        let Addresses { v4, v6 } = HOST;
        self.netns.ip(&format!("addr replace {v4}/24 dev {TAP}"))?;
        self.netns
            .ip(&format!("addr replace {v6}/64 dev {TAP} nodad"))?;
        self.netns.ip(&format!("link set {TAP} up"))?;
        Ok(())
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Pings `address` from the host until an answer arrives, for at most 30 s.
    ///
    /// # Errors
    /// When no answer arrives.
    pub fn wait_for_ping(&self, address: &str) -> Result<()> {
        // ping may not be installed on the host, but busybox is, because the guest image needs it.
        let wait = format!(
            "for i in $(seq 30); do busybox ping -c 1 -W 1 {address} && exit; done; exit 1"
        );
        self.netns
            .run("bash", ["-c", &wait])
            .with_context(|| format!("{address} did not answer"))?;
        Ok(())
    }
}

/// A kernel bridge in a namespace of its own, whose ports are TAPs.
#[derive(Debug)]
pub struct Bridge {
    netns: Netns,
}

impl Bridge {
    /// Creates a bridge and TAPs with these names, which have virtio-net headers and are up. The
    /// TAPs are multiqueue TAPs if `queues`, the number of queue pairs, is more than 1.
    ///
    /// # Errors
    /// When this process is not root, or the namespace, the bridge or a TAP cannot be created.
    pub fn with_taps(names: &[&str], queues: u16) -> Result<Self> {
        let netns = Netns::new()?;
        // By default, a port does not forward in its first 15 s, and multicast snooping drops
        // frames to groups if the network has no querier.
        netns
            .ip("link add br0 type bridge forward_delay 0 mcast_snooping 0")
            .context("the bridge cannot be created")?;
        let multi = if queues > 1 { " multi_queue" } else { "" };
        for name in names {
            netns
                .ip(&format!("tuntap add dev {name} mode tap vnet_hdr{multi}"))
                .context("the TAP cannot be created: check that /dev/net/tun exists")?;
            netns.ip(&format!("link set dev {name} master br0 up"))?;
        }
        netns.ip("link set br0 up")?;
        Ok(Self { netns })
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }
}

/// Sets the guest's interface up with the addresses [`GUEST`] and `queues` queue pairs in use.
///
/// # Errors
/// When the interface does not exist. The error contains the guest's output.
pub fn configure_guest(guest: &Guest, queues: u16) -> Result<()> {
    configure_interface(guest, GUEST, queues)
}

/// Does the same as [`configure_guest`] with these addresses.
///
/// # Errors
/// When the interface does not exist. The error contains the guest's output.
pub fn configure_interface(guest: &Guest, addresses: Addresses, queues: u16) -> Result<()> {
    let Addresses { v4, v6 } = addresses;
    // Without duplicate address detection, the IPv6 address can be used immediately.
    guest.ok(&format!(
        "echo 0 >/proc/sys/net/ipv6/conf/{GUEST_INTERFACE}/accept_dad && ip addr replace {v4}/24 dev {GUEST_INTERFACE} && ip -6 addr replace {v6}/64 dev {GUEST_INTERFACE} && ip link set {GUEST_INTERFACE} up"
    ))?;
    ethtool::set_combined(guest, GUEST_INTERFACE, queues.into())
}
