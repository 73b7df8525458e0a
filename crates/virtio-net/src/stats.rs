//! Counters: one block a ring, one writer, relaxed atomics, read by anybody at any time.
//!
//! Every way in which a frame can be lost and every rule a guest can break has a counter of its
//! own here; the list below is the one place that names them.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer (the thread that holds the ring's lock) and any number of readers.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. A load and a store: with one writer no locked instruction is needed.
    #[inline(always)]
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// The count so far.
    #[inline(always)]
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A length or number of things as counters hold it; usize fits u64 on every machine that Linux
/// runs on.
#[inline(always)]
#[must_use]
pub fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

macro_rules! counters {
    ($(#[$doc:meta])* pub struct $name:ident { $($field:ident: $help:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct $name {
            $(#[doc = $help] pub $field: Counter,)*
        }

        impl $name {
            /// Name and meaning of every counter, in the order of [`Self::values`].
            pub const NAMES: &'static [(&'static str, &'static str)] =
                &[$((stringify!($field), $help),)*];

            /// Every counter's value now, in the order of [`Self::NAMES`].
            #[must_use]
            pub fn values(&self) -> Vec<u64> {
                vec![$(self.$field.get(),)*]
            }
        }
    };
}

counters! {
    /// What one ring did and what it refused. Aligned so that no two rings share a cache line
    /// (128 bytes: CPUs fetch lines in pairs).
    pub struct VringStats {
        frames: "Frames carried (TX: taken from the guest and handed to the uplink; RX: put into guest buffers).",
        bytes: "Bytes of those frames, without the virtio-net header.",
        bursts: "Bursts that found frames.",
        kicks: "Wake-ups by the driver's kick.",
        calls: "Interrupts asked of the driver's side (call eventfd written).",
        calls_failed: "Call eventfd writes that failed.",
        dropped_disabled: "Frames discarded because the ring was disabled: TX (a disabled TX ring drains), or pushed to an RX ring that was disabled or stopped.",
        dropped_uplink_full: "Frames the uplink had no room for (ENOBUFS, EAGAIN).",
        dropped_uplink_error: "Frames the uplink refused with an error (EIO, EINVAL, ...).",
        dropped_uplink_down: "Frames lost because the uplink was gone or down (EBADFD, ENETDOWN, EIO on a TAP that is down).",
        dropped_no_port: "TX frames that no port of the switch was there to take.",
        dropped_over_budget: "Copies of a frame that were not made, because the frame's burst had cost too much by then (floods, offloads in software).",
        dropped_no_buffer: "RX frames lost because the guest had too few buffers, and no reason to add any.",
        dropped_too_long: "RX frames longer than any that the guest takes.",
        rx_starved: "Times the uplink had frames and the guest no RX buffers; the frames wait in the uplink.",
        header_missing: "TX chains with no room for a virtio-net header.",
        frame_too_short: "TX frames under 14 bytes (no Ethernet header).",
        frame_too_long: "TX frames over 65,562 bytes.",
        gso_unknown: "TX headers with a gso_type that does not exist.",
        gso_not_negotiated: "TX headers with a GSO type that was not negotiated.",
        gso_size_zero: "TX headers that ask for GSO with gso_size 0.",
        gso_without_csum: "TX headers that ask for GSO without NEEDS_CSUM.",
        csum_not_negotiated: "TX headers that ask for a checksum without VIRTIO_NET_F_CSUM.",
        csum_out_of_frame: "TX headers with csum_start + csum_offset + 2 beyond the frame.",
        hdr_len_out_of_frame: "TX headers with hdr_len beyond the frame.",
        offload_invalid: "Frames whose offload request does not match their content.",
        rx_buffer_too_small: "RX chains too small to hold a virtio-net header, or any frame without mergeable buffers.",
        chain_loop: "Chains longer than the ring (a loop).",
        chain_too_long: "Chains of more than 1,024 pieces.",
        chain_too_big: "Chains of more than 2^32 - 1 bytes.",
        chain_next_out_of_range: "Chains whose next descriptor is outside the ring or table.",
        address_invalid: "Chains with an address outside guest memory.",
        direction_wrong: "Chains with a writable descriptor on TX or a readable one on RX.",
        indirect_nested: "Indirect descriptors inside an indirect table.",
        indirect_with_next: "Descriptors with both INDIRECT and NEXT.",
        indirect_bad_length: "Indirect tables of length 0 or not a multiple of 16, or longer than 65,535 entries.",
        indirect_unmapped: "Indirect tables outside guest memory.",
        indirect_not_negotiated: "Indirect descriptors without VIRTIO_F_INDIRECT_DESC.",
        head_out_of_range: "Rings quarantined for an available head outside the ring.",
        avail_index_jump: "Rings quarantined for an available index ahead by more than the ring's size.",
        chain_without_end: "Rings quarantined for a packed chain that goes on through the whole ring.",
        quarantines: "Times the ring was stopped for a fault until configured anew.",
    }
}

counters! {
    /// What one worker did.
    pub struct WorkerStats {
        wakeups: "Returns from epoll_wait with an event.",
        sleeps: "Times it went to sleep.",
        busy_cycles: "Time-stamp counter cycles of the turns that found frames.",
        busy_frames: "Frames that those turns found.",
        polls: "Empty looks at the rings while polling.",
        busy_polls: "Looks at the rings while polling that found frames.",
        over_budget: "Wake-ups that used their whole budget and went on in the next.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_stand_in_the_same_order() {
        let stats = VringStats::default();
        stats.quarantines.add(7);
        let at = VringStats::NAMES
            .iter()
            .position(|(name, _)| *name == "quarantines")
            .unwrap();
        assert_eq!(stats.values()[at], 7);
        assert_eq!(stats.values().len(), VringStats::NAMES.len());
    }
}
