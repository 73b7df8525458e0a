//! `virtionetctl status`: the state of a running virtionetd. The rates come from two reports that
//! are one second apart.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use virtionet_control::client::{self, ClientError};
use virtionet_control::v1::{
    Counters, DeviceReport, HelperState, QueuePairReport, Report, RightsReport, SocketRole,
};

use crate::control_socket;

/// The time between the two reports.
const INTERVAL: Duration = Duration::from_secs(1);
/// The largest width of a line, in characters.
const WIDTH: usize = 80;

/// The counters of a vring that count neither drops nor faults. Every other counter is shown when
/// it is not zero, so that the counters of a later daemon are shown too.
const TRAFFIC_COUNTERS: [&str; 7] = [
    "frames",
    "bytes",
    "bursts",
    "kicks",
    "calls",
    "calls_failed",
    "rx_starved",
];

/// Why the status cannot be printed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    /// The daemon does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The status cannot be written.
    #[error("the status cannot be written ({0}): check where standard output goes")]
    Write(#[source] io::Error),
}

/// Prints the status of the daemon whose control socket is `control`, or the default socket. The
/// status is the daemon's JSON if `is_json`, otherwise text.
///
/// # Errors
/// When the daemon does not answer or the output cannot be written.
pub(crate) fn print(control: Option<PathBuf>, is_json: bool) -> Result<(), StatusError> {
    let control = control_socket::path(control);
    let text = match is_json {
        true => client::devices_json(&control)?,
        false => measure(&control)?,
    };
    match writeln!(io::stdout(), "{}", text.trim_end()) {
        // The reader, such as head, has closed the pipe because it needs no more.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(StatusError::Write),
    }
}

/// The text of the status, for which the daemon is asked twice.
fn measure(control: &Path) -> Result<String, ClientError> {
    let first = client::devices(control)?;
    let started_at = Instant::now();
    thread::sleep(INTERVAL);
    let second = client::devices(control)?;
    Ok(render(&first, &second, started_at.elapsed()))
}

/// The text for the report `now`, with the rates since the report `before`, which is older by
/// `elapsed`.
fn render(before: &Report, now: &Report, elapsed: Duration) -> String {
    let plural = if now.devices.len() == 1 { "" } else { "s" };
    let mut text = format!(
        "virtionetd {}: {} device{plural}\n",
        now.version,
        now.devices.len()
    );
    if let Some(rights) = &now.rights {
        text += &rights_text(rights);
    }
    for device in &now.devices {
        let earlier = before.devices.iter().find(|old| old.name == device.name);
        text.push('\n');
        text += &device_text(earlier, device, elapsed);
    }
    text
}

/// One line: what the daemon may do, and who does the rest for it.
fn rights_text(rights: &RightsReport) -> String {
    let capabilities = match rights.capabilities.as_slice() {
        [] => "no capabilities".into(),
        some => some.join(", "),
    };
    let helper = match (rights.helper, rights.helper_pid) {
        (HelperState::Running, Some(pid)) => format!(
            "helper process {pid} opens TAPs, sets MTUs, writes CPU masks and connects for it"
        ),
        (HelperState::Running | HelperState::Off, _) => "no helper".into(),
        (HelperState::Lost, _) => "the helper has ended: restart virtionetd".into(),
    };
    let RightsReport { sandbox, user, .. } = rights;
    format!("  sandbox {sandbox}, user {user}, {capabilities}; {helper}\n")
}

pub(crate) fn device_text(
    before: Option<&DeviceReport>,
    now: &DeviceReport,
    elapsed: Duration,
) -> String {
    let role = match now.role {
        SocketRole::Server => "listens on",
        SocketRole::Client => "connects to",
        SocketRole::Inherited => "uses",
    };
    let front_end = match (now.connected, now.frontend.as_ref().and_then(|f| f.pid)) {
        (true, Some(pid)) => format!("front-end connected (process {pid})"),
        (true, None) => "front-end connected".into(),
        (false, _) => "no front-end connected".into(),
    };
    let uplink = match now.uplink.name.as_str() {
        "" => now.uplink.kind.clone(),
        name => format!("{} {name}", now.uplink.kind),
    };
    let features = match &now.features_compat {
        Some(version) => format!("; features of {version}"),
        None => String::new(),
    };
    let head = format!(
        "{}: uplink {uplink}; {role} {}; {front_end}{features}",
        now.name, now.socket
    );
    let mut text = wrap("", &head);
    if !now.pairs.is_empty() {
        text += &row([
            "pair", "vCPU", "worker", "CPU", "busy", "RX/s", "RX bit/s", "TX/s", "TX bit/s",
        ]);
    }
    for pair in &now.pairs {
        let earlier = before.and_then(|device| {
            let mut pairs = device.pairs.iter();
            pairs.find(|old| old.pair == pair.pair)
        });
        text += &pair_text(earlier, pair, elapsed);
    }
    for pair in &now.pairs {
        for (direction, vring) in [("RX", &pair.rx), ("TX", &pair.tx)] {
            for (name, count) in drops(&vring.counters) {
                let drop = format!("pair {} {direction}: {name} {count}", pair.pair);
                text += &wrap("  drops: ", &drop);
            }
        }
    }
    for warning in &now.warnings {
        text += &wrap("  warning: ", warning);
    }
    for advice in &now.advice {
        text += &wrap("  advice: ", advice);
    }
    text
}

/// The drops and faults of a vring, by the names of their counters.
fn drops(counters: &Counters) -> impl Iterator<Item = (&str, u64)> {
    let all = counters.0.iter();
    all.map(|counter| (counter.name.as_ref(), counter.value))
        .filter(|(name, count)| *count > 0 && !TRAFFIC_COUNTERS.contains(name))
}

fn pair_text(before: Option<&QueuePairReport>, now: &QueuePairReport, elapsed: Duration) -> String {
    let growth = |block: fn(&QueuePairReport) -> &Counters, name: &str| {
        let old = block(before?).get(name)?;
        Some(block(now).get(name)?.saturating_sub(old))
    };
    let per_second = |count: Option<u64>| match count {
        Some(count) => with_prefix(rate(count, elapsed)),
        None => "-".into(),
    };
    let bits = |bytes: Option<u64>| per_second(bytes.map(|bytes| bytes.saturating_mul(8)));
    let cycles = before.map(|old| {
        let total = now
            .worker_load
            .cycles
            .saturating_sub(old.worker_load.cycles);
        (growth(|pair| &pair.worker_counters, "busy_cycles"), total)
    });
    let busy = match cycles {
        Some((Some(busy), total)) if total > 0 => {
            let percent = u128::from(busy) * 100 / u128::from(total);
            format!("{}%", percent.min(100))
        }
        _ => "-".into(),
    };
    row([
        &now.pair.to_string(),
        &now.vcpu.map_or_else(|| "-".into(), |vcpu| vcpu.to_string()),
        &now.worker,
        &shorten(&cpu_list(&now.cpus), 10),
        &busy,
        &per_second(growth(|pair| &pair.rx.counters, "frames")),
        &bits(growth(|pair| &pair.rx.counters, "bytes")),
        &per_second(growth(|pair| &pair.tx.counters, "frames")),
        &bits(growth(|pair| &pair.tx.counters, "bytes")),
    ])
}

/// One line of the table of queue pairs, which is 79 characters long.
fn row(columns: [&str; 9]) -> String {
    let [pair, vcpu, worker, cpus, busy, rx, rx_bits, tx, tx_bits] = columns;
    format!(
        "  {pair:>4} {vcpu:>5} {worker:<16} {cpus:<10} {busy:>4} \
         {rx:>7} {rx_bits:>8} {tx:>7} {tx_bits:>8}\n"
    )
}

/// The rate per second of `count` events in `elapsed`.
fn rate(count: u64, elapsed: Duration) -> u64 {
    let micros = elapsed.as_micros().max(1);
    let rate = u128::from(count) * 1_000_000 / micros;
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// `number`, with a decimal prefix (k, M, G or T) from 10,000 on.
fn with_prefix(number: u64) -> String {
    const PREFIXES: [&str; 5] = ["", "k", "M", "G", "T"];
    let mut scaled = number;
    let mut prefixes = PREFIXES.into_iter().peekable();
    let mut prefix = "";
    while let Some(next) = prefixes.next() {
        prefix = next;
        if scaled < 10_000 || prefixes.peek().is_none() {
            break;
        }
        scaled /= 1000;
    }
    format!("{scaled}{prefix}")
}

/// CPUs in ascending order as ranges, such as `0-3,8`.
fn cpu_list(cpus: &[u32]) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(cpu) => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let mut text = String::new();
    for (at, (first, last)) in ranges.into_iter().enumerate() {
        let comma = if at == 0 { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = match first == last {
            true => write!(text, "{comma}{first}"),
            false => write!(text, "{comma}{first}-{last}"),
        };
    }
    text
}

/// `text`, cut off with a `+` where it has more than `width` characters.
pub(crate) fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.into();
    }
    let start: String = text.chars().take(width.saturating_sub(1)).collect();
    start + "+"
}

/// `prefix` and `text`, broken into lines of at most [`WIDTH`] characters, unless a single word is
/// longer.
pub(crate) fn wrap(prefix: &str, text: &str) -> String {
    let indent = " ".repeat(prefix.len().max(2));
    let mut lines = String::new();
    let mut line = String::from(prefix);
    let mut is_empty = true;
    for word in text.split_whitespace() {
        if !is_empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines += &line;
            lines.push('\n');
            line.clone_from(&indent);
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line += word;
        is_empty = false;
    }
    lines + &line + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(frames: u64, cycles: u64) -> Report {
        let vring = |frames: u64, dropped: u64| {
            serde_json::json!({"state": "running", "enabled": true, "size": 256, "counters": {
                "frames": frames, "bytes": frames * 100, "kicks": 3, "rx_starved": 1,
                "dropped_no_buffer": dropped, "chain_loop": 0,
            }})
        };
        let report = serde_json::json!({"version": "0.1.0", "devices": [{
            "name": "web", "socket": "/run/web.sock", "role": "server", "connected": true,
            "frontend": {"pid": 7, "features": [], "protocol_features": []}, "memory": [],
            "uplink": {"kind": "tap", "name": "tap0"}, "features_compat": "0.1.0", "mtu": null,
            "warnings": ["the vCPUs float, so no worker follows one: pin them with virsh vcpupin or with taskset"],
            "advice": [], "interrupts": {"mode": "off", "settings": [], "notes": []},
            "pairs": [{
                "pair": 0, "vcpu": 1, "vcpus": [1], "worker": "web-q0", "tid": 9,
                "cpus": [0, 1, 2, 8], "placement": "", "worker_node": null, "memory_node": null,
                "worker_counters": {"busy_cycles": cycles / 4},
                "worker_load": {"cycles": cycles, "busy_share": 0.25, "cycles_per_frame": 1.0},
                "rx": vring(frames, 5), "tx": vring(frames * 20, 0),
            }],
        }]});
        serde_json::from_value(report).unwrap()
    }

    #[test]
    fn status_shows_rates_drops_and_warnings_in_80_columns() {
        let text = render(&report(0, 0), &report(2_000, 1_000), Duration::from_secs(2));
        let expected = "\
virtionetd 0.1.0: 1 device

web: uplink tap tap0; listens on /run/web.sock; front-end connected (process 7);
  features of 0.1.0
  pair  vCPU worker           CPU        busy    RX/s RX bit/s    TX/s TX bit/s
     0     1 web-q0           0-2,8       25%    1000     800k     20k      16M
  drops: pair 0 RX: dropped_no_buffer 5
  warning: the vCPUs float, so no worker follows one: pin them with virsh
           vcpupin or with taskset
";
        assert_eq!(text, expected);
        assert!(text.lines().all(|line| line.len() <= WIDTH));
    }

    #[test]
    fn rates_of_a_device_without_earlier_report_are_unknown() {
        let mut before = report(0, 0);
        before.devices.clear();
        let text = render(&before, &report(1, 1), INTERVAL);
        let row = text.lines().find(|line| line.contains("web-q0")).unwrap();
        assert!(
            row.ends_with("-       -        -       -        -"),
            "{row}"
        );
    }

    #[test]
    fn numbers_have_a_decimal_prefix_from_10_000_on() {
        for (number, text) in [
            (0, "0"),
            (9_999, "9999"),
            (10_000, "10k"),
            (9_999_999, "9999k"),
            (10_000_000, "10M"),
            (u64::MAX, "18446744T"),
        ] {
            assert_eq!(with_prefix(number), text);
        }
    }
}
