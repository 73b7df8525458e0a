//! The removal of a device while others work.

use std::time::{Duration, Instant};

use super::{NetDevice, ServedPair};

/// The pause between two looks at the transmitqs.
const DRAIN_INTERVAL: Duration = Duration::from_millis(1);

impl NetDevice {
    /// Waits until the guest's frames in the transmitqs have been sent, for at most `limit`. A guest
    /// that goes on sending fills them again. Returns whether they were empty.
    pub fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.pairs().any(|served| served.pair.tx().has_available()) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(DRAIN_INTERVAL);
        }
        true
    }

    /// Leaves the workers, which serve nothing of this device any more, because its thread has ended.
    pub fn leave_workers(&self) {
        for ServedPair {
            worker, position, ..
        } in self.pairs()
        {
            self.pool.remove_pair(worker, *position);
        }
    }
}
