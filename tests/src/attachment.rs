//! The ways in which a guest is attached in tests of what happens to its daemon.

use crate::testbed::TestbedConfig;
use crate::topology::TAP;

/// How a guest is attached.
#[derive(Clone, Copy, Debug)]
pub struct Attachment {
    /// Its virtqueues are packed; else they are split.
    pub is_packed: bool,
    /// QEMU listens, and the daemon connects to it.
    pub is_client: bool,
    /// The TAP is a port of a switch; else it is the device's uplink.
    pub is_on_switch: bool,
}

impl Attachment {
    /// Split virtqueues, the daemon listens.
    pub const SPLIT_ON_TAP: Self = Self {
        is_packed: false,
        is_client: false,
        is_on_switch: false,
    };
    /// Packed virtqueues, QEMU listens.
    pub const PACKED_ON_TAP: Self = Self {
        is_packed: true,
        is_client: true,
        is_on_switch: false,
    };
    /// Split virtqueues, QEMU listens.
    pub const SPLIT_ON_SWITCH: Self = Self {
        is_packed: false,
        is_client: true,
        is_on_switch: true,
    };
    /// Packed virtqueues, the daemon listens.
    pub const PACKED_ON_SWITCH: Self = Self {
        is_packed: true,
        is_client: false,
        is_on_switch: true,
    };

    /// The configuration of a testbed with `pairs` queue pairs.
    pub fn config(self, pairs: u16) -> TestbedConfig {
        let mut config = TestbedConfig::new(pairs);
        if self.is_packed {
            config = config.prop("packed=on");
        }
        if self.is_client {
            config = config.qemu_listens();
        }
        match self.is_on_switch {
            true => config.uplink(&format!("switch:s,tap={TAP}")),
            false => config,
        }
    }
}
