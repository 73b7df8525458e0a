//! A small QMP client (QEMU's docs/interop/qmp-spec.rst): one command at a
//! time, events kept until somebody asks for them.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

const ANSWER: Duration = Duration::from_secs(30);

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    negotiated: bool,
    events: Vec<Value>,
}

impl Qmp {
    /// Takes over a connected socket. The greeting is read with the first
    /// command: a QEMU that waits for a vhost-user back-end sends none yet.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream: BufReader::new(stream),
            negotiated: false,
            events: Vec::new(),
        }
    }

    /// Runs `command` and returns what it returned.
    ///
    /// # Errors
    /// When QEMU answers with an error, not within 30 s, or not at all.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        if !self.negotiated {
            self.next(ANSWER).context("QMP sent no greeting")?;
            self.call("qmp_capabilities", &Value::Null)?;
            self.negotiated = true;
        }
        self.call(command, arguments)
    }

    /// Waits for the event `name` and returns its data.
    ///
    /// # Errors
    /// When none comes within `timeout`.
    pub fn wait_event(&mut self, name: &str, timeout: Duration) -> Result<Value> {
        let until = Instant::now() + timeout;
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
                return Ok(self.events.remove(at)["data"].take());
            }
            let left = until.saturating_duration_since(Instant::now());
            let message = self
                .next(left)
                .with_context(|| format!("no {name} event in {timeout:?}"))?;
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
            .with_context(|| format!("QMP is gone before '{command}'"))?;
        loop {
            let mut message = self
                .next(ANSWER)
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

    fn next(&mut self, timeout: Duration) -> Result<Value> {
        // The kernel takes zero for "no limit".
        let timeout = timeout.max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(timeout))?;
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("QEMU closed the monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("QMP sent no JSON: {line:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// The other end of a monitor, as QEMU words it.
    fn monitor(lines: &'static [&'static str]) -> (Qmp, thread::JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let end = thread::spawn(move || {
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            let mut writer = theirs;
            writeln!(writer, r#"{{"QMP": {{"version": {{}}}}}}"#).unwrap();
            let mut asked = Vec::new();
            for reply in [&[r#"{"return": {}}"#], lines].concat() {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                asked.push(line.trim().to_owned());
                writeln!(writer, "{reply}").unwrap();
            }
            asked
        });
        (Qmp::new(ours), end)
    }

    #[test]
    fn events_before_an_answer_are_kept() {
        let (mut qmp, end) = monitor(&[concat!(
            r#"{"event": "RESUME", "data": {"n": 1}}"#,
            "\n",
            r#"{"return": [7]}"#
        )]);
        let answer = qmp.execute("query-x", &json!({"a": 1})).unwrap();
        assert_eq!(answer, json!([7]));
        let data = qmp.wait_event("RESUME", Duration::from_secs(1)).unwrap();
        assert_eq!(data, json!({"n": 1}));
        let asked = end.join().unwrap();
        assert_eq!(asked[1], r#"{"arguments":{"a":1},"execute":"query-x"}"#);
    }

    #[test]
    fn an_error_answer_is_an_error() {
        let (mut qmp, end) = monitor(&[r#"{"error": {"class": "GenericError", "desc": "no"}}"#]);
        let error = qmp.execute("bad", &Value::Null).unwrap_err().to_string();
        assert!(error.contains("'bad' failed: \"no\""), "{error}");
        end.join().unwrap();
    }

    #[test]
    fn a_closed_monitor_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(Qmp::new(ours).execute("quit", &Value::Null).is_err());
    }
}
