//! Log lines about a device's connections.

use std::sync::atomic::{AtomicBool, Ordering};

use virtionet_base::{MAX_QUEUE_PAIRS, RateLimiter};
use virtionet_vhost_user::RefusedRequest;
use virtionet_virtio_net::features::Features;

use super::FrontendState;

/// The log lines about a device's connections. They are rate-limited, so that a front-end that
/// connects repeatedly cannot flood the log.
#[derive(Debug, Default)]
pub(super) struct ConnectionLog {
    limiter: RateLimiter,
    /// Whether the present connection was reported, so that its end is reported too.
    is_reported: AtomicBool,
}

impl ConnectionLog {
    /// Reports that a front-end of process `pid` has connected.
    pub(super) fn report_connect(&self, device: &str, pid: Option<u32>, max_queue_pairs: u16) {
        let allowed = self.limiter.allow();
        self.is_reported.store(allowed.is_some(), Ordering::Relaxed);
        let Some(suppressed) = allowed else { return };
        let process = process_text(pid);
        let omitted = match suppressed {
            0 => String::new(),
            count => format!("; {count} connections before it were not logged"),
        };
        tracing::info!(
            "{device}: front-end connected{process}; it may use up to {max_queue_pairs} queue pairs (--queues){omitted}"
        );
    }

    /// Reports that the session of a front-end of process `pid` continues.
    pub(super) fn report_resume(&self, device: &str, pid: Option<u32>) {
        self.is_reported.store(true, Ordering::Relaxed);
        let process = process_text(pid);
        tracing::info!("{device}: the session of the front-end{process} continues");
    }

    /// Reports that the front-end has disconnected. `refused` is the first of its requests that was
    /// refused, if there was one.
    pub(super) fn report_disconnect(
        &self,
        device: &str,
        frontend: &FrontendState,
        refused: Option<&RefusedRequest>,
        max_queue_pairs: u16,
    ) {
        if !self.is_reported.load(Ordering::Relaxed) {
            return;
        }
        match early_disconnect_cause(frontend, refused, max_queue_pairs) {
            Some(cause) => {
                tracing::warn!("{device}: front-end gone before it used the device; {cause}");
            }
            None => tracing::info!("{device}: front-end gone"),
        }
    }
}

fn process_text(pid: Option<u32>) -> String {
    pid.map_or(String::new(), |pid| format!(" (process {pid})"))
}

/// The likely reason why a front-end disconnected before it used the device; `None` if it used it.
///
/// The protocol has no message with which a front-end can say that it needs more queue pairs than
/// the back-end has. Such a front-end closes the connection before it sends the driver's features.
/// QEMU then connects again at once.
fn early_disconnect_cause(
    frontend: &FrontendState,
    refused: Option<&RefusedRequest>,
    max_queue_pairs: u16,
) -> Option<String> {
    if frontend.has_started_vring {
        return None;
    }
    if let Some(refused) = refused {
        return Some(format!("virtionetd had refused a request: {refused}"));
    }
    let has_negotiated_only_protocol =
        frontend.protocol_features != 0 && frontend.features == Features::default();
    (has_negotiated_only_protocol && max_queue_pairs < MAX_QUEUE_PAIRS).then(|| {
        format!(
            "if it asked for more than {max_queue_pairs} queue pairs, raise --queues {max_queue_pairs} or lower queues= of QEMU's -netdev vhost-user"
        )
    })
}

#[cfg(test)]
mod tests {
    use virtionet_vhost_user::RequestError;

    use super::*;

    fn frontend(protocol_features: u64, features: u64, has_started_vring: bool) -> FrontendState {
        FrontendState {
            protocol_features,
            features: Features(features),
            has_started_vring,
            ..FrontendState::default()
        }
    }

    #[test]
    fn front_end_without_refused_request_is_advised_to_change_its_queues() {
        let refused = RefusedRequest {
            request: "SET_VRING_NUM".into(),
            error: RequestError::VringSize(3),
        };
        for (frontend, refused, pairs, words) in [
            (frontend(1, 0, false), None, 4, Some("raise --queues 4")),
            (frontend(1, 0, false), None, MAX_QUEUE_PAIRS, None),
            (frontend(0, 0, false), None, 4, None),
            (frontend(1, 1, false), None, 4, None),
            (
                frontend(1, 0, false),
                Some(&refused),
                4,
                Some("SET_VRING_NUM refused: ring size 3"),
            ),
            (
                frontend(1, 1, false),
                Some(&refused),
                4,
                Some("SET_VRING_NUM refused: ring size 3"),
            ),
            (frontend(1, 1, true), Some(&refused), 4, None),
        ] {
            let cause = early_disconnect_cause(&frontend, refused, pairs);
            assert_eq!(cause.is_some(), words.is_some(), "{cause:?}");
            if let (Some(cause), Some(words)) = (cause, words) {
                assert!(cause.contains(words), "{cause}");
                assert_eq!(cause.contains("--queues"), refused.is_none(), "{cause}");
            }
        }
    }
}
