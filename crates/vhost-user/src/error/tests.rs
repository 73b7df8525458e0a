//! The codes of all errors of a session. Programs tell the errors apart by them, so they never
//! change.

use std::collections::BTreeSet;

use virtionet_virtqueue::VirtqueueError;

use super::*;
use crate::vring_state::{VringEvent, VringState};

fn io_error() -> io::Error {
    io::ErrorKind::PermissionDenied.into()
}

fn session_errors() -> Vec<(SessionError, &'static str)> {
    let limit = Duration::from_secs(5);
    vec![
        (ProtocolError::Truncated.into(), "message-truncated"),
        (SessionError::NotShared, "memory-not-shared"),
        (SessionError::FdLimit, "open-file-limit"),
        (SessionError::FdWithheld, "descriptor-withheld"),
        (SessionError::MessageIncomplete(limit), "message-incomplete"),
        (SessionError::ReplyNotTaken(limit), "reply-not-taken"),
        (io_error().into(), "vhost-user-socket-failed"),
    ]
}

/// All but [`ProtocolError::Truncated`].
fn protocol_errors() -> Vec<(ProtocolError, &'static str)> {
    let request = FrontendReq::SET_VRING_KICK;
    let (got, size, wanted) = (2, 8, 1);
    let not_eventfd = ProtocolError::NotEventFd {
        request,
        ring: 1,
        found: "a pipe".into(),
    };
    let unanswerable = ProtocolError::Unanswerable {
        request,
        refusal: RequestError::Unknown,
    };
    vec![
        (ProtocolError::Version(2), "message-version"),
        (ProtocolError::Reply(1), "unexpected-reply"),
        (
            ProtocolError::TooLong { code: 1, size: 8 },
            "payload-too-long",
        ),
        (ProtocolError::TooManyFds, "too-many-descriptors"),
        (
            ProtocolError::Size {
                request,
                size,
                wanted,
            },
            "payload-size",
        ),
        (
            ProtocolError::FdCount {
                request,
                got,
                wanted,
            },
            "descriptor-count",
        ),
        (ProtocolError::Regions(9), "too-many-memory-regions"),
        (not_eventfd, "not-an-eventfd"),
        (unanswerable, "request-unanswerable"),
        (
            ProtocolError::PostcopyOrder {
                request: "POSTCOPY_END",
                state: "before POSTCOPY_LISTEN",
            },
            "postcopy-order",
        ),
        (
            ProtocolError::PostcopyMemory(1),
            "postcopy-memory-not-accepted",
        ),
    ]
}

fn request_errors() -> Vec<(RequestError, &'static str)> {
    let no_such_vring = RequestError::NoSuchVring {
        ring: 4,
        queue_pairs: 2,
    };
    let misaligned = RequestError::Misaligned {
        area: "used ring",
        addr: 1,
        align: 4,
    };
    vec![
        (RequestError::VringIndex(256), "vring-index-invalid"),
        (no_such_vring, "no-such-vring"),
        (RequestError::VringSize(3), "vring-size-invalid"),
        (RequestError::VringBase(65536), "vring-base-invalid"),
        (misaligned, "vring-area-misaligned"),
        (RequestError::VringAddrFlags(2), "vring-address-flags"),
        (RequestError::Enable(2), "vring-enable-invalid"),
        (RequestError::Mtu(1), "mtu-invalid"),
        (RequestError::Status(256), "device-status-invalid"),
        (RequestError::Features(1), "features-not-offered"),
        (
            RequestError::ProtocolFeatures(1),
            "protocol-features-not-offered",
        ),
        (
            RequestError::FormatWhileRunning,
            "vring-format-while-running",
        ),
        (MemoryError::Empty(0).into(), "memory-table-invalid"),
        (
            RequestError::RemoteMemory {
                what: "guest memory",
                file_system: "FUSE",
            },
            "memory-on-remote-file-system",
        ),
        (RequestError::LogWithoutFile, "dirty-log-without-file"),
        (RequestError::LogRefused, "dirty-log-refused"),
        (RequestError::Mac([1; 6]), "mac-invalid"),
        (RequestError::NotOffered, "request-not-offered"),
        (RequestError::Unknown, "request-unknown"),
    ]
}

fn backend_errors() -> Vec<(BackendError, &'static str)> {
    let (index, pair) = (1, 0);
    let no_such_pair = BackendError::NoSuchQueuePair {
        index,
        queue_pairs: 2,
        device: "vnet".into(),
    };
    let state = VringState::Running.after(VringEvent::Start).unwrap_err();
    let mtu = BackendError::Mtu {
        mtu: 9000,
        source: "it is too large".into(),
    };
    let source = VirtqueueError::Size(3);
    let config = BackendError::VringConfig { index, source };
    let source = VirtqueueError::Size(3);
    let unmapped = BackendError::VringUnmapped { index, source };
    let source = io_error;
    vec![
        (no_such_pair, "no-such-queue-pair"),
        (
            BackendError::QueuePair {
                pair,
                source: source(),
            },
            "queue-pair-not-created",
        ),
        (
            BackendError::Uplink("it is gone".into()),
            "uplink-queue-not-opened",
        ),
        (
            BackendError::UplinkWatch { source: source() },
            "uplink-not-pollable",
        ),
        (config, "vring-config-invalid"),
        (
            BackendError::VringState {
                index,
                source: state,
            },
            "vring-state-invalid",
        ),
        (unmapped, "vring-unmapped"),
        (
            BackendError::Kick {
                index,
                source: source(),
            },
            "kick-not-pollable",
        ),
        (
            BackendError::Worker {
                pair,
                source: source(),
            },
            "worker-not-started",
        ),
        (mtu, "mtu-not-supported"),
    ]
}

/// The codes that these errors have, which must be the expected ones.
fn codes<E: fmt::Display>(
    errors: Vec<(E, &'static str)>,
    code: impl Fn(E) -> &'static str,
) -> Vec<&'static str> {
    let one = |(error, expected): (E, &'static str)| {
        let text = error.to_string();
        assert!(!text.is_empty(), "{expected}");
        assert_eq!(code(error), expected, "{text}");
        expected
    };
    errors.into_iter().map(one).collect()
}

#[test]
fn each_error_has_a_code_of_its_own_that_never_changes() {
    let all = [
        codes(session_errors(), |error| error.code()),
        // An error that wraps another one has the code of that one.
        codes(protocol_errors(), |error| SessionError::from(error).code()),
        codes(request_errors(), |error| error.code()),
        codes(backend_errors(), |error| RequestError::from(error).code()),
    ]
    .concat();
    for code in &all {
        let words = code.split('-');
        let is_word = |word: &str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_lowercase());
        assert!(words.clone().all(is_word), "{code}");
    }
    let unique: BTreeSet<_> = all.iter().collect();
    assert_eq!(unique.len(), all.len(), "{all:?}");
}
