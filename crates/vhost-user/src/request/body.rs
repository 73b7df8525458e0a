//! The parts of a message, and reading them.

use vhost::vhost_user::message::FrontendReq;
use vm_memory::ByteValued;

use crate::error::ProtocolError;
use crate::foreign_fd::ForeignFd;

/// The parts of a message with a known code.
pub(super) struct RequestBody<'p> {
    pub(super) request: FrontendReq,
    pub(super) payload: &'p [u8],
    pub(super) fds: Vec<ForeignFd>,
}

impl RequestBody<'_> {
    pub(super) fn read<T: ByteValued + Default>(&self) -> Result<T, ProtocolError> {
        self.check_size(size_of::<T>())?;
        Ok(from_bytes(self.payload))
    }

    pub(super) fn take_fd(&mut self) -> Result<ForeignFd, ProtocolError> {
        self.fds.pop().ok_or(ProtocolError::FdCount {
            request: self.request,
            got: 0,
            wanted: 1,
        })
    }

    pub(super) fn check_size(&self, wanted: usize) -> Result<(), ProtocolError> {
        if self.payload.len() == wanted {
            return Ok(());
        }
        Err(self.wrong_size(wanted))
    }

    pub(super) fn wrong_size(&self, wanted: usize) -> ProtocolError {
        ProtocolError::Size {
            request: self.request,
            size: self.payload.len(),
            wanted,
        }
    }

    pub(super) fn check_fd_count(&self, wanted: usize) -> Result<(), ProtocolError> {
        if self.fds.len() == wanted {
            return Ok(());
        }
        Err(ProtocolError::FdCount {
            request: self.request,
            got: self.fds.len(),
            wanted,
        })
    }
}

/// Reads a value from bytes of any alignment; `bytes` must have the size of the value.
pub(super) fn from_bytes<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(bytes);
    value
}
