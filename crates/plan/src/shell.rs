//! Words for a shell.

/// A command whose words come in lines, quoted where it needs to be, one line below the other.
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

/// `word` as a shell reads it back.
pub(super) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    if word.starts_with(|c: char| c != '=' && plain(c)) && word.chars().all(plain) {
        return word.into();
    }
    // Only a zero byte cannot be quoted, and no word has one.
    shlex::try_quote(word).map_or_else(|_| String::new(), |quoted| quoted.into_owned())
}
