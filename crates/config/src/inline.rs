//! One `--device`: its keys as `KEY=VALUE,...`.

use virtionet_base::key_value::{split_at_commas, split_item};

use crate::settings::{SettingValue, Origin, Settings};
use crate::keys::Key;
use crate::problem::Problem;

/// Reads the text of one `--device`, which is `place`.
///
/// # Errors
/// A key that is unknown, lacks its value or comes twice.
pub fn parse_device_keys(text: &str, origin: &Origin) -> Result<Settings, Problem> {
    let mut settings = Settings::default();
    for item in split_at_commas(text) {
        let (name, value) = split_item(&item, &["client"])
            .map_err(|error| origin.problem(format_args!("{error}")))?;
        let key = Key::find(name).ok_or_else(|| {
            origin.problem(format_args!(
                "the key {name:?} is not known: use {}",
                Key::names()
            ))
        })?;
        if settings.insert(key, SettingValue::new(value, origin)) {
            return Err(origin.problem(format_args!("{name} is given twice: keep one of them")));
        }
    }
    Ok(settings)
}
