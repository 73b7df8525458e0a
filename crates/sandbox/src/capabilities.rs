//! Capabilities belong to a thread (capabilities(7)), so each kind of thread keeps its own.

use std::io;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities,
};

/// Gives up all capabilities of the calling thread but those of `kept` that it has.
///
/// # Errors
/// When the kernel refuses it.
// syscalls: capget capset prctl(PR_CAP_AMBIENT)
pub fn keep_only(kept: CapabilitySet) -> io::Result<()> {
    let now = capabilities(None)?;
    let kept = CapabilitySets {
        effective: now.effective & kept,
        permitted: now.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    if now != kept {
        clear_ambient_capability_set()?;
        set_capabilities(None, kept)?;
    }
    Ok(())
}
