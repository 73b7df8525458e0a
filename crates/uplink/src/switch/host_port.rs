//! The host's port: a TAP that is a port of the switch.
//!
//! A frame for the host is written by the worker of the queue pair that sent it, with one system
//! call. Frames from the host need a thread of their own: `host_forwarder.rs`.

use std::sync::Arc;

use parking_lot::Mutex;
use virtionet_virtio_net::header::FrameFormat;
use virtionet_virtio_net::stats::VringStats;
use virtionet_virtio_net::uplink::{
    TxFrame, Uplink, UplinkChange, UplinkError, UplinkQueue, null_rx_sink,
};

use crate::tap::{Tap, TapConfig};

/// A TAP that is a port of the switch.
#[derive(Debug)]
pub(super) struct HostPort {
    /// The name of the TAP and its bridge.
    pub(super) config: TapConfig,
    /// The only queue of the TAP that is in use.
    pub(super) queue: Arc<dyn UplinkQueue>,
    tap: Arc<Tap>,
    /// Held while the MTU is set, so that the last device to change its own sees all others.
    mtu_order: Mutex<()>,
}

impl HostPort {
    pub(super) fn new(config: &TapConfig, tap: Arc<Tap>) -> Result<Self, UplinkError> {
        let queue = tap.open_queue(0, null_rx_sink())?;
        // The switch performs the offloads that a receiving guest did not negotiate.
        tap.set_format(FrameFormat::ALL)?;
        queue.set_attached(true)?;
        Ok(Self {
            config: config.clone(),
            queue,
            tap,
            mtu_order: Mutex::new(()),
        })
    }

    /// Sets the TAP to the `largest` MTU of all devices, for a device that has `own`.
    pub(super) fn follow_mtu(
        &self,
        own: u16,
        largest: impl FnOnce() -> u16,
    ) -> Result<(), UplinkError> {
        let _order = self.mtu_order.lock();
        match self.tap.set_mtu(largest()) {
            // Another device's MTU is refused; this one's is small enough.
            Err(UplinkError::MtuRefused { mtu, .. }) if mtu >= u32::from(own) => Ok(()),
            result => result,
        }
    }

    /// Opens the TAP again after it was deleted, or reports why it carries no frames.
    pub(super) fn refresh(&self) -> Result<UplinkChange, UplinkError> {
        self.tap.refresh()
    }

    /// Writes one frame. Returns false where the host does not accept it, which is counted in
    /// `stats`.
    pub(super) fn send(&self, frame: &TxFrame<'_>, stats: &VringStats) -> bool {
        // The caller decides whether the frame counts as carried: this may be one of several
        // copies.
        let local_stats = VringStats::default();
        self.queue
            .transmit(std::slice::from_ref(frame), &local_stats);
        for (counter, local) in [
            (&stats.dropped_uplink_full, &local_stats.dropped_uplink_full),
            (
                &stats.dropped_uplink_error,
                &local_stats.dropped_uplink_error,
            ),
            (&stats.dropped_uplink_down, &local_stats.dropped_uplink_down),
        ] {
            counter.add(local.get());
        }
        local_stats.frames.get() == 1
    }
}
