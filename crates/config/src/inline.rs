//! Parser of the text of one `--device`, which has the form `KEY=VALUE,...`.

use virtionet_base::key_value::{split_at_commas, split_item};

use crate::keys::{Key, ValueKind};
use crate::problem::{Problem, ProblemCode};
use crate::settings::{Origin, SettingValue, Settings};

/// Parses the text of one `--device`, which is at `origin`.
///
/// # Errors
/// When a key is unknown, has no value or is given twice.
pub(crate) fn parse_device_keys(text: &str, origin: &Origin) -> Result<Settings, Problem> {
    let switches: Vec<&str> = Key::of_devices()
        .filter(|key| key.kind == ValueKind::Switch)
        .map(|key| key.name)
        .collect();
    let mut settings = Settings::default();
    for item in split_at_commas(text) {
        let (name, value) = split_item(&item, &switches)
            .map_err(|error| origin.problem(ProblemCode::ValueMissing, format_args!("{error}")))?;
        let key = Key::find(name).ok_or_else(|| {
            let names = Key::names();
            origin.problem(
                ProblemCode::KeyUnknown,
                format_args!("the key {name:?} is not known: use {names}"),
            )
        })?;
        if settings.insert(key, SettingValue::new(value, origin)) {
            return Err(origin.problem(
                ProblemCode::KeyRepeated,
                format_args!("{name} is given twice: keep one of them"),
            ));
        }
    }
    Ok(settings)
}
