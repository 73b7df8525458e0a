//! The protocol's limits.

use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

/// Largest number of bytes of a message's payload.
pub const MAX_PAYLOAD: usize = MAX_MSG_SIZE;
/// Largest number of descriptors of a message.
pub const MAX_FDS: usize = MAX_ATTACHED_FD_ENTRIES;
/// Largest number of regions of one SET_MEM_TABLE.
pub const MAX_TABLE_REGIONS: usize = 8;
