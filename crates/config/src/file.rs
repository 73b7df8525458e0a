//! The configuration file (TOML): read as a whole, with the line of each value.
//!
//! ```toml
//! control = "/run/virtionetd.ctl"
//!
//! [defaults]
//! poll = "adaptive"
//!
//! [[device]]
//! name = "web"
//! socket-path = "/run/web.sock"
//! tap = "tap0"
//! ```

use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::given::{Given, Place, Settings};
use super::keys::{Holder, KEYS, Key, Kind, nearest};
use super::problem::{Problem, Problems};

/// Bytes of a file at most: hundreds of devices take a tenth of it.
const MAX_BYTES: u64 = 1 << 20;
/// Letters of a line that a problem shows of it.
const SHOWN: usize = 80;

/// What may stand at the top of a file.
const TOP: [&str; 3] = ["control", "defaults", "device"];

/// What a file says.
#[derive(Debug, Default)]
pub struct File {
    /// Where the control server answers.
    pub control: Option<Given>,
    /// What devices have that do not say otherwise.
    pub defaults: Settings,
    /// Each device, and where it begins.
    pub devices: Vec<(Place, Settings)>,
    /// Whether it can be read at all, so that what it lacks is worth a word.
    pub whole: bool,
}

/// Reads the file at `path`; what is wrong with it becomes `problems`.
#[must_use]
pub fn read(path: &Path, problems: &mut Problems) -> File {
    match bounded(path).map(String::from_utf8) {
        Ok(Ok(text)) => parse(path, &text, problems),
        Ok(Err(error)) => {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
            problems.add(Problem::in_line(
                &path.into(),
                line,
                "the file is no text in UTF-8: save it as one".into(),
            ));
            File::default()
        }
        Err(error) => {
            problems.add(Problem::new(format!(
                "cannot read {}: {error}; name a configuration file that exists and that this user may read",
                path.display()
            )));
            File::default()
        }
    }
}

/// The bytes of the file at `path`; an error where they have no end in sight.
fn bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    match u64::try_from(bytes.len()) {
        Ok(..=MAX_BYTES) => Ok(bytes),
        _ => Err(io::Error::other("it is larger than 1 MiB")),
    }
}

/// Reads `text`, the content of the file at `path`; what is wrong with it becomes `problems`.
#[must_use]
pub fn parse(path: &Path, text: &str, problems: &mut Problems) -> File {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader {
        path: path.into(),
        text,
        broken: Vec::new(),
        problems,
        file: File::default(),
    };
    reader.file.whole = errors.is_empty();
    for error in errors {
        reader.broken_line(&error);
    }
    reader.top(table.into_inner());
    reader.file
}

struct Reader<'a> {
    path: Rc<Path>,
    text: &'a str,
    /// The lines that cannot be read, of which nothing more is to be said.
    broken: Vec<usize>,
    problems: &'a mut Problems,
    file: File,
}

impl Reader<'_> {
    fn broken_line(&mut self, error: &toml::de::Error) {
        let span = error.span().unwrap_or(0..0);
        let line = self.line(&span);
        if self.broken.contains(&line) {
            return;
        }
        self.broken.push(line);
        let shown = |text: &str| text.trim().chars().take(SHOWN).collect::<String>();
        let what = shown(self.text.get(span).unwrap_or_default());
        let content = shown(self.text.lines().nth(line - 1).unwrap_or_default());
        let sentence = match error.message() {
            "duplicate key" => format!("{what} is given twice: keep one of them"),
            why if why.starts_with("string values") || why.starts_with("invalid boolean") => {
                format!(
                    "`{content}` has a value that cannot be read: write a text in quotes, and a number, true or false without"
                )
            }
            why => format!("`{content}` is not TOML ({why}): write KEY = VALUE or [TABLE]"),
        };
        self.problems
            .add(Problem::in_line(&self.path, line, sentence));
    }

    fn top(&mut self, table: DeTable<'_>) {
        for (key, value) in table {
            let place = self.place(&key.span());
            let line = self.sound(&key, &value);
            match (key.get_ref().as_ref(), value.into_inner()) {
                ("control", value) => match flag_text(Kind::Text, &value) {
                    Some(text) => self.file.control = Some(Given::new(text, &place)),
                    None => self.wrong(line, wrong_kind("control", Kind::Text, &value)),
                },
                ("defaults", DeValue::Table(table)) => {
                    self.file.defaults = self.settings(table, true);
                }
                ("defaults", _) => self.wrong(line, "defaults is a table: write [defaults]".into()),
                ("device", DeValue::Array(tables)) => {
                    for table in tables {
                        self.device(table);
                    }
                }
                ("device", _) => self.wrong(
                    line,
                    "each device is a table of its own in a list: write [[device]]".into(),
                ),
                (name, _) => self.wrong(line, unknown_top(name)),
            }
        }
    }

    fn device(&mut self, table: Spanned<DeValue<'_>>) {
        let place = self.place(&table.span());
        match table.into_inner() {
            DeValue::Table(table) => {
                let settings = self.settings(table, false);
                self.file.devices.push((place, settings));
            }
            _ => self.problems.add(place.problem(format_args!(
                "each device is a table of its own: write [[device]], and its keys below"
            ))),
        }
    }

    fn settings(&mut self, table: DeTable<'_>, common: bool) -> Settings {
        let mut settings = Settings::default();
        for (name, value) in table {
            let place = self.place(&name.span());
            let line = self.sound(&name, &value);
            let name = name.get_ref().as_ref();
            let Some(key) = Key::find(name) else {
                self.wrong(line, unknown_key(name));
                continue;
            };
            if common && key.holder == Holder::Device {
                self.wrong(
                    line,
                    format!("{name} describes one device: write it below its [[device]]"),
                );
            } else if let Some(text) = flag_text(key.kind, value.get_ref()) {
                settings.put(key, Given::new(text, &place));
            } else {
                self.wrong(line, wrong_kind(name, key.kind, value.get_ref()));
            }
        }
        settings
    }

    /// The line of `key`, to be named in a problem; `None` where it or its value cannot be read,
    /// which is known already.
    fn sound<K, V>(&self, key: &Spanned<K>, value: &Spanned<V>) -> Option<usize> {
        let lines = [self.line(&key.span()), self.line(&value.span())];
        let broken = lines.iter().any(|line| self.broken.contains(line));
        (!broken).then_some(lines[0])
    }

    fn wrong(&mut self, line: Option<usize>, sentence: String) {
        if let Some(line) = line {
            self.problems
                .add(Problem::in_line(&self.path, line, sentence));
        }
    }

    fn place(&self, span: &Range<usize>) -> Place {
        Place::File {
            path: Rc::clone(&self.path),
            line: self.line(span),
        }
    }

    fn line(&self, span: &Range<usize>) -> usize {
        let before = self.text.as_bytes().iter().take(span.start);
        1 + before.filter(|byte| **byte == b'\n').count()
    }
}

/// `value` as a flag spells it; `None` where it is of another kind.
fn flag_text(kind: Kind, value: &DeValue<'_>) -> Option<String> {
    match (kind, value) {
        (Kind::Text | Kind::NumberOrWord | Kind::Octal, DeValue::String(text)) => {
            Some(text.to_string())
        }
        (Kind::Number | Kind::NumberOrWord, DeValue::Integer(number)) if number.radix() == 10 => {
            Some(number.as_str().into())
        }
        (Kind::Octal, DeValue::Integer(number)) if number.radix() == 8 => {
            Some(number.as_str().into())
        }
        (Kind::Switch, DeValue::Boolean(on)) => Some(if *on { "on" } else { "off" }.into()),
        _ => None,
    }
}

fn wrong_kind(key: &str, kind: Kind, value: &DeValue<'_>) -> String {
    let found = match value {
        DeValue::String(text) => format!("the text {text:?}"),
        DeValue::Integer(number) => format!("the number {number}"),
        DeValue::Float(number) => format!("the number {number}"),
        DeValue::Boolean(on) => format!("{on}"),
        DeValue::Datetime(date) => format!("the date {date}"),
        DeValue::Array(_) => "a list".into(),
        DeValue::Table(_) => "a table".into(),
    };
    format!("{key} is {found}: write {}", kind.wanted())
}

fn unknown_key(name: &str) -> String {
    match nearest(name, KEYS.map(|key| key.name)) {
        Some(near) => format!("the key {name:?} is not known: {near} is the nearest, write that"),
        None => format!("the key {name:?} is not known: use {}", Key::names()),
    }
}

fn unknown_top(name: &str) -> String {
    match (Key::find(name), nearest(name, TOP)) {
        (Some(_), _) => format!(
            "{name} belongs to a device: write it below a [[device]], or below [defaults] where it is for all"
        ),
        (None, Some(near)) => {
            format!("{name:?} is not known at the top: {near} is the nearest, write that")
        }
        (None, None) => format!(
            "{name:?} is not known at the top: write control = \"PATH\", [defaults] or [[device]]"
        ),
    }
}
