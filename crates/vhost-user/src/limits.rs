//! Limits of the protocol.

use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

/// The largest payload of a message in bytes.
pub const MAX_PAYLOAD: usize = MAX_MSG_SIZE;
/// The largest number of descriptors of a message.
pub const MAX_FDS: usize = MAX_ATTACHED_FD_ENTRIES;
/// The largest number of regions of one SET_MEM_TABLE.
pub const MAX_TABLE_REGIONS: usize = 8;
