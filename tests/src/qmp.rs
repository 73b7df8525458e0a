//! A minimal QMP client (QEMU's docs/interop/qmp-spec.rst). It runs one command at a time and
//! stores events until a caller waits for them.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to a QMP monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    is_negotiated: bool,
    events: Vec<Value>,
}

impl Qmp {
    /// Takes a connected socket. The greeting is read with the first command, because QEMU sends
    /// none while it waits for a vhost-user back-end.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream: BufReader::new(stream),
            is_negotiated: false,
            events: Vec::new(),
        }
    }

    /// Runs `command` and returns its result.
    ///
    /// # Errors
    /// When QEMU returns an error, or does not answer within 30 s.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        if !self.is_negotiated {
            self.read_message(REPLY_TIMEOUT)
                .context("QMP sent no greeting")?;
            self.call("qmp_capabilities", &Value::Null)?;
            self.is_negotiated = true;
        }
        self.call(command, arguments)
    }

    /// Waits for the event `name` and returns its data.
    ///
    /// # Errors
    /// When the event does not arrive within `timeout`.
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<Value> {
        let until = Instant::now() + timeout;
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
                return Ok(self.events.remove(at)["data"].take());
            }
            let left = until.saturating_duration_since(Instant::now());
            let message = self
                .read_message(left)
                .with_context(|| format!("no {name} event arrived within {timeout:?}"))?;
            self.events.push(message);
        }
    }

    fn call(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments.clone();
        }
        let mut line = request.to_string();
        line.push('\n');
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("the QMP command '{command}' cannot be sent"))?;
        loop {
            let mut message = self
                .read_message(REPLY_TIMEOUT)
                .with_context(|| format!("QMP did not answer '{command}'"))?;
            if let Some(error) = message.get("error") {
                bail!("QMP '{command}' failed: {}", error["desc"]);
            }
            match message.get_mut("return") {
                Some(value) => return Ok(value.take()),
                None => self.events.push(message),
            }
        }
    }

    fn read_message(&mut self, timeout: Duration) -> Result<Value> {
        // `set_read_timeout` rejects a timeout of zero.
        let timeout = timeout.max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(timeout))?;
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("QEMU closed the monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("a QMP message is not JSON: {line:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Returns a client, and a thread that sends a greeting and these replies to it and then
    /// returns the requests.
    fn monitor(lines: &'static [&'static str]) -> (Qmp, thread::JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            let mut writer = theirs;
            writeln!(writer, r#"{{"QMP": {{"version": {{}}}}}}"#).unwrap();
            let mut requests = Vec::new();
            for reply in [&[r#"{"return": {}}"#], lines].concat() {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                requests.push(line.trim().to_owned());
                writeln!(writer, "{reply}").unwrap();
            }
            requests
        });
        (Qmp::new(ours), server)
    }

    #[test]
    fn event_before_a_reply_is_stored_until_it_is_read() {
        let (mut qmp, server) = monitor(&[concat!(
            r#"{"event": "RESUME", "data": {"n": 1}}"#,
            "\n",
            r#"{"return": [7]}"#
        )]);
        let reply = qmp.execute("query-x", &json!({"a": 1})).unwrap();
        assert_eq!(reply, json!([7]));
        let data = qmp.wait_event("RESUME", Duration::from_secs(1)).unwrap();
        assert_eq!(data, json!({"n": 1}));
        let requests = server.join().unwrap();
        assert_eq!(requests[1], r#"{"arguments":{"a":1},"execute":"query-x"}"#);
    }

    #[test]
    fn error_reply_is_an_error() {
        let (mut qmp, server) = monitor(&[r#"{"error": {"class": "GenericError", "desc": "no"}}"#]);
        let error = qmp.execute("bad", &Value::Null).unwrap_err().to_string();
        assert!(error.contains("'bad' failed: \"no\""), "{error}");
        server.join().unwrap();
    }

    #[test]
    fn closed_monitor_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(Qmp::new(ours).execute("quit", &Value::Null).is_err());
    }
}
