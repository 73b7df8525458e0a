//! virtionetd's command line and configuration file for a plan.

use virtionet_config::Key;
use virtionet_config::cli::{self, CliError};

use super::error::PlanError;
use super::guest_plan::{GuestPlan, NetDevicePlan, path_text};

/// Virtionetd's part in the connection to the front-end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SocketRole {
    /// virtionetd creates the sockets. QEMU connects, and connects again when virtionetd is
    /// restarted.
    Listens,
    /// virtionetd connects to the sockets of QEMU, as libvirt starts it.
    Connects,
}

/// The words of virtionetd's command line, in lines.
pub(super) fn command(plan: &GuestPlan, role: SocketRole) -> Vec<Vec<String>> {
    let mut first = vec!["virtionetd".to_owned(), Key::CONTROL.flag()];
    first.push(path_text(&plan.control));
    let mut lines = vec![first];
    let common: Vec<String> = common_settings(plan)
        .into_iter()
        .flat_map(|(key, value)| [key.flag(), value])
        .collect();
    if !common.is_empty() {
        lines.push(common);
    }
    if role == SocketRole::Connects {
        lines.push(vec![Key::CLIENT.flag()]);
    }
    let is_single = plan.net_devices.len() == 1;
    for device in &plan.net_devices {
        let settings = device_settings(device);
        lines.push(match is_single {
            true => settings
                .into_iter()
                .flat_map(|(key, value)| [key.flag(), value])
                .collect(),
            false => {
                let items: Vec<String> = settings
                    .into_iter()
                    .map(|(key, value)| format!("{}={}", key.name, value.replace(',', ",,")))
                    .collect();
                vec!["--device".into(), items.join(",")]
            }
        });
    }
    lines
}

/// The settings that all network devices have in common, except those with the daemon's defaults.
fn common_settings(plan: &GuestPlan) -> Vec<(Key, String)> {
    let placement = plan.request.placement.to_string();
    let poll = &plan.request.poll;
    let set = [
        (
            Key::PLACEMENT,
            Some(placement).filter(|mode| mode != "auto"),
        ),
        (Key::POLL, poll.mode.clone()),
        (Key::POLL_US, poll.us.clone()),
    ];
    set.into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
        .collect()
}

/// The settings of one network device.
fn device_settings(device: &NetDevicePlan) -> [(Key, String); 4] {
    [
        (Key::NAME, device.device.clone()),
        (Key::SOCKET_PATH, path_text(&device.socket)),
        (Key::QUEUES, device.pairs.to_string()),
        (Key::UPLINK, device.uplink.clone()),
    ]
}

/// The configuration file with the same settings as the command line where virtionetd listens.
pub(super) fn config(plan: &GuestPlan) -> String {
    let control = toml_string(&path_text(&plan.control));
    let mut text = format!("{} = {control}\n", Key::CONTROL.name);
    for device in &plan.net_devices {
        text += "\n[[device]]\n";
        let settings = device_settings(device).into_iter();
        for (key, value) in settings.chain(common_settings(plan)) {
            let value = match key {
                Key::QUEUES | Key::POLL_US => value,
                _ => toml_string(&value),
            };
            text += &format!("{} = {value}\n", key.name);
        }
    }
    text
}

/// A basic string of TOML, which has the same escapes as a string of JSON.
fn toml_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Parses the command lines with the daemon's parser, so that no plan is printed that the daemon
/// refuses.
pub(super) fn check(plan: &GuestPlan) -> Result<(), PlanError> {
    for role in [SocketRole::Listens, SocketRole::Connects] {
        let words = command(plan, role).into_iter().flatten();
        match cli::parse(words.map(Into::into)) {
            Ok(_) => {}
            Err(CliError::Moved(command)) => return Err(PlanError::ValueIsCommand(command)),
            Err(CliError::Config(error)) => return Err(error.into()),
            Err(CliError::Flags(error)) => {
                // The further lines describe the usage of virtionetd.
                let text = error.to_string();
                let first = text.lines().next().unwrap_or_default();
                let reason = first.trim_start_matches("error: ");
                return Err(PlanError::ValueIsFlag(reason.into()));
            }
        }
    }
    Ok(())
}
