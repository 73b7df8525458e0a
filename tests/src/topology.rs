//! The network that every run uses: a namespace for the host side, a TAP in
//! it, and the guest's card on the TAP's other side.

use anyhow::{Context, Result};

use crate::ethtool;
use crate::guest::Guest;
use crate::netns::Netns;

/// The host side's addresses.
pub const HOST: Addresses = Addresses {
    v4: "10.77.0.1",
    v6: "fd77::1",
};
/// The guest's addresses.
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
/// The name of the TAP in the host side's namespace.
pub const TAP: &str = "tap0";
/// The name of the first card in the guest.
pub const CARD: &str = "eth0";

/// The two addresses of one end; the prefixes are /24 and /64.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// IPv4.
    pub v4: &'static str,
    /// IPv6.
    pub v6: &'static str,
}

/// The host side.
#[derive(Debug)]
pub struct HostNetwork {
    netns: Netns,
}

impl HostNetwork {
    /// A namespace without a TAP: for a back-end that makes the TAP itself.
    /// Call [`HostNetwork::configure`] once it is there.
    ///
    /// # Errors
    /// When this process is not root, or the kernel refuses.
    pub fn bare() -> Result<Self> {
        Ok(Self {
            netns: Netns::new()?,
        })
    }

    /// A namespace with a TAP that outlives its users: multiqueue for more
    /// than one queue pair, with virtio-net headers, up and with addresses.
    ///
    /// # Errors
    /// When this process is not root, or the kernel refuses.
    pub fn with_tap(queues: u16) -> Result<Self> {
        let network = Self::bare()?;
        let multi = if queues > 1 { " multi_queue" } else { "" };
        network
            .netns
            .ip(&format!("tuntap add dev {TAP} mode tap vnet_hdr{multi}"))
            .context("a TAP cannot be made: is /dev/net/tun there?")?;
        network.configure()?;
        Ok(network)
    }

    /// Gives the TAP its addresses and sets it up.
    ///
    /// # Errors
    /// When there is none.
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

    /// Pings the guest from the host side until an answer comes, 30 s at most.
    ///
    /// # Errors
    /// When none comes.
    pub fn wait_for_ping(&self, address: &str) -> Result<()> {
        // The host may have no ping of its own; busybox is there for the guest.
        let wait = format!(
            "for i in $(seq 30); do busybox ping -c 1 -W 1 {address} && exit; done; exit 1"
        );
        self.netns
            .run("bash", ["-c", &wait])
            .with_context(|| format!("{address} did not answer"))?;
        Ok(())
    }
}

/// A bridge of the kernel in a namespace of its own, with TAPs as its ports.
#[derive(Debug)]
pub struct Bridge {
    netns: Netns,
}

impl Bridge {
    /// Makes it, with ports of these names: multiqueue for more than one queue
    /// pair, with virtio-net headers, all up and forwarding.
    ///
    /// # Errors
    /// When this process is not root, or the kernel refuses.
    pub fn with_taps(names: &[&str], queues: u16) -> Result<Self> {
        let netns = Netns::new()?;
        // Its ports would listen for 15 s first, and its groups want a querier.
        netns
            .ip("link add br0 type bridge forward_delay 0 mcast_snooping 0")
            .context("a bridge cannot be made")?;
        let multi = if queues > 1 { " multi_queue" } else { "" };
        for name in names {
            netns
                .ip(&format!("tuntap add dev {name} mode tap vnet_hdr{multi}"))
                .context("a TAP cannot be made: is /dev/net/tun there?")?;
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

/// Sets the guest's card up with its addresses and `queues` pairs in use.
///
/// # Errors
/// When the card is missing: with the guest's words.
pub fn configure_guest(guest: &Guest, queues: u16) -> Result<()> {
    configure_interface(guest, GUEST, queues)
}

/// The same with other addresses.
///
/// # Errors
/// When the card is missing: with the guest's words.
pub fn configure_interface(guest: &Guest, addresses: Addresses, queues: u16) -> Result<()> {
    let Addresses { v4, v6 } = addresses;
    // No duplicate detection: an address counts at once.
    guest.ok(&format!(
        "echo 0 >/proc/sys/net/ipv6/conf/{CARD}/accept_dad && ip addr replace {v4}/24 dev {CARD} && ip -6 addr replace {v6}/64 dev {CARD} && ip link set {CARD} up"
    ))?;
    ethtool::set_combined(guest, CARD, queues.into())
}
