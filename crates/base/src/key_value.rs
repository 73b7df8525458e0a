//! Lists of the form `KEY=VALUE,KEY=VALUE,...`. Two commas in a row stand for one comma in a value,
//! as in QEMU's options.

/// The error of an item that is not `KEY=VALUE`. It holds the item.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not KEY=VALUE: write a value behind =, and a comma inside a value twice")]
pub struct KeyValueError(pub String);

/// Splits `text` at single commas. In the items, two commas in a row are replaced by one.
#[must_use]
pub fn split_at_commas(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}

/// Splits `item` into its key and its value. An item that is listed in `flags` may have no value;
/// its value is then `on`.
///
/// # Errors
/// When there is no `=`, or nothing behind it.
pub fn split_item<'a>(item: &'a str, flags: &[&str]) -> Result<(&'a str, &'a str), KeyValueError> {
    match item.split_once('=') {
        Some((key, value)) if !value.is_empty() => Ok((key, value)),
        None if flags.contains(&item) => Ok((item, "on")),
        _ => Err(KeyValueError(item.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_with_single_and_double_commas_is_split_at_single_ones() {
        for (text, items) in [
            ("", vec![""]),
            ("a", vec!["a"]),
            ("a,b", vec!["a", "b"]),
            ("a,,b", vec!["a,b"]),
            ("a,,,b", vec!["a,", "b"]),
            ("a,,,,b,", vec!["a,,b", ""]),
        ] {
            assert_eq!(split_at_commas(text), items, "{text:?}");
        }
    }

    #[test]
    fn item_without_value_is_refused_unless_it_is_a_flag() {
        assert_eq!(split_item("a=b=c", &[]), Ok(("a", "b=c")));
        assert_eq!(split_item("client", &["client"]), Ok(("client", "on")));
        for item in ["a", "a=", ""] {
            assert_eq!(
                split_item(item, &["client"]),
                Err(KeyValueError(item.into()))
            );
        }
    }
}
