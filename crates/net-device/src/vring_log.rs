//! The log lines about one vring. A guest or a front-end can cause each of them at any rate, so each
//! comes at most once a second.

use std::sync::Arc;

use virtionet_base::RateLimiter;
use virtionet_virtio_net::stats::VringStats;

use crate::quarantine::QuarantineCause;

/// The name of a vring, its counters and its log lines.
#[derive(Debug)]
pub struct VringLog {
    name: String,
    stats: Arc<VringStats>,
    quarantines: RateLimiter,
    cut_offs: RateLimiter,
    corrected_bases: RateLimiter,
}

impl VringLog {
    /// The log lines of the vring of this name.
    #[must_use]
    pub fn new(name: String) -> Self {
        Self {
            name,
            stats: Arc::default(),
            quarantines: RateLimiter::new(),
            cut_offs: RateLimiter::new(),
            corrected_bases: RateLimiter::new(),
        }
    }

    /// The vring's counters.
    #[must_use]
    pub fn stats(&self) -> &Arc<VringStats> {
        &self.stats
    }

    /// The vring was quarantined.
    pub(crate) fn quarantined(&self, cause: QuarantineCause) {
        if let Some(suppressed) = self.quarantines.allow() {
            tracing::warn!(
                suppressed,
                "{}: {cause}; it is stopped until the guest's driver starts it again",
                self.name
            );
        }
    }

    /// The call eventfd was cut off.
    pub(crate) fn cut_off(&self) {
        if let Some(suppressed) = self.cut_offs.allow() {
            tracing::warn!(
                suppressed,
                "{}: a write to the call eventfd blocked, because the front-end made it blocking and filled it; the guest gets no interrupts until the front-end sets another one",
                self.name
            );
        }
    }

    /// The vring was started at `corrected` instead of the front-end's `base`.
    pub(crate) fn base_corrected(&self, base: u32, corrected: u32) {
        if let Some(suppressed) = self.corrected_bases.allow() {
            tracing::warn!(
                suppressed,
                "{}: the front-end starts the ring at {base:#x}, but its used index or crash record shows that it has moved on to {corrected:#x}, where it continues",
                self.name
            );
        }
    }
}
