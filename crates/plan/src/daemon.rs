//! virtionetd's command line and configuration file.

use super::PlanError;
use super::guest_plan::{GuestPlan, NetDevicePlan, path_text};
use virtionet_config::cli::{self, CliError};

/// Who makes the vhost-user sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SocketRole {
    /// virtionetd: QEMU connects, and again when virtionetd was restarted.
    Listens,
    /// QEMU, as libvirt starts it.
    Connects,
}

/// The command, by lines.
pub(super) fn command(plan: &GuestPlan, role: SocketRole) -> Vec<Vec<String>> {
    let mut first = vec!["virtionetd".to_owned(), "--control".into()];
    first.push(path_text(&plan.control));
    let mut lines = vec![first];
    let common: Vec<String> = common(plan)
        .into_iter()
        .flat_map(|(key, value)| [format!("--{key}"), value])
        .collect();
    if !common.is_empty() {
        lines.push(common);
    }
    if role == SocketRole::Connects {
        lines.push(vec!["--client".into()]);
    }
    let one = plan.cards.len() == 1;
    for card in &plan.cards {
        let keys = keys(card);
        lines.push(match one {
            true => keys
                .into_iter()
                .flat_map(|(key, value)| [format!("--{key}"), value])
                .collect(),
            false => {
                let keys: Vec<String> = keys
                    .into_iter()
                    .map(|(key, value)| format!("{key}={}", value.replace(',', ",,")))
                    .collect();
                vec!["--device".into(), keys.join(",")]
            }
        });
    }
    lines
}

/// The settings that all network devices have in common, without the daemon's defaults.
fn common(plan: &GuestPlan) -> Vec<(&'static str, String)> {
    let placement = plan.request.placement.to_string();
    let poll = &plan.request.poll;
    let set = [
        ("placement", Some(placement).filter(|mode| mode != "auto")),
        ("poll", poll.mode.clone()),
        ("poll-us", poll.us.clone()),
    ];
    set.into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
        .collect()
}

/// The keys of one network device.
fn keys(card: &NetDevicePlan) -> [(&'static str, String); 4] {
    [
        ("name", card.device.clone()),
        ("socket-path", path_text(&card.socket)),
        ("queues", card.pairs.to_string()),
        ("uplink", card.uplink.clone()),
    ]
}

/// The configuration file that says the same as the command where virtionetd listens.
pub(super) fn config(plan: &GuestPlan) -> String {
    let mut text = format!("control = {}\n", toml_string(&path_text(&plan.control)));
    for card in &plan.cards {
        text += "\n[[device]]\n";
        for (key, value) in keys(card).into_iter().chain(common(plan)) {
            let value = match key {
                "queues" | "poll-us" => value,
                _ => toml_string(&value),
            };
            text += &format!("{key} = {value}\n");
        }
    }
    text
}

/// A basic string of TOML, whose escapes are JSON's.
fn toml_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Reads the command lines as the daemon does, so that nothing is printed that the daemon refuses.
pub(super) fn check(plan: &GuestPlan) -> Result<(), PlanError> {
    for role in [SocketRole::Listens, SocketRole::Connects] {
        let words = command(plan, role).into_iter().flatten();
        match cli::parse(words.map(Into::into)) {
            Ok(_) => {}
            Err(CliError::Moved(command)) => {
                return Err(PlanError::Usage(format!(
                    "virtionetd takes {command:?} for a command: choose other values"
                )));
            }
            Err(CliError::Config(why)) => return Err(PlanError::Usage(why.to_string())),
            // A value that looks like a flag; the other lines are about the daemon's own usage.
            Err(CliError::Flags(why)) => {
                let why = why.to_string();
                let first = why.lines().next().unwrap_or_default();
                return Err(PlanError::Usage(format!(
                    "virtionetd refuses a value: {}; write values that begin with no dash",
                    first.trim_start_matches("error: ")
                )));
            }
        }
    }
    Ok(())
}
