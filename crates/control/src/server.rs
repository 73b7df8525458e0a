//! The control socket: HTTP/1.1 over a unix socket.
//!
//! `curl --unix-socket PATH http://localhost/v1/devices` answers with the [`Report`] in JSON,
//! `/metrics` with the same for Prometheus. Errors are JSON too: `{"error": "..."}`.
//!
//! The server has a thread of its own, named `control`; whatever its clients do, no worker waits
//! for it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::extract::State;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use virtionet_base::unix_socket::{Access, SocketFile, UnixSocketError, listen_at};

use crate::metrics;
use crate::v1::{Report, ReportSource};

/// Who may use the socket: its owner.
const SOCKET_MODE: u32 = 0o600;

/// How long answers under way may take once the server is told to stop.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(200);

/// A control server that runs. Dropping it stops it, as [`Self::stop`] does.
#[derive(Debug)]
pub struct ControlServer {
    socket: SocketFile,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Creates the socket at `path`, for its owner only (mode 0600), and answers on it from a
    /// thread of its own. A socket left behind by a process that is gone is replaced. The thread
    /// inherits the caller's signal mask.
    ///
    /// # Errors
    /// When another process listens on that path, when the socket cannot be made, or the thread.
    pub fn start(path: &Path, report_source: Arc<dyn ReportSource>) -> Result<Self, ControlError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ControlError::Thread)?;
        let (listener, socket) = runtime.block_on(listen(path))?;
        let (stop, stopped) = watch::channel(false);
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || serve(&runtime, listener, routes(report_source), stopped))
            .map_err(ControlError::Thread)?;
        Ok(Self {
            socket,
            stop,
            thread: Some(thread),
        })
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.socket.path()
    }

    /// Ends the answers under way, the thread, and removes the socket.
    pub fn stop(self) {}
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control server ended by itself: please report this as a bug");
        }
    }
}

/// Why there can be no control server.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Somebody answers there.
    #[error("control socket {} is in use by another process: choose another path for --control", .0.display())]
    InUse(PathBuf),
    /// The path is taken by something that must not be removed.
    #[error("{} is in the way of the control socket and is no socket: remove it or choose another path for --control", .0.display())]
    NotSocket(PathBuf),
    /// The socket cannot be made.
    #[error("control socket {} cannot be created ({source}): choose for --control a path in a directory that this user may write to", path.display())]
    Create {
        /// Where.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The path cannot be that of a unix socket.
    #[error("{0}: choose another path for --control")]
    Path(#[source] UnixSocketError),
    /// The thread cannot be made.
    #[error(
        "the control server cannot start ({0}): raise this process's limits or leave --control out"
    )]
    Thread(#[source] io::Error),
}

impl ControlError {
    /// A name of the error for programs. It does not change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::InUse(_) => "control-socket-in-use",
            Self::NotSocket(_) => "control-path-not-a-socket",
            Self::Create { .. } => "control-socket-not-created",
            Self::Path(_) => "control-path-invalid",
            Self::Thread(_) => "control-server-not-started",
        }
    }
}

/// What the server answers. Verbs that change something go here, beside the ones that read.
fn routes(report_source: Arc<dyn ReportSource>) -> Router {
    Router::new()
        .route("/v1/devices", get(devices))
        .route("/metrics", get(prometheus))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .with_state(report_source)
}

async fn devices(State(report_source): State<Arc<dyn ReportSource>>) -> Json<Report> {
    Json(report_source.report())
}

async fn prometheus(
    State(report_source): State<Arc<dyn ReportSource>>,
) -> Result<impl IntoResponse, Response> {
    metrics::encode(report_source.report())
        .map(|page| ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page))
        .map_err(|why| error(StatusCode::INTERNAL_SERVER_ERROR, format_args!("{why}")))
}

async fn not_found(uri: Uri) -> Response {
    error(
        StatusCode::NOT_FOUND,
        format_args!(
            "nothing is at {}: ask for /v1/devices or /metrics",
            uri.path()
        ),
    )
}

async fn not_allowed(method: Method, uri: Uri) -> Response {
    error(
        StatusCode::METHOD_NOT_ALLOWED,
        format_args!("{} does not take {method}: use GET", uri.path()),
    )
}

fn error(status: StatusCode, message: fmt::Arguments<'_>) -> Response {
    (status, Json(json!({ "error": message.to_string() }))).into_response()
}

fn serve(
    runtime: &Runtime,
    listener: UnixListener,
    routes: Router,
    mut stopped: watch::Receiver<bool>,
) {
    runtime.block_on(async {
        let mut stop_requested = stopped.clone();
        let server = axum::serve(listener, routes).with_graceful_shutdown(async move {
            // An error is a sender that is gone: stop as well.
            let _ = stop_requested.wait_for(|stop| *stop).await;
        });
        let server = tokio::spawn(server.into_future());
        let _ = stopped.wait_for(|stop| *stop).await;
        // A client that never ends its request must not keep the daemon.
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, server)
            .await
            .is_err()
        {
            tracing::debug!("control server stopped with requests under way");
        }
    });
}

/// Listens at `path`, for the socket's owner only. Async because the listener belongs to the runtime
/// that polls this.
async fn listen(path: &Path) -> Result<(UnixListener, SocketFile), ControlError> {
    let access = Access {
        mode: Some(SOCKET_MODE),
        group: None,
    };
    let (listener, file) = listen_at(path, &access).map_err(|error| match error {
        UnixSocketError::InUse(path) => ControlError::InUse(path),
        UnixSocketError::NotASocket(path) => ControlError::NotSocket(path),
        UnixSocketError::Refused { path, source, .. } => ControlError::Create { path, source },
        error => ControlError::Path(error),
    })?;
    let listener = UnixListener::from_std(listener).map_err(ControlError::Thread)?;
    Ok((listener, file))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net;
    use std::time::Instant;

    use super::*;
    use crate::v1::sample;

    struct Sample;

    impl ReportSource for Sample {
        fn report(&self) -> Report {
            sample()
        }
    }

    /// A directory that ends with the test.
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

    fn start(path: &Path) -> Result<ControlServer, String> {
        ControlServer::start(path, Arc::new(Sample)).map_err(|why| why.to_string())
    }

    /// A client that has sent one request.
    fn send(path: &Path, request: &str) -> net::UnixStream {
        let mut client = net::UnixStream::connect(path).unwrap();
        let request = format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        client.write_all(request.as_bytes()).unwrap();
        client
    }

    /// Head and body of the answer to one request.
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

        for (request, status, message) in [
            (
                "GET /",
                404,
                "nothing is at /: ask for /v1/devices or /metrics",
            ),
            (
                "GET /v1/devices/x?y",
                404,
                "nothing is at /v1/devices/x: ask for /v1/devices or /metrics",
            ),
            (
                "POST /v1/devices",
                405,
                "/v1/devices does not take POST: use GET",
            ),
            (
                "DELETE /metrics",
                405,
                "/metrics does not take DELETE: use GET",
            ),
        ] {
            let (head, body) = ask(server.path(), request);
            assert!(
                head.starts_with(&format!("http/1.1 {status} ")),
                "{request}: {head}"
            );
            assert_eq!(
                status == 405,
                head.contains("allow: get,head"),
                "{request}: {head}"
            );
            assert_eq!(body, json!({ "error": message }).to_string(), "{request}");
        }

        // Refused at the first line and closed on the rest: no read to the end.
        let mut status = [0; 12];
        send(server.path(), "what is this")
            .read_exact(&mut status)
            .unwrap();
        assert_eq!(&status, b"HTTP/1.1 400");
    }

    #[test]
    fn the_socket_is_its_owners_and_goes_with_the_server() {
        let dir = Dir::new("socket");
        let server = start(&dir.socket()).unwrap();
        let mode = fs::metadata(server.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        server.stop();
        assert!(!dir.socket().exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = Dir::new("stale");
        drop(net::UnixListener::bind(dir.socket()).unwrap());
        assert!(dir.socket().exists());

        let server = start(&dir.socket()).unwrap();
        assert_eq!(
            start(&dir.socket()).unwrap_err(),
            format!(
                "control socket {} is in use by another process: choose another path for --control",
                dir.socket().display()
            )
        );
        assert!(
            ask(server.path(), "GET /metrics")
                .0
                .starts_with("http/1.1 200 ")
        );
    }

    #[test]
    fn a_file_in_the_way_is_left_alone() {
        let dir = Dir::new("file");
        fs::write(dir.socket(), "mine").unwrap();
        assert_eq!(
            start(&dir.socket()).unwrap_err(),
            format!(
                "{} is in the way of the control socket and is no socket: remove it or choose another path for --control",
                dir.socket().display()
            )
        );
        assert_eq!(fs::read_to_string(dir.socket()).unwrap(), "mine");

        let nowhere = dir.0.join("none/control.sock");
        let message = start(&nowhere).unwrap_err();
        assert!(
            message.starts_with(&format!(
                "control socket {} cannot be created (",
                nowhere.display()
            )),
            "{message}"
        );
    }

    #[test]
    fn anothers_socket_at_the_same_path_stays() {
        let dir = Dir::new("another");
        let server = start(&dir.socket()).unwrap();
        fs::remove_file(dir.socket()).unwrap();
        let _another = net::UnixListener::bind(dir.socket()).unwrap();
        server.stop();
        assert!(dir.socket().exists());
    }

    #[test]
    fn clients_that_hang_on_do_not_delay_the_end() {
        let dir = Dir::new("hang");
        let server = start(&dir.socket()).unwrap();
        let silent = net::UnixStream::connect(dir.socket()).unwrap();
        let mut halfway = net::UnixStream::connect(dir.socket()).unwrap();
        halfway
            .write_all(b"GET /v1/devices HTTP/1.1\r\nHost")
            .unwrap();
        // Answered behind the two: the server has met them.
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
        drop((silent, halfway));
    }
}
