//! Log lines that a peer can cause, at most one a second.

use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(1);

/// Decides whether a line may be logged now.
#[derive(Debug, Default)]
pub(crate) struct Quiet {
    last: Option<Instant>,
    held_back: u64,
}

impl Quiet {
    /// Calls `log` with the number of lines held back before this one, or holds this one back.
    pub(crate) fn log(&mut self, log: impl FnOnce(u64)) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now - last < PAUSE) {
            self.held_back += 1;
            return;
        }
        self.last = Some(now);
        log(std::mem::take(&mut self.held_back));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_and_a_number() {
        let mut quiet = Quiet::default();
        let mut lines = Vec::new();
        for _ in 0..1000 {
            quiet.log(|held_back| lines.push(held_back));
        }
        assert_eq!(lines, [0]);
        quiet.last = quiet.last.map(|last| last - PAUSE);
        quiet.log(|held_back| lines.push(held_back));
        assert_eq!(lines, [0, 999]);
    }
}
