//! The kinds of values, and words that are nearly those of keys.

/// The kind of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueKind {
    /// A text.
    Text,
    /// The path of a file, which need not be UTF-8 in a flag.
    Path,
    /// A whole number.
    Number,
    /// A whole number or a word.
    NumberOrWord,
    /// On or off.
    Switch,
    /// A file mode in octal.
    Octal,
}

impl ValueKind {
    /// What a file may have as the value, in words.
    #[must_use]
    pub(crate) fn expected(self) -> &'static str {
        match self {
            Self::Text | Self::Path => "a text in quotes",
            Self::Number => "a whole number without quotes",
            Self::NumberOrWord => "a whole number, or a word in quotes",
            Self::Switch => "true or false",
            Self::Octal => "octal digits in quotes, such as \"660\"",
        }
    }

    /// `value` as a file spells it.
    #[must_use]
    pub(crate) fn to_toml(self, value: &str) -> String {
        let is_number = value.parse::<i64>().is_ok();
        match (self, value) {
            (Self::Switch, "on") => "true".into(),
            (Self::Switch, "off") => "false".into(),
            (Self::Number, _) => value.into(),
            (Self::NumberOrWord, _) if is_number => value.into(),
            _ => format!("{value:?}"),
        }
    }
}

/// The most similar one of `names` to `word`; `None` where no name is similar.
#[must_use]
pub(crate) fn find_nearest(
    word: &str,
    names: impl IntoIterator<Item = &'static str>,
) -> Option<&'static str> {
    let word = word.to_lowercase().replace('_', "-");
    names
        .into_iter()
        .map(|name| (strsim::jaro_winkler(&word, name), name))
        .filter(|(similarity, _)| *similarity > 0.8)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}
