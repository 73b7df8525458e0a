//! Lists of the form `KEY=VALUE,KEY=VALUE,...`, in which a doubled comma stands for one inside of a
//! value.

/// An item of a list that is not `KEY=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not KEY=VALUE: write a value behind =, and a comma inside a value twice")]
pub struct KeyValueError(pub String);

/// The items of `text` between single commas, with doubled commas replaced by single ones.
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

/// The key and the value of `item`. An item in `flags` may stand without a value, and then has the
/// value `on`.
///
/// # Errors
/// When there is no value.
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
    fn single_commas_separate_and_doubled_ones_stand_for_themselves() {
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
    fn an_item_has_a_key_and_a_value_or_is_a_flag() {
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
