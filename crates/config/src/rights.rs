//! The rights of the process: its sandbox, its user, and what its helper may do.

use virtionet_base::PatternError;
use virtionet_base::key_value::{split_at_commas, split_item};

use crate::keys::Key;
use crate::problem::{Problem, ProblemCode};
use crate::settings::{SettingValue, Settings};
use crate::types::{HelperConfig, IdentityConfig, SandboxMode};

/// The sandbox mode of the process.
///
/// # Errors
/// When its name is unknown.
pub(crate) fn sandbox_mode(process: &Settings) -> Result<SandboxMode, Problem> {
    let Some(value) = process.get(Key::SANDBOX) else {
        return Ok(SandboxMode::default());
    };
    let name = value.text();
    SandboxMode::find(&name).ok_or_else(|| {
        value.origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{} is not known: write on, off or log",
                value.origin.set(Key::SANDBOX, &name)
            ),
        )
    })
}

/// The user and the group of the process.
///
/// # Errors
/// When one of them is empty, or only the group is set.
pub(crate) fn identity(process: &Settings) -> Result<IdentityConfig, Problem> {
    let name = |key: Key| match process.get(key) {
        Some(value) if value.value.is_empty() => Err(value.origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{} is empty: write a name or a number",
                value.origin.key(key)
            ),
        )),
        value => Ok(value.map(|value| value.text().into_owned())),
    };
    let identity = IdentityConfig {
        user: name(Key::USER)?,
        group: name(Key::GROUP)?,
    };
    match (process.get(Key::GROUP), &identity.user) {
        (Some(group), None) => Err(group.origin.problem(
            ProblemCode::KeyUnused,
            format_args!(
                "{} has no effect without a user: add {}, or leave {} out",
                group.origin.set(Key::GROUP, group.text()),
                group.origin.set(Key::USER, "NAME"),
                group.origin.key(Key::GROUP),
            ),
        )),
        _ => Ok(identity),
    }
}

/// The helper; `None` for none.
///
/// # Errors
/// When a value cannot be read, or something is allowed to a helper that is off.
pub(crate) fn helper(process: &Settings) -> Result<Option<HelperConfig>, Problem> {
    let is_on = match process.get(Key::HELPER) {
        None => true,
        Some(value) => match &*value.text() {
            "on" => true,
            "off" => false,
            other => {
                return Err(value.origin.problem(
                    ProblemCode::ValueInvalid,
                    format_args!(
                        "{} is not known: write on or off",
                        value.origin.set(Key::HELPER, other)
                    ),
                ));
            }
        },
    };
    match process.get(Key::HELPER_ALLOW) {
        None => Ok(is_on.then(HelperConfig::default)),
        Some(value) if is_on => allowed(value).map(Some),
        Some(value) => Err(value.origin.problem(
            ProblemCode::KeyUnused,
            format_args!(
                "{} has no effect without a helper: leave one of {} and {} out",
                value.origin.set(Key::HELPER_ALLOW, value.text()),
                value.origin.key(Key::HELPER_ALLOW),
                value.origin.key(Key::HELPER),
            ),
        )),
    }
}

fn allowed(value: &SettingValue) -> Result<HelperConfig, Problem> {
    let text = value.text();
    let invalid = |item: &str| {
        value.origin.problem(
            ProblemCode::ValueInvalid,
            format_args!(
                "{}: {item:?} is not known: write tap=PATTERN, bridge=PATTERN or socket=PATTERN",
                value.origin.set(Key::HELPER_ALLOW, &text)
            ),
        )
    };
    let mut helper = HelperConfig::default();
    for item in split_at_commas(&text) {
        let (kind, pattern) = split_item(&item, &[]).map_err(|_| invalid(&item))?;
        let patterns = match kind {
            "tap" => &mut helper.taps,
            "bridge" => &mut helper.bridges,
            "socket" => &mut helper.sockets,
            _ => return Err(invalid(&item)),
        };
        let pattern = pattern.parse();
        patterns.push(pattern.map_err(|error| no_pattern(value, &item, &error))?);
    }
    Ok(helper)
}

/// The problem that the pattern of `item` cannot be read.
fn no_pattern(value: &SettingValue, item: &str, error: &PatternError) -> Problem {
    value.origin.problem(
        ProblemCode::ValueInvalid,
        format_args!(
            "{}: {item:?} has no valid pattern ({error}): write * for any characters, ? for one and [abc] for one of these",
            value.origin.set(Key::HELPER_ALLOW, value.text())
        ),
    )
}
