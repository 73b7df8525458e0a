//! Quoting for a shell.

/// The text of a command whose words are given in lines. Words are quoted where necessary, and
/// lines are continued with a backslash.
pub(super) fn join_lines(lines: &[Vec<String>]) -> String {
    let lines: Vec<String> = lines
        .iter()
        .map(|words| {
            let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
            words.join(" ")
        })
        .collect();
    lines.join(" \\\n  ") + "\n"
}

/// Quotes `word` where a shell would otherwise change it.
pub(super) fn quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    if word.starts_with(|c: char| c != '=' && is_plain(c)) && word.chars().all(is_plain) {
        return word.into();
    }
    // Quoting fails only for a zero byte, which no word has.
    shlex::try_quote(word).map_or_else(|_| String::new(), |quoted| quoted.into_owned())
}
