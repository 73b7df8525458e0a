//! Why a device cannot continue.

use virtionet_vhost_user::SessionError;
use virtionet_vhost_user::listen::ListenError;

/// Why a device cannot continue.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFailure {
    /// No front-end can connect any more.
    #[error(transparent)]
    Socket(#[from] ListenError),
    /// The session failed for a reason that another front-end would not change.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl DeviceFailure {
    /// A stable name of the error, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Socket(error) => error.code(),
            Self::Session(error) => error.code(),
        }
    }
}
