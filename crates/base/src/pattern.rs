//! Patterns of names and paths.

use std::fmt;
use std::path::{Component, Path};
use std::str::FromStr;

use glob::MatchOptions;

/// A pattern, in which `*` stands for any characters, `?` for one, and `[abc]` for one of those
/// listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(glob::Pattern);

/// The error of a text that is no pattern: what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PatternError(&'static str);

impl Pattern {
    /// Whether the whole of `name` matches.
    #[must_use]
    pub fn matches_name(&self, name: &str) -> bool {
        self.0.matches(name)
    }

    /// Whether the whole of `path` matches. `*` and `?` do not stand for `/` here, and a path with
    /// a component `..` never matches, because it leads elsewhere than its text says.
    #[must_use]
    pub fn matches_path(&self, path: &Path) -> bool {
        let options = MatchOptions {
            require_literal_separator: true,
            ..MatchOptions::default()
        };
        let mut components = path.components();
        self.0.matches_path_with(path, options)
            && !components.any(|part| part == Component::ParentDir)
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let pattern = glob::Pattern::new(text);
        pattern.map(Self).map_err(|error| PatternError(error.msg))
    }
}

/// The text from which it was parsed.
impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        let pattern: Pattern = text.parse().unwrap();
        assert_eq!(pattern.to_string(), text);
        pattern
    }

    #[test]
    fn name_matches_as_a_whole() {
        for (text, name, matches) in [
            ("vnet*", "vnet", true),
            ("vnet*", "vnet12", true),
            ("vnet*", "avnet1", false),
            ("tap?", "tap1", true),
            ("tap?", "tap12", false),
            ("tap[13]", "tap3", true),
            ("tap[13]", "tap2", false),
            ("tap0", "tap00", false),
        ] {
            assert_eq!(pattern(text).matches_name(name), matches, "{text} {name}");
        }
    }

    #[test]
    fn path_matches_in_one_folder_and_never_goes_up() {
        let sockets = pattern("/run/qemu/*.sock");
        for (path, matches) in [
            ("/run/qemu/7.sock", true),
            ("/run/qemu/x/7.sock", false),
            ("/run/qemu/../7.sock", false),
            ("/run/docker.sock", false),
        ] {
            assert_eq!(sockets.matches_path(Path::new(path)), matches, "{path}");
        }
        assert!(!pattern("/run/**/*.sock").matches_path(Path::new("/run/../a.sock")));
    }

    #[test]
    fn text_that_is_no_pattern_is_refused_with_the_reason() {
        for (text, reason) in [
            ("tap[", "invalid range pattern"),
            (
                "/run/***",
                "wildcards are either regular `*` or recursive `**`",
            ),
            (
                "/run/a**",
                "recursive wildcards must form a single path component",
            ),
        ] {
            let error = text.parse::<Pattern>().unwrap_err();
            assert_eq!(error.to_string(), reason, "{text}");
        }
    }
}
