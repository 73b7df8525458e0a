//! What is wrong with a configuration: every problem, each one sentence that says what to do.

use std::fmt;
use std::path::Path;
use std::rc::Rc;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file and its line, from 1, where it is one of a file.
    line: Option<(Rc<Path>, usize)>,
    sentence: String,
}

impl Problem {
    /// A problem of the command line.
    #[must_use]
    pub fn new(sentence: String) -> Self {
        let line = None;
        Self { line, sentence }
    }

    /// A problem of a line of a file.
    #[must_use]
    pub fn in_line(path: &Rc<Path>, line: usize, sentence: String) -> Self {
        let line = Some((Rc::clone(path), line));
        Self { line, sentence }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((path, line)) = &self.line {
            write!(f, "{}:{line}: ", path.display())?;
        }
        f.write_str(&self.sentence)
    }
}

/// Problems, as they are found.
#[derive(Debug, Default)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// One more.
    pub fn add(&mut self, problem: Problem) {
        self.0.push(problem);
    }

    /// What `result` holds, its problem noted where it holds none.
    pub fn record<T>(&mut self, result: Result<T, Problem>) -> Option<T> {
        result.map_err(|problem| self.add(problem)).ok()
    }

    /// Nothing wrong, or what is: those of the command line first, then by line, none twice.
    ///
    /// # Errors
    /// When there is a problem.
    pub fn into_result(mut self) -> Result<(), ConfigError> {
        self.0.sort_by(|a, b| a.line.cmp(&b.line));
        let mut found: Vec<Problem> = Vec::new();
        for problem in self.0 {
            if !found.contains(&problem) {
                found.push(problem);
            }
        }
        match found.is_empty() {
            true => Ok(()),
            false => Err(ConfigError(found)),
        }
    }
}

/// Why a configuration cannot be used: at least one problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(Vec<Problem>);

impl ConfigError {
    /// Each of the problems.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if at == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_told_in_order_and_once() {
        let path: Rc<Path> = Path::new("f").into();
        let mut problems = Problems::default();
        for line in [12, 3, 12] {
            problems.add(Problem::in_line(&path, line, format!("x{line}")));
        }
        assert_eq!(problems.record(Err::<(), _>(Problem::new("y".into()))), None);
        assert_eq!(problems.record(Ok(1)), Some(1));
        let error = problems.into_result().unwrap_err();
        assert_eq!(error.to_string(), "y\nf:3: x3\nf:12: x12");
        assert_eq!(error.problems().count(), 3);
        assert_eq!(Problems::default().into_result(), Ok(()));
    }
}
