//! A network device of the guest: its back-end, and the arguments that configure it in QEMU.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::qemu_version::version;

/// A network device of the guest.
#[derive(Clone, Debug)]
pub struct Nic {
    backend: Backend,
    queues: u16,
    props: Vec<String>,
}

#[derive(Clone, Debug)]
enum Backend {
    VhostUser {
        socket: PathBuf,
        is_qemu_listening: bool,
        reconnect_ms: Option<u32>,
    },
    Tap {
        ifname: String,
    },
}

impl Nic {
    /// Creates a device that a vhost-user back-end serves on `socket`. QEMU connects to the socket.
    pub fn vhost_user(socket: &Path) -> Self {
        Self::new(Backend::VhostUser {
            socket: socket.to_owned(),
            is_qemu_listening: false,
            reconnect_ms: None,
        })
    }

    /// Does the same, but QEMU listens on the socket and waits for the back-end.
    pub fn vhost_user_listen(socket: &Path) -> Self {
        Self::new(Backend::VhostUser {
            socket: socket.to_owned(),
            is_qemu_listening: true,
            reconnect_ms: None,
        })
    }

    /// Creates a device that QEMU serves itself, without vhost, on the TAP `ifname`. The machine
    /// must run in the TAP's namespace ([`crate::qemu::Machine::netns`]).
    pub fn tap(ifname: &str) -> Self {
        Self::new(Backend::Tap {
            ifname: ifname.to_owned(),
        })
    }

    fn new(backend: Backend) -> Self {
        Self {
            backend,
            queues: 1,
            props: Vec::new(),
        }
    }

    /// Sets the number of queue pairs.
    #[must_use]
    pub fn queues(mut self, pairs: u16) -> Self {
        self.queues = pairs;
        self
    }

    /// Makes QEMU reconnect `ms` milliseconds after a disconnection. A QEMU before 9.2 rounds this
    /// up to seconds. Has an effect only if QEMU connects to the back-end.
    #[must_use]
    pub fn reconnect_ms(mut self, ms: u32) -> Self {
        if let Backend::VhostUser { reconnect_ms, .. } = &mut self.backend {
            *reconnect_ms = Some(ms);
        }
        self
    }

    /// Adds a property of the device, such as `packed=on`, `host_mtu=9000`, `rx_queue_size=1024` or
    /// `mac=52:54:00:00:00:01`.
    #[must_use]
    pub fn prop(mut self, prop: &str) -> Self {
        self.props.push(prop.to_owned());
        self
    }

    /// Returns QEMU's arguments for this device, which is the n-th device of its machine.
    pub(crate) fn args(&self, n: usize) -> Result<Vec<String>> {
        let queues = self.queues;
        let mut args = Vec::new();
        match &self.backend {
            Backend::VhostUser {
                socket,
                is_qemu_listening,
                reconnect_ms,
            } => {
                let mut chardev = format!("socket,id=net{n}c,path={}", socket.display());
                if *is_qemu_listening {
                    chardev.push_str(",server=on");
                }
                if let Some(ms) = reconnect_ms {
                    chardev.push_str(&reconnect_property(*ms)?);
                }
                let netdev = format!("vhost-user,id=net{n},chardev=net{n}c,queues={queues}");
                args.extend(["-chardev".into(), chardev, "-netdev".into(), netdev]);
            }
            Backend::Tap { ifname } => {
                let netdev = format!(
                    "tap,id=net{n},ifname={ifname},script=no,downscript=no,vhost=off,queues={queues}"
                );
                args.extend(["-netdev".into(), netdev]);
            }
        }
        // One vector for each vring, one for the control queue, and one for configuration changes.
        let vectors = 2 * u32::from(queues) + 2;
        let mut device = format!("virtio-net-pci,netdev=net{n},romfile=,vectors={vectors}");
        if queues > 1 {
            device.push_str(",mq=on");
        }
        for prop in &self.props {
            device.push(',');
            device.push_str(prop);
        }
        args.extend(["-device".into(), device]);
        Ok(args)
    }
}

/// Returns the chardev property that makes QEMU reconnect.
fn reconnect_property(ms: u32) -> Result<String> {
    let version = version()?;
    let mut numbers = version.split('.').map(|part| part.parse().unwrap_or(0));
    let number: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    Ok(if number >= (9, 2) {
        format!(",reconnect-ms={ms}")
    } else {
        format!(",reconnect={}", ms.div_ceil(1000).max(1))
    })
}
