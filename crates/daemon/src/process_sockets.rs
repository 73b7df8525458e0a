//! The listening sockets of the process itself: the control socket, and the one at which the next
//! daemon takes over.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use rustix::process::geteuid;
use virtionet_base::unix_socket::{self, SocketFile, listen_at};
use virtionet_config::{Config, ControlSocket};
use virtionet_control::server::{Access, ControlServer, ServedSocket, SocketPermissions, listen};
use virtionet_handover::{ListenerImage, SharedFd};
use virtionet_process::sandbox;
use virtionet_sandbox::ThreadKind;

use crate::handover::Successor;
use crate::report_builder::DeviceRegistry;
use crate::run_error::RunError;
use crate::take_over::{TakenListener, TakenSockets};

/// A socket that listens, and its file.
type ListeningSocket = (UnixListener, SocketFile);

/// The listening sockets of the process.
#[derive(Debug, Default)]
pub struct ProcessSockets {
    control: Option<ListeningSocket>,
    control_read_only: Option<ListeningSocket>,
    handover: Option<ListeningSocket>,
}

/// What serves them, and removes their files when it is dropped.
#[derive(Debug)]
pub struct ServedSockets {
    /// The control server.
    pub control: Option<ControlServer>,
    /// The file of the socket for the next daemon.
    pub handover: Option<SocketFile>,
}

impl ProcessSockets {
    /// Makes the sockets of `config`.
    ///
    /// # Errors
    /// When a path is in use, or cannot be listened on.
    pub fn open(config: &Config) -> Result<Self, RunError> {
        let open_control = |socket: &ControlSocket| {
            let access = SocketPermissions {
                mode: Some(socket.mode),
                group: socket.group.clone(),
            };
            listen(&socket.path, &access)
        };
        let owner_only = unix_socket::Access {
            mode: Some(0o600),
            group: None,
        };
        let handover = config.handover.as_ref();
        Ok(Self {
            control: config.control.as_ref().map(open_control).transpose()?,
            control_read_only: config
                .control_read_only
                .as_ref()
                .map(open_control)
                .transpose()?,
            handover: handover
                .map(|path| listen_at(path, &owner_only))
                .transpose()
                .map_err(RunError::HandoverSocket)?,
        })
    }

    /// The sockets of the daemon before this one.
    #[must_use]
    pub fn taken(config: &Config, taken: TakenSockets) -> Self {
        let at = |socket: &Option<ControlSocket>, listener: Option<TakenListener>| {
            let socket = socket.as_ref().zip(listener);
            socket.map(|(socket, listener)| listener.at(&socket.path))
        };
        Self {
            control: at(&config.control, taken.control),
            control_read_only: at(&config.control_read_only, taken.control_read_only),
            handover: config.handover.as_ref().map(|path| taken.handover.at(path)),
        }
    }

    /// The path of the socket at which the next daemon can take over.
    #[must_use]
    pub fn handover_path(&self) -> Option<&Path> {
        self.handover.as_ref().map(|(_, file)| file.path())
    }

    /// The images of the control socket, of the one that takes no changes, and of the one for the next
    /// daemon.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn images(&self) -> io::Result<[Option<ListenerImage<SharedFd>>; 3]> {
        Ok([
            self.control.as_ref().map(image_of).transpose()?,
            self.control_read_only.as_ref().map(image_of).transpose()?,
            self.handover.as_ref().map(image_of).transpose()?,
        ])
    }

    /// Serves them. `successor` gets the next daemon's connection.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn serve(
        self,
        devices: &Arc<DeviceRegistry>,
        successor: &Successor,
    ) -> Result<ServedSockets, RunError> {
        let access = Access::Change {
            uid: geteuid().as_raw(),
        };
        let sockets = [
            (self.control, access),
            (self.control_read_only, Access::ReadOnly),
        ];
        let sockets = sockets.into_iter().filter_map(|(socket, access)| {
            let (listener, file) = socket?;
            Some(ServedSocket {
                listener,
                file,
                access,
            })
        });
        let sockets: Vec<ServedSocket> = sockets.collect();
        let handover = match self.handover {
            Some((listener, file)) => {
                successor
                    .listen(listener)
                    .map_err(|source| RunError::Host {
                        operation: "start a thread",
                        source,
                    })?;
                Some(file)
            }
            None => None,
        };
        Ok(ServedSockets {
            control: match sockets.is_empty() {
                true => None,
                false => Some(ControlServer::start_on(
                    sockets,
                    Arc::clone(devices) as _,
                    || sandbox::confine_thread(ThreadKind::Control),
                )?),
            },
            handover,
        })
    }
}

fn image_of((listener, file): &ListeningSocket) -> io::Result<ListenerImage<SharedFd>> {
    let identity = file.identity();
    Ok(ListenerImage {
        socket: Arc::new(listener.as_fd().try_clone_to_owned()?),
        file: Some((identity.device, identity.inode)),
    })
}
