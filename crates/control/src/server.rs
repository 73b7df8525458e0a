//! The control server: HTTP/1.1 on a unix socket.
//!
//! `GET /v1/devices` answers with the [`Report`](crate::v1::Report) in JSON, and `GET /metrics` with
//! the same report for Prometheus: `curl --unix-socket PATH http://localhost/v1/devices`. `routes`
//! has the other requests, and `listener` what bounds the clients.
//!
//! The server has a thread of its own, named `control`, so that its clients do not delay the
//! workers.

mod listener;
mod routes;

use std::io;
use std::os::unix::net;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, watch};
pub use virtionet_base::unix_socket::Access as SocketPermissions;
use virtionet_base::unix_socket::{SocketFile, UnixSocketError, listen_at};

use crate::v1::ReportSource;
pub use listener::MAX_CONNECTIONS;
use listener::{BoundedListener, Client};
pub use routes::Access;

/// The longest time that requests in progress may take after the server is stopped.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(200);

/// A socket of the server.
#[derive(Debug)]
pub struct ServedSocket {
    /// The socket, which listens.
    pub listener: net::UnixListener,
    /// Its file.
    pub file: SocketFile,
    /// Whether it takes changes.
    pub access: Access,
}

/// A running control server. Dropping it stops it, as [`Self::stop`] does.
#[derive(Debug)]
pub struct ControlServer {
    sockets: Vec<SocketFile>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Creates the socket at `path` with the mode and group of `permissions`, and starts a thread that
    /// answers requests, once it has called `on_start`. A socket that no process listens on is
    /// replaced. The thread inherits the caller's signal mask.
    ///
    /// # Errors
    /// When another process listens on `path`, or when the socket or the thread cannot be created.
    pub fn start(
        path: &Path,
        permissions: &SocketPermissions,
        access: Access,
        source: Arc<dyn ReportSource>,
        on_start: impl FnOnce() + Send + 'static,
    ) -> Result<Self, ControlError> {
        let (listener, file) = listen(path, permissions)?;
        let sockets = vec![ServedSocket {
            listener,
            file,
            access,
        }];
        Self::start_on(sockets, source, on_start)
    }

    /// Does so with sockets that listen already.
    ///
    /// # Errors
    /// When the thread cannot be created.
    pub fn start_on(
        sockets: Vec<ServedSocket>,
        source: Arc<dyn ReportSource>,
        on_start: impl FnOnce() + Send + 'static,
    ) -> Result<Self, ControlError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ControlError::Thread)?;
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (mut files, mut served) = (Vec::new(), Vec::new());
        for socket in sockets {
            // The listener registers with the runtime that polls it.
            let listener = runtime
                .block_on(async { UnixListener::from_std(socket.listener) })
                .map_err(ControlError::Thread)?;
            files.push(socket.file);
            let listener = BoundedListener::new(listener, Arc::clone(&connections));
            served.push((listener, routes::routes(Arc::clone(&source), socket.access)));
        }
        let (stop, stopped) = watch::channel(false);
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                on_start();
                serve(&runtime, served, stopped);
            })
            .map_err(ControlError::Thread)?;
        Ok(Self {
            sockets: files,
            stop,
            thread: Some(thread),
        })
    }

    /// The path of the first socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.sockets.first().map_or(Path::new(""), SocketFile::path)
    }

    /// Waits for requests in progress for a short time, ends the thread and removes the sockets.
    pub fn stop(self) {}
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control server has ended unexpectedly: report this as a bug");
        }
    }
}

/// Why the control server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another process listens on the socket, whose path the variant holds.
    #[error(
        "control socket {} is in use by another process: choose another path for --control",
        .0.display()
    )]
    InUse(PathBuf),
    /// The path, which the variant holds, exists and is not a socket.
    #[error(
        "{} is in the way of the control socket and is no socket: remove it or choose another path \
         for --control",
        .0.display()
    )]
    NotSocket(PathBuf),
    /// The kernel refuses to create the socket.
    #[error(
        "control socket {} cannot be created ({source}): choose for --control a path in a \
         directory that this user may write to",
        path.display()
    )]
    Create {
        /// The path of the socket.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The group of the socket, which the variant holds, does not exist.
    #[error(
        "the group {0} of the control socket does not exist: create it or name another one with \
         --control-group"
    )]
    NoGroup(String),
    /// The path cannot be the path of a unix socket.
    #[error("{0}: choose another path for --control")]
    Path(#[source] UnixSocketError),
    /// The thread or its event loop cannot be created.
    #[error(
        "the control server cannot start ({0}): raise this process's limits or leave --control out"
    )]
    Thread(#[source] io::Error),
}

impl ControlError {
    /// A stable name of the cause, for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::InUse(_) => "control-socket-in-use",
            Self::NotSocket(_) => "control-path-not-a-socket",
            Self::Create { .. } => "control-socket-not-created",
            Self::NoGroup(_) => "control-group-missing",
            Self::Path(_) => "control-path-invalid",
            Self::Thread(_) => "control-server-not-started",
        }
    }
}

fn serve(
    runtime: &Runtime,
    sockets: Vec<(BoundedListener, Router)>,
    mut stopped: watch::Receiver<bool>,
) {
    runtime.block_on(async {
        let mut servers = Vec::new();
        for (listener, routes) in sockets {
            let mut stop_requested = stopped.clone();
            let routes = routes.into_make_service_with_connect_info::<Client>();
            let server = axum::serve(listener, routes).with_graceful_shutdown(async move {
                // An error means that the sender is dropped, which stops the server too.
                let _ = stop_requested.wait_for(|stop| *stop).await;
            });
            servers.push(tokio::spawn(server.into_future()));
        }
        let _ = stopped.wait_for(|stop| *stop).await;
        let ended = async {
            for server in servers {
                let _ = server.await;
            }
        };
        // A client that never ends its request must not keep the daemon from stopping.
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, ended).await.is_err() {
            tracing::debug!("the control server stops while requests are in progress");
        }
    });
}

/// Listens at `path`.
///
/// # Errors
/// When another process listens there, or the socket cannot be created.
pub fn listen(
    path: &Path,
    access: &SocketPermissions,
) -> Result<(net::UnixListener, SocketFile), ControlError> {
    listen_at(path, access).map_err(|error| match error {
        UnixSocketError::InUse(path) => ControlError::InUse(path),
        UnixSocketError::NotASocket(path) => ControlError::NotSocket(path),
        UnixSocketError::Refused { path, source, .. } => ControlError::Create { path, source },
        UnixSocketError::NoGroup(group) => ControlError::NoGroup(group),
        error => ControlError::Path(error),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::time::Instant;

    use super::*;
    use crate::metrics;
    use crate::v1::{ErrorReport, Report, sample};

    const OWN: Access = Access::Change { uid: 0 };

    struct Sample;

    impl ReportSource for Sample {
        fn report(&self) -> Report {
            sample()
        }
    }

    /// A directory of one test, which is removed at the end of the test.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("virtionetd-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn socket(&self) -> PathBuf {
            self.0.join("control.sock")
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn start(path: &Path) -> Result<ControlServer, ControlError> {
        ControlServer::start(path, &owner_only(), OWN, Arc::new(Sample), || ())
    }

    /// The code and the text of the error.
    fn start_error(path: &Path) -> (&'static str, String) {
        let error = start(path).unwrap_err();
        (error.code(), error.to_string())
    }

    fn owner_only() -> SocketPermissions {
        SocketPermissions {
            mode: Some(0o600),
            group: None,
        }
    }

    #[test]
    fn socket_has_the_mode_and_the_group_that_are_asked_for() {
        let dir = Dir::new("access");
        let own_group = fs::metadata(&dir.0).unwrap().gid();
        let access = SocketPermissions {
            mode: Some(0o640),
            group: Some(own_group.to_string()),
        };
        let server =
            ControlServer::start(&dir.socket(), &access, OWN, Arc::new(Sample), || ()).unwrap();
        let metadata = fs::metadata(dir.socket()).unwrap();
        assert_eq!(
            (metadata.permissions().mode() & 0o7777, metadata.gid()),
            (0o640, own_group)
        );
        server.stop();
        let access = SocketPermissions {
            group: Some("no such group".into()),
            ..access
        };
        let error =
            ControlServer::start(&dir.socket(), &access, OWN, Arc::new(Sample), || ()).unwrap_err();
        assert_eq!(error.code(), "control-group-missing");
        assert_eq!(
            error.to_string(),
            "the group no such group of the control socket does not exist: create it or name \
             another one with --control-group"
        );
        assert!(!dir.socket().exists());
    }

    /// Connects a client that sends one request.
    fn send(path: &Path, request: &str) -> net::UnixStream {
        let mut client = net::UnixStream::connect(path).unwrap();
        let request = format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        client.write_all(request.as_bytes()).unwrap();
        client
    }

    /// The head, in lower case, and the body of the answer to one request.
    fn ask(path: &Path, request: &str) -> (String, String) {
        let mut answer = String::new();
        send(path, request).read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_ascii_lowercase(), body.into())
    }

    #[test]
    fn answers_requests() {
        let dir = Dir::new("answers");
        let server = start(&dir.socket()).unwrap();

        let (head, body) = ask(server.path(), "GET /v1/devices");
        assert!(head.starts_with("http/1.1 200 ok"), "{head}");
        assert!(head.contains("content-type: application/json"), "{head}");
        assert_eq!(body, serde_json::to_string(&sample()).unwrap());

        let (head, body) = ask(server.path(), "GET /metrics");
        assert!(
            head.contains(&format!("content-type: {}", metrics::CONTENT_TYPE)),
            "{head}"
        );
        assert_eq!(body, metrics::encode(sample()).unwrap());

        for (request, status, code) in [
            ("GET /", 404, "no-such-path"),
            ("GET /v1/devices/x?y", 404, "no-such-device"),
            ("GET /v1/switches/x", 404, "no-such-switch"),
            ("PATCH /v1/devices", 405, "method-not-allowed"),
            ("DELETE /metrics", 405, "method-not-allowed"),
            ("POST /v1/devices", 400, "body-invalid"),
            ("PUT /v1/devices/x", 400, "body-invalid"),
            ("PATCH /v1/devices/x", 400, "body-invalid"),
            ("POST /v1/reload?x=y", 400, "query-invalid"),
            ("POST /v1/reload", 501, "not-supported"),
            ("DELETE /v1/devices/x", 501, "not-supported"),
        ] {
            let (head, body) = ask(server.path(), request);
            assert!(
                head.starts_with(&format!("http/1.1 {status} ")),
                "{request}: {head}"
            );
            assert_eq!(status == 405, head.contains("allow: get,head"), "{request}");
            let error: ErrorReport = serde_json::from_str(&body).unwrap();
            assert_eq!(error.code, code, "{request}: {body}");
            assert!(!error.error.is_empty(), "{request}");
        }
        for path in [
            "/v1/devices/vnet",
            "/v1/switches",
            "/v1/health",
            "/v1/version",
        ] {
            let (head, body) = ask(server.path(), &format!("GET {path}"));
            assert!(head.starts_with("http/1.1 200 ok"), "{path}: {head}");
            assert_eq!(
                path.ends_with("vnet"),
                head.contains("etag: \"3\""),
                "{head}"
            );
            assert!(serde_json::from_str::<serde_json::Value>(&body).is_ok());
        }

        // The server closes the connection after the first line, so only the status can be read.
        let mut status = [0; 12];
        send(server.path(), "what is this")
            .read_exact(&mut status)
            .unwrap();
        assert_eq!(&status, b"HTTP/1.1 400");
    }

    #[test]
    fn socket_is_for_its_owner_and_is_removed_with_the_server() {
        let dir = Dir::new("socket");
        let server = start(&dir.socket()).unwrap();
        let mode = fs::metadata(server.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        server.stop();
        assert!(!dir.socket().exists());
    }

    #[test]
    fn stale_socket_is_replaced_and_one_in_use_is_not() {
        let dir = Dir::new("stale");
        drop(net::UnixListener::bind(dir.socket()).unwrap());
        assert!(dir.socket().exists());

        let server = start(&dir.socket()).unwrap();
        let text = format!(
            "control socket {} is in use by another process: choose another path for --control",
            dir.socket().display()
        );
        assert_eq!(start_error(&dir.socket()), ("control-socket-in-use", text));
        assert!(
            ask(server.path(), "GET /metrics")
                .0
                .starts_with("http/1.1 200 ")
        );
    }

    #[test]
    fn file_at_the_path_is_not_replaced() {
        let dir = Dir::new("file");
        fs::write(dir.socket(), "mine").unwrap();
        assert_eq!(
            start_error(&dir.socket()),
            (
                "control-path-not-a-socket",
                format!(
                    "{} is in the way of the control socket and is no socket: remove it or choose \
                 another path for --control",
                    dir.socket().display()
                )
            )
        );
        assert_eq!(fs::read_to_string(dir.socket()).unwrap(), "mine");

        let nowhere = dir.0.join("none/control.sock");
        let (code, message) = start_error(&nowhere);
        assert_eq!(code, "control-socket-not-created");
        assert!(
            message.starts_with(&format!(
                "control socket {} cannot be created (",
                nowhere.display()
            )),
            "{message}"
        );

        let (code, message) = start_error(&dir.0.join("x".repeat(200)));
        assert_eq!(code, "control-path-invalid");
        assert!(
            message.ends_with(": choose another path for --control"),
            "{message}"
        );
    }

    #[test]
    fn socket_of_another_process_at_the_same_path_is_kept() {
        let dir = Dir::new("another");
        let server = start(&dir.socket()).unwrap();
        fs::remove_file(dir.socket()).unwrap();
        let _another = net::UnixListener::bind(dir.socket()).unwrap();
        server.stop();
        assert!(dir.socket().exists());
    }

    #[test]
    fn clients_that_stay_connected_do_not_delay_the_end() {
        let dir = Dir::new("hang");
        let server = start(&dir.socket()).unwrap();
        let silent = net::UnixStream::connect(dir.socket()).unwrap();
        let mut unfinished = net::UnixStream::connect(dir.socket()).unwrap();
        unfinished
            .write_all(b"GET /v1/devices HTTP/1.1\r\nHost")
            .unwrap();
        // This answer shows that the server has accepted the two earlier connections.
        assert!(
            ask(server.path(), "GET /metrics")
                .0
                .starts_with("http/1.1 200 ")
        );
        let start = Instant::now();
        server.stop();
        assert!(
            start.elapsed() < SHUTDOWN_TIMEOUT * 5,
            "{:?}",
            start.elapsed()
        );
        drop((silent, unfinished));
    }
}
