//! A QMP session against a scripted monitor.

use super::*;
use crate::testing::{FakeQmp, GREETING, TempDir};
use std::os::unix::net::UnixListener;

const TIMEOUT: Duration = Duration::from_secs(5);

fn query(
    dir: &str,
    script: &'static [&'static str],
) -> (Result<Vec<CpuInfo>, QmpError>, Vec<Value>) {
    let dir = TempDir::new(dir);
    let server = FakeQmp::start(&dir, script.iter().map(|text| (*text).to_owned()).collect());
    let answer = query_vcpus(&server.path, TIMEOUT);
    (answer, server.requests())
}

#[test]
fn vcpus_are_queried_after_the_capabilities_and_events_are_skipped() {
    let (vcpus, requests) = query(
        "qmp-good",
        &[
            GREETING,
            "{\"return\": {}, \"id\": \"qmp_capabilities\"}\r\n{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"RESUME\"}\r\n",
            "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 3}, \"event\": \"STOP\"}\r\n{\"return\": [\
         {\"thread-id\": 4002, \"props\": {\"core-id\": 1}, \"qom-path\": \"/machine/unattached/device[3]\", \"cpu-index\": 1, \"target\": \"x86_64\"}, \
         {\"thread-id\": 4001, \"props\": {\"core-id\": 0}, \"qom-path\": \"/machine/unattached/device[0]\", \"cpu-index\": 0, \"target\": \"x86_64\"}\
         ], \"id\": \"query-cpus-fast\"}\r\n",
        ],
    );
    assert_eq!(
        vcpus.unwrap(),
        [
            CpuInfo {
                index: 0,
                tid: 4001
            },
            CpuInfo {
                index: 1,
                tid: 4002
            }
        ]
    );
    let commands: Vec<_> = requests
        .iter()
        .map(|request| request["execute"].as_str().unwrap())
        .collect();
    assert_eq!(commands, ["qmp_capabilities", "query-cpus-fast"]);
}

#[test]
fn pretty_printed_messages_are_parsed() {
    let (vcpus, _) = query(
        "qmp-pretty",
        &[
            "{\n    \"QMP\": {\n        \"version\": {}\n    }\n}\r\n",
            "{\n    \"return\": {\n    },\n    \"id\": \"qmp_capabilities\"\n}\r\n",
            "{\n    \"return\": [\n    ],\n    \"id\": \"query-cpus-fast\"\n}\r\n",
        ],
    );
    assert_eq!(vcpus.unwrap(), []);
}

#[test]
fn each_failure_is_reported_with_its_step() {
    const CAPABLE: &str = "{\"return\": {}, \"id\": \"qmp_capabilities\"}\r\n";
    let table: [(&str, &'static [&'static str], &str); 6] = [
        (
            "qmp-closed",
            &[GREETING],
            "closed the connection before it answered qmp_capabilities",
        ),
        (
            "qmp-http",
            &["HTTP/1.0 400 Bad Request\r\n"],
            "does not speak QMP (expected value at line 1",
        ),
        (
            "qmp-json",
            &["{\"hello\": 1}"],
            "does not speak QMP ({\"hello\":1} in place of",
        ),
        (
            "qmp-old",
            &[
                GREETING,
                CAPABLE,
                "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no such command\"}, \"id\": \"query-cpus-fast\"}",
            ],
            "refused query-cpus-fast (\"no such command\"): use QEMU 2.12 or later",
        ),
        (
            "qmp-id",
            &[GREETING, "{\"return\": {}, \"id\": \"other\"}"],
            "in place of the answer to qmp_capabilities",
        ),
        (
            "qmp-field",
            &[
                GREETING,
                CAPABLE,
                "{\"return\": [{\"cpu-index\": 0, \"thread-id\": 99999999999}], \"id\": \"query-cpus-fast\"}",
            ],
            "does not speak QMP (invalid value: integer `99999999999`",
        ),
    ];
    for (dir, script, words) in table {
        let error = query(dir, script).0.unwrap_err().to_string();
        assert!(error.contains(words), "{dir}: {error}");
    }
}

#[test]
fn reading_stops_at_the_byte_limit() {
    let event = "{\"event\": \"RESUME\", \"data\": {\"x\": \"0123456789012345678901234567890123456789\"}}\r\n";
    let events = event.repeat(usize::try_from(MAX_BYTES).unwrap() / event.len() + 1);
    let dir = TempDir::new("qmp-limit");
    let server = FakeQmp::start(&dir, vec![GREETING.into(), events]);
    let error = query_vcpus(&server.path, TIMEOUT).unwrap_err();
    assert!(matches!(error, QmpError::Broken { .. }), "{error}");
    assert!(error.to_string().contains("too much data"), "{error}");
}

#[test]
fn silent_or_busy_monitor_costs_at_most_the_timeout() {
    let dir = TempDir::new("qmp-silent");
    let path = dir.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let timeout = Duration::from_millis(50);
    let started = Instant::now();
    let error = query_vcpus(&path, timeout).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("did not answer with its greeting on"),
        "{error}"
    );
    assert!(error.to_string().contains("within 50ms"), "{error}");
    assert!(started.elapsed() >= timeout);

    let mut waiting = Vec::new();
    let busy = loop {
        match unix_socket::connect(&path) {
            Ok(stream) => waiting.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
    let error = query_vcpus(&path, timeout).unwrap_err();
    assert!(matches!(error, QmpError::Busy(_)), "{error}");
    drop(listener);
}

#[test]
fn error_for_a_missing_socket_names_qemus_option() {
    let error = query_vcpus(Path::new("/nonexistent/qmp"), TIMEOUT).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the QMP socket /nonexistent/qmp cannot be reached: No such file or directory (os error 2); \
         start QEMU with -qmp unix:/nonexistent/qmp,server=on,wait=off"
    );
}
