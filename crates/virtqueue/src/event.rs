//! Event suppression: the comparison that both formats share.

/// Whether moving an index from `old` to `new` passes `event`, so that the driver or device that
/// wrote `event` must be notified (virtio 1.3 §2.7.7.2 and §2.8.10). All three are 16-bit indices
/// that wrap.
#[inline(always)]
pub(crate) fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
