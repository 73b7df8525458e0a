//! Counters: one block for each vring.
//!
//! Every rule that a guest can break has a counter of its own, and no frame is dropped without one;
//! related causes of a drop share a counter. The lists below are the only place that names them.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with any number of readers. It has one writer, the thread that holds the ring's lock
/// ([`Counter::add`]), or else any number ([`Counter::add_shared`]); never both.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n` with a load and a store: with one writer no locked instruction is needed.
    #[inline(always)]
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// Adds `n` to a counter that several threads write, because they do not hold the ring's lock.
    #[inline(always)]
    pub fn add_shared(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    #[inline(always)]
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A length or a count in the type of the counters. A `usize` fits on every machine that Linux runs
/// on.
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
            /// The name and the meaning of every counter, in the order of [`Self::values`].
            pub const NAMES: &'static [(&'static str, &'static str)] =
                &[$((stringify!($field), $help),)*];

            /// The present value of every counter, in the order of [`Self::NAMES`].
            #[must_use]
            pub fn values(&self) -> Vec<u64> {
                vec![$(self.$field.get(),)*]
            }

            /// Adds `n` to the counter of this name, if there is one. Nothing else may write the
            /// counters meanwhile.
            pub fn add_to(&self, name: &str, n: u64) {
                match name {
                    $(stringify!($field) => self.$field.add(n),)*
                    _ => {}
                }
            }
        }
    };
}

counters! {
    /// The counters of one vring. They are aligned so that no two vrings share a pair of cache
    /// lines, which CPUs fetch together.
    pub struct VringStats {
        frames: "Frames carried (TX: transmitted to the uplink; RX: written to the guest's buffers).",
        bytes: "Bytes of those frames, without the virtio-net header.",
        bursts: "Bursts with at least one frame.",
        kicks: "Wake-ups by a kick of the driver.",
        calls: "Interrupts of the guest (writes to the call eventfd).",
        calls_failed: "Interrupts of the guest that failed, or were not tried because the call eventfd is cut off.",
        calls_cut_off: "Call eventfds that were cut off because a write to them blocked.",
        dropped_disabled: "Frames dropped because the ring was disabled (TX), or disabled or stopped when a switch pushed them (RX).",
        dropped_uplink_full: "Frames dropped because the uplink was full (ENOBUFS, EAGAIN).",
        dropped_uplink_error: "Frames dropped because of another error of the uplink (EINVAL, EFAULT, ...).",
        dropped_uplink_down: "Frames dropped because the uplink was deleted or down (EBADFD, ENETDOWN, EIO).",
        dropped_no_port: "TX frames dropped because the switch had no other port for them.",
        dropped_reserved_group: "TX frames to a reserved group address (01:80:C2:00:00:00 to -0F: spanning tree, LACP, PAUSE), which a switch does not forward.",
        dropped_over_budget: "Copies of frames that the switch did not make because their burst had used up its copy budget (floods, offloads in software).",
        dropped_no_buffer: "RX frames dropped because the guest had too few buffers.",
        dropped_untranslated: "RX frames dropped because the front-end had not sent the translation of the guest's ring or buffers yet when a switch pushed them (VIRTIO_F_ACCESS_PLATFORM).",
        dropped_postcopy: "RX frames dropped because they came, from a switch, faster than the guest's memory arrived after a migration by postcopy, or because the ring stopped meanwhile.",
        dropped_too_long: "RX frames dropped because they were longer than the guest's buffers allow.",
        dropped_at_start: "Chains that were given back unprocessed when the ring was started, because the front-end itself had used later ones since the last back-end was lost (a packed ring whose guest transmits while QEMU waits for the next one).",
        rx_starved: "Times that the guest had no RX buffers for frames that wait in the uplink.",
        iotlb_misses: "Turns that ended at an address whose translation the front-end had not sent yet.",
        iotlb_invalidations: "Times that the ring dropped its translations because the front-end invalidated some.",
        header_missing: "TX chains shorter than a virtio-net header.",
        frame_too_short: "TX frames under 14 bytes (no Ethernet header).",
        frame_too_long: "TX frames over 65,557 bytes (64 KiB of IP behind two VLAN tags).",
        gso_unknown: "TX headers with a gso_type that does not exist.",
        gso_not_negotiated: "TX headers with a GSO type that was not negotiated.",
        gso_size_zero: "TX headers that request GSO with gso_size 0.",
        gso_without_csum: "TX headers that request GSO without NEEDS_CSUM.",
        csum_not_negotiated: "TX headers that request a checksum without VIRTIO_NET_F_CSUM.",
        csum_out_of_frame: "TX headers with csum_start + csum_offset + 2 beyond the frame.",
        hdr_len_out_of_frame: "TX headers with hdr_len beyond the frame.",
        offload_invalid: "TX frames whose offload request does not match their content.",
        rx_buffer_too_small: "RX chains too small to hold a virtio-net header, or any frame without mergeable buffers.",
        chain_loop: "Chains longer than the ring (a loop).",
        chain_too_long: "Chains of more than 1,024 segments.",
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
        chain_without_end: "Rings quarantined for a packed chain that spans the whole ring without an end.",
        base_corrected: "Starts at the ring's used index, or in a packed ring at the position of its crash record, because the front-end's base (SET_VRING_BASE) was another.",
        base_implausible: "Starts of a packed ring at a base that its descriptors contradict, with no crash record: the ring does not continue.",
        memory_lost: "Rings quarantined because pages of the guest's memory have vanished (its file shrank, its file system is full, or the front-end disconnected during a migration by postcopy).",
        log_lost: "Rings quarantined because the log of written pages has vanished during a migration (its file shrank, or its file system is full).",
        panics: "Rings quarantined for a panic in their code, each a bug of virtionetd.",
        quarantines: "Times that the ring was stopped for a fault until it is configured again.",
    }
}

counters! {
    /// The counters of one worker.
    pub struct WorkerStats {
        wakeups: "Returns from epoll_wait with an event.",
        sleeps: "Times that the worker went to sleep.",
        busy_cycles: "Time-stamp counter cycles of the iterations that found frames.",
        busy_frames: "Frames that those iterations found.",
        polls: "Poll misses: polls of the rings that found no frame.",
        busy_polls: "Poll hits: polls of the rings that found frames.",
        over_budget: "Passes that found frames and left work to the next pass.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_have_the_same_order() {
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
