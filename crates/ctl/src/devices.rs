//! The commands that show and change the devices and switches of a running virtionetd.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use virtionet_config::{ConfigError, GivenValue};
use virtionet_control::client::{self, ClientError};
use virtionet_control::v1::{
    DeviceReport, Health, LinkState, Reload, Report, SocketRole, SwitchReport, Version,
};

use crate::args::ControlArgs;
use crate::control_socket;
use crate::status::{device_text, shorten, wrap};

/// The time between the two reports from which rates are computed.
const INTERVAL: Duration = Duration::from_secs(1);

/// Why a command fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// The daemon does not answer, or refuses.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The answer is not in the format of this version.
    #[error("the answer of virtionetd cannot be read ({0}): use the virtionetctl of its version")]
    Answer(#[from] serde_json::Error),
    /// A value cannot be used.
    #[error(transparent)]
    Value(#[from] ConfigError),
    /// An argument is not KEY=VALUE.
    #[error("{0:?} is not KEY=VALUE: write a value behind =")]
    NotKeyValue(String),
    /// A key that cannot be set.
    #[error("{0:?} cannot be changed while the device works: write link=up or link=down")]
    NotSettable(String),
    /// The daemon does not serve all devices.
    #[error("virtionetd is not ready: see its reasons above")]
    NotReady,
    /// The answer cannot be written.
    #[error("the answer cannot be written ({0}): check where standard output goes")]
    Write(#[source] io::Error),
}

type CommandResult = Result<(), CommandError>;

/// Prints one line for each device.
pub(crate) fn list(args: ControlArgs) -> CommandResult {
    answer(args, "GET", "/v1/devices", "", |report: Report| {
        table(&report)
    })
}

/// Prints one device, with its rates over a second.
pub(crate) fn show(name: &str, args: ControlArgs) -> CommandResult {
    let target = format!("/v1/devices/{}", escape(name));
    let control = control_socket::path(args.control);
    let first = client::change(&control, "GET", &target, "")?;
    if args.json {
        return print(&first);
    }
    let before: DeviceReport = serde_json::from_str(&first)?;
    let started_at = Instant::now();
    thread::sleep(INTERVAL);
    let second = client::change(&control, "GET", &target, "")?;
    let now = serde_json::from_str(&second)?;
    print(&device_text(Some(&before), &now, started_at.elapsed()))
}

/// Adds a device.
pub(crate) fn add(name: &str, values: &[String], args: ControlArgs) -> CommandResult {
    let mut body = BTreeMap::new();
    for item in values {
        let (key, text) = match item.split_once('=') {
            Some(pair) => pair,
            // As in --device.
            None if item == "client" || item == "postcopy" => (item.as_str(), "on"),
            None => return Err(CommandError::NotKeyValue(item.clone())),
        };
        let value = match GivenValue::of_text(key, text)? {
            GivenValue::Number(number) => number.into(),
            GivenValue::Switch(is_on) => is_on.into(),
            GivenValue::Text(_) | GivenValue::Other => Value::from(text),
        };
        body.insert(key.to_owned(), value);
    }
    let control = control_socket::path(args.control);
    let target = format!("/v1/devices/{}", escape(name));
    let body = serde_json::to_string(&body)?;
    let (status, answer) = client::request(&control, "PUT", &target, &body)?;
    let answer = client::accept(&control, status, answer)?;
    match (status, args.json) {
        (_, true) => print(&answer),
        (201, false) => print(&format!("{name}: added, waiting for a front-end")),
        (_, false) => print(&format!("{name}: there already, unchanged")),
    }
}

/// Removes a device.
pub(crate) fn remove(name: &str, args: ControlArgs) -> CommandResult {
    let target = format!("/v1/devices/{}", escape(name));
    answer(args, "DELETE", &target, "", |_: Value| {
        format!("{name}: removed")
    })
}

/// Changes a device.
pub(crate) fn set(name: &str, values: &[String], args: ControlArgs) -> CommandResult {
    let mut body = BTreeMap::new();
    for item in values {
        match item.split_once('=') {
            Some(("link", value @ ("up" | "down"))) => _ = body.insert("link", value),
            Some(_) => return Err(CommandError::NotSettable(item.clone())),
            None => return Err(CommandError::NotKeyValue(item.clone())),
        }
    }
    let body = json!(body).to_string();
    let target = format!("/v1/devices/{}", escape(name));
    answer(args, "PATCH", &target, &body, |state: Value| {
        let link = state["link"].as_str().unwrap_or("unknown");
        format!("{name}: link {link}")
    })
}

/// Lets the daemon read its configuration again.
pub(crate) fn reload(dry_run: bool, args: ControlArgs) -> CommandResult {
    let target = format!("/v1/reload?dry-run={dry_run}");
    answer(args, "POST", &target, "", |reload: Reload| {
        let mut text = String::new();
        let verbs = match reload.dry_run {
            true => ["would be added", "would be removed", "would be changed"],
            false => ["added", "removed", "changed"],
        };
        let names = [&reload.added, &reload.removed, &reload.changed];
        for (verb, names) in verbs.into_iter().zip(names) {
            if !names.is_empty() {
                text += &wrap("", &format!("{verb}: {}", names.join(", ")));
            }
        }
        text + &format!("unchanged: {}", reload.unchanged.len())
    })
}

/// Prints the switches, or the one called `name`.
pub(crate) fn show_switches(name: Option<&str>, args: ControlArgs) -> CommandResult {
    match name {
        None => answer(args, "GET", "/v1/switches", "", |all: Vec<SwitchReport>| {
            all.iter().map(switch_text).collect()
        }),
        Some(name) => {
            let target = format!("/v1/switches/{}", escape(name));
            answer(args, "GET", &target, "", |switch: SwitchReport| {
                switch_text(&switch)
            })
        }
    }
}

/// Prints what a switch has learned.
pub(crate) fn show_addresses(name: &str, args: ControlArgs) -> CommandResult {
    let target = format!("/v1/switches/{}", escape(name));
    answer(args, "GET", &target, "", |switch: SwitchReport| {
        let mut text = format!("{:<17}  {}\n", "address", "device");
        for address in &switch.addresses {
            let device = match (&address.device, &switch.tap) {
                (Some(device), _) => device.clone(),
                (None, Some(tap)) => format!("the host, behind TAP {tap}"),
                (None, None) => "the host".into(),
            };
            text += &format!("{:<17}  {}\n", address.mac, shorten(&device, 60));
        }
        text
    })
}

/// Prints whether the daemon serves its devices.
pub(crate) fn health(args: ControlArgs) -> CommandResult {
    let control = control_socket::path(args.control);
    let (_, body) = client::request(&control, "GET", "/v1/health", "")?;
    let health: Health = serde_json::from_str(&body)?;
    if args.json {
        print(&body)?;
    } else {
        let mut text = String::new();
        for problem in &health.reasons {
            let device = problem.device.as_deref().unwrap_or("virtionetd");
            text += &wrap("", &format!("{device}: {}", problem.reason));
        }
        print(&match health.ready {
            true => "ready".into(),
            false => text,
        })?;
    }
    match health.ready {
        true => Ok(()),
        false => Err(CommandError::NotReady),
    }
}

/// Prints the version of the daemon.
pub(crate) fn version(args: ControlArgs) -> CommandResult {
    answer(args, "GET", "/v1/version", "", |version: Version| {
        format!(
            "virtionetd {}, API {}",
            version.version,
            version.api.join(", ")
        )
    })
}

/// Sends a request, and prints the answer as JSON or as `render` writes it.
fn answer<T: DeserializeOwned>(
    args: ControlArgs,
    method: &str,
    target: &str,
    body: &str,
    render: impl FnOnce(T) -> String,
) -> CommandResult {
    let control = control_socket::path(args.control);
    let text = request(&control, method, target, body)?;
    match args.json {
        true => print(&text),
        false => print(&render(serde_json::from_str(&text)?)),
    }
}

fn request(control: &Path, method: &str, target: &str, body: &str) -> Result<String, ClientError> {
    client::change(control, method, target, body)
}

fn print(text: &str) -> CommandResult {
    match writeln!(io::stdout(), "{}", text.trim_end()) {
        // The reader, such as head, has closed the pipe because it needs no more.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(CommandError::Write),
    }
}

/// `name` as a part of a path: the characters that names may not have are escaped.
fn escape(name: &str) -> String {
    let mut escaped = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' => {
                escaped.push(char::from(byte));
            }
            _ => escaped += &format!("%{byte:02X}"),
        }
    }
    escaped
}

/// One line for each device, of at most 80 characters.
fn table(report: &Report) -> String {
    let mut text = row(["device", "link", "front-end", "pairs", "uplink", "socket"]);
    for device in &report.devices {
        let frontend = match (
            device.connected,
            device.frontend.as_ref().and_then(|f| f.pid),
        ) {
            (true, Some(pid)) => pid.to_string(),
            (true, None) => "connected".into(),
            (false, _) => "-".into(),
        };
        let link = match (device.link, device.uplink.up) {
            (LinkState::Down, _) => "down",
            (LinkState::Up, false) => "uplink!",
            (LinkState::Up, true) => "up",
        };
        let uplink = match device.uplink.name.as_str() {
            "" | "null" => device.uplink.kind.clone(),
            name => format!("{} {name}", device.uplink.kind),
        };
        let role = match device.role {
            SocketRole::Client => "to ",
            SocketRole::Server | SocketRole::Inherited => "",
        };
        text += &row([
            &shorten(&device.name, 16),
            link,
            &frontend,
            &device.pairs.len().to_string(),
            &shorten(&uplink, 15),
            &shorten(&format!("{role}{}", device.socket), 21),
        ]);
    }
    text
}

/// One line of the table of devices, of at most 80 characters.
fn row(columns: [&str; 6]) -> String {
    let [name, link, frontend, pairs, uplink, socket] = columns;
    let line = format!("{name:<16}  {link:<7} {frontend:>9} {pairs:>5}  {uplink:<15} {socket}");
    line.trim_end().to_owned() + "\n"
}

fn switch_text(switch: &SwitchReport) -> String {
    let devices = match switch.devices.as_slice() {
        [] => "no devices".into(),
        devices => format!("devices {}", devices.join(", ")),
    };
    let tap = match &switch.tap {
        Some(tap) => format!("; TAP {tap}"),
        None => String::new(),
    };
    let addresses = switch.addresses.len();
    let text = format!("{}: {devices}{tap}; {addresses} addresses", switch.name);
    wrap("", &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_of_devices_fits_80_columns_whatever_their_names_are() {
        let long = "x".repeat(64);
        let report = json!({"version": "0.1.0", "devices": [{
            "name": long, "socket": format!("/run/{long}.sock"), "role": "client",
            "connected": true, "link": "down",
            "frontend": {"pid": 4_194_304, "features": [], "protocol_features": []}, "memory": [],
            "uplink": {"kind": "tap", "name": long}, "mtu": null, "warnings": [], "advice": [],
            "interrupts": {"mode": "off", "settings": [], "notes": []}, "pairs": [],
        }]});
        let text = table(&serde_json::from_value(report).unwrap());
        assert_eq!(text.lines().count(), 2);
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
        assert!(text.contains("down") && text.contains("4194304"), "{text}");
    }

    #[test]
    fn names_are_escaped_in_paths() {
        assert_eq!(escape("vnet-0.a_B"), "vnet-0.a_B");
        assert_eq!(escape("a/b ?"), "a%2Fb%20%3F");
    }

    #[test]
    fn switch_is_shown_with_its_ports() {
        let switch = json!({"name": "lan", "tap": "t0", "devices": ["a", "b"], "addresses": []});
        let text = switch_text(&serde_json::from_value(switch).unwrap());
        assert_eq!(text, "lan: devices a, b; TAP t0; 0 addresses\n");
    }
}
