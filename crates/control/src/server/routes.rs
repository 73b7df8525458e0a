//! The routes of the API.
//!
//! A refused request is answered with `{"error": "...", "code": "..."}`. Changes come from root and
//! from the daemon's own user only, and only on a socket that takes them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, RawQuery, State};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::oneshot;

use super::listener::Client;
use crate::metrics;
use crate::v1::{
    Change, ChangeRequest, Changed, Condition, DeviceReport, DeviceSettings, ErrorReport, Health,
    Peer, Refusal, Report, ReportSource, SwitchReport, Version,
};

/// The largest body of a request, in bytes. A device has a few hundred.
const MAX_BODY: usize = 64 << 10;
/// How long a change may take. It goes on after that.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether a socket takes changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// From root, and from this user.
    Change {
        /// The user of the daemon.
        uid: u32,
    },
    /// From nobody.
    ReadOnly,
}

/// What the handlers of a socket share.
#[derive(Clone)]
pub(super) struct Server {
    source: Arc<dyn ReportSource>,
    access: Access,
}

/// The routes of a socket.
pub(super) fn routes(source: Arc<dyn ReportSource>, access: Access) -> Router {
    Router::new()
        .route("/v1/devices", get(devices).post(add))
        .route(
            "/v1/devices/{name}",
            get(device).put(put).delete(remove).patch(set),
        )
        .route("/v1/reload", post(reload))
        .route("/v1/switches", get(switches))
        .route("/v1/switches/{name}", get(switch))
        .route("/v1/health", get(health))
        .route("/v1/version", get(version))
        .route("/metrics", get(prometheus))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Server { source, access })
}

async fn devices(State(server): State<Server>) -> Json<Report> {
    Json(server.source.report())
}

async fn device(State(server): State<Server>, Path(name): Path<String>) -> Response {
    let devices = server.source.report().devices;
    match devices.into_iter().find(|device| device.name == name) {
        Some(device) => tagged(
            StatusCode::OK,
            device.revision,
            Json::<DeviceReport>(device),
        ),
        None => refuse(&no_device(&name)),
    }
}

async fn add(
    State(server): State<Server>,
    ConnectInfo(client): ConnectInfo<Client>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let change = || parse(body).map(Change::Add);
    server.change(client, &headers, change).await
}

async fn put(
    State(server): State<Server>,
    ConnectInfo(client): ConnectInfo<Client>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let change = || {
        let mut values: BTreeMap<String, Value> = parse(body)?;
        match values.insert("name".into(), name.clone().into()) {
            Some(other) if other != name.as_str() => Err(Refusal::new(
                400,
                "name-differs",
                format!(
                    "the name in the body is {other}, and {name:?} in the path: leave it out of the body"
                ),
            )),
            _ => Ok(Change::Add(values)),
        }
    };
    server.change(client, &headers, change).await
}

async fn remove(
    State(server): State<Server>,
    ConnectInfo(client): ConnectInfo<Client>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response {
    let change = || Ok(Change::Remove(name));
    server.change(client, &headers, change).await
}

async fn set(
    State(server): State<Server>,
    ConnectInfo(client): ConnectInfo<Client>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let change = || {
        let settings: DeviceSettings = parse(body)?;
        Ok(Change::Set(name, settings))
    };
    server.change(client, &headers, change).await
}

async fn reload(
    State(server): State<Server>,
    ConnectInfo(client): ConnectInfo<Client>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let change = || match query.as_deref() {
        None | Some("" | "dry-run=false") => Ok(Change::Reload { dry_run: false }),
        Some("dry-run=true") => Ok(Change::Reload { dry_run: true }),
        Some(other) => Err(Refusal::new(
            400,
            "query-invalid",
            format!("the query {other:?} is not known: write dry-run=true or leave it out"),
        )),
    };
    server.change(client, &headers, change).await
}

async fn switches(State(server): State<Server>) -> Json<Vec<SwitchReport>> {
    Json(server.source.switches())
}

async fn switch(State(server): State<Server>, Path(name): Path<String>) -> Response {
    let mut switches = server.source.switches().into_iter();
    match switches.find(|switch| switch.name == name) {
        Some(switch) => Json(switch).into_response(),
        None => refuse(&Refusal::new(
            404,
            "no-such-switch",
            format!("there is no switch {name:?}: GET /v1/switches lists them"),
        )),
    }
}

/// A daemon that is not ready answers with 503, so that a probe need not read the body.
async fn health(State(server): State<Server>) -> Response {
    let health: Health = server.source.health();
    let status = match health.ready {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(health)).into_response()
}

async fn version() -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION").into(),
        api: vec!["v1".into()],
    })
}

async fn prometheus(State(server): State<Server>) -> Response {
    match metrics::encode(server.source.report()) {
        Ok(page) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page).into_response(),
        Err(cause) => refuse(&Refusal::new(500, "metrics-not-encoded", cause.to_string())),
    }
}

async fn not_found(uri: Uri) -> Response {
    let message = format!(
        "nothing is at {}: ask for /v1/devices or /metrics",
        uri.path()
    );
    refuse(&Refusal::new(404, "no-such-path", message))
}

async fn not_allowed(method: Method, uri: Uri) -> Response {
    let message = format!(
        "{} does not take {method}: the header allow lists what it takes",
        uri.path()
    );
    refuse(&Refusal::new(405, "method-not-allowed", message))
}

impl Server {
    /// Lets the daemon carry out the change that `parse` returns, if the client may ask for one.
    async fn change(
        &self,
        client: Client,
        headers: &HeaderMap,
        parse: impl FnOnce() -> Result<Change, Refusal>,
    ) -> Response {
        let request = self.may_change(client).and_then(|peer| {
            Ok(ChangeRequest {
                condition: condition(headers)?,
                change: parse()?,
                peer,
            })
        });
        let request = match request {
            Ok(request) => request,
            Err(refusal) => return refuse(&refusal),
        };
        let (sender, receiver) = oneshot::channel();
        let reply = Box::new(|result| _ = sender.send(result));
        self.source.change(request, reply);
        let result = match tokio::time::timeout(CHANGE_TIMEOUT, receiver).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Refusal::new(
                503,
                "ending",
                "virtionetd ends, or hands over: try again".into(),
            )),
            Err(_) => Err(Refusal::new(
                504,
                "change-not-done",
                "the change is not done after 30 s and goes on: ask for the devices later".into(),
            )),
        };
        match result {
            Ok(Changed {
                is_created,
                body,
                revision,
            }) => {
                let status = match is_created {
                    true => StatusCode::CREATED,
                    false => StatusCode::OK,
                };
                match revision {
                    Some(revision) => tagged(status, revision, Json(body)),
                    None => (status, Json(body)).into_response(),
                }
            }
            Err(refusal) => refuse(&refusal),
        }
    }

    fn may_change(&self, client: Client) -> Result<Peer, Refusal> {
        let Access::Change { uid } = self.access else {
            return Err(Refusal::new(
                403,
                "read-only-socket",
                "this socket takes no changes: use the one of --control".into(),
            ));
        };
        match client.0 {
            Some(peer) if peer.uid == 0 || peer.uid == uid => Ok(peer),
            _ => Err(Refusal::new(
                403,
                "user-not-permitted",
                format!("only root and user {uid} may change virtionetd: ask as one of them"),
            )),
        }
    }
}

/// The condition of a change.
fn condition(headers: &HeaderMap) -> Result<Condition, Refusal> {
    let value = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or(""));
    let revision = |tag: &str| tag.strip_prefix('"')?.strip_suffix('"')?.parse().ok();
    match (value(header::IF_MATCH), value(header::IF_NONE_MATCH)) {
        (None, None) => Ok(Condition::Always),
        (Some("*"), None) => Ok(Condition::Exists),
        (None, Some("*")) => Ok(Condition::Absent),
        (Some(tag), None) if revision(tag).is_some() => {
            Ok(revision(tag).map_or(Condition::Always, Condition::Revision))
        }
        _ => Err(Refusal::new(
            400,
            "condition-invalid",
            "the condition is not known: send If-Match with the ETag of the device or *, or If-None-Match: *"
                .into(),
        )),
    }
}

/// The JSON of a body.
fn parse<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, Refusal> {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Refusal::new(
            413,
            "body-too-large",
            "the body is larger than 64 KiB: send one device".into(),
        ),
        status => Refusal::new(status.as_u16(), "body-unreadable", rejection.body_text()),
    })?;
    serde_json::from_slice(&body).map_err(|error| {
        let message = format!("the body cannot be read as JSON of this request: {error}");
        Refusal::new(400, "body-invalid", message)
    })
}

fn no_device(name: &str) -> Refusal {
    Refusal::new(
        404,
        "no-such-device",
        format!("there is no device {name:?}: GET /v1/devices lists them"),
    )
}

/// A response with the revision of a device as its ETag.
fn tagged(status: StatusCode, revision: u64, body: impl IntoResponse) -> Response {
    (status, [(header::ETAG, format!("\"{revision}\""))], body).into_response()
}

fn refuse(refusal: &Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.status);
    let report = ErrorReport {
        error: refusal.message.clone(),
        code: refusal.code.clone().into_owned(),
    };
    (
        status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        Json(report),
    )
        .into_response()
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}
