//! The bars that move while traffic runs: one line for each queue pair, drawn
//! over themselves on a terminal; elsewhere one plain line every 2 seconds.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::sample::{CounterSample, FrameCount};

const WIDTH: usize = 20;
const PLAIN_EVERY: Duration = Duration::from_secs(2);

/// Draws the rates between one sample and the next.
pub struct Bars {
    last: CounterSample,
    started_at: Instant,
    /// The highest rate so far: a full bar.
    full: f64,
    lines: usize,
    terminal: bool,
}

impl Bars {
    /// Starts from `first`.
    pub fn new(first: CounterSample) -> Self {
        Self {
            started_at: first.at,
            last: first,
            full: 0.1,
            lines: 0,
            terminal: io::stdout().is_terminal(),
        }
    }

    /// Draws what was added since the last call.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn draw(&mut self, now: CounterSample) -> io::Result<()> {
        let time = now.at.duration_since(self.last.at);
        if !self.terminal && time < PLAIN_EVERY {
            return Ok(());
        }
        let rates: Vec<(f64, f64)> = now
            .pairs
            .iter()
            .zip(&self.last.pairs)
            .map(|(new, old)| (rate(new.rx, old.rx, time), rate(new.tx, old.tx, time)))
            .collect();
        let seconds = now.at.duration_since(self.started_at).as_secs();
        let text = if self.terminal {
            self.bars(&rates)
        } else {
            plain(seconds, &rates)
        };
        self.last = now;
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    fn bars(&mut self, rates: &[(f64, f64)]) -> String {
        let high = rates.iter().map(|(rx, tx)| rx.max(*tx));
        self.full = high.fold(self.full, f64::max);
        let mut text = String::new();
        if self.lines > 0 {
            // Back to the first of our lines.
            _ = write!(text, "\x1b[{}A", self.lines);
        }
        for (pair, (rx, tx)) in rates.iter().enumerate() {
            _ = writeln!(
                text,
                "\x1b[2K  pair {pair:<2} to guest {} {rx:6.2}   from guest {} {tx:6.2} Gbit/s",
                bar(*rx, self.full),
                bar(*tx, self.full),
            );
        }
        self.lines = rates.len();
        text
    }
}

fn rate(new: FrameCount, old: FrameCount, time: Duration) -> f64 {
    new.since(old).gbps(time)
}

fn plain(seconds: u64, rates: &[(f64, f64)]) -> String {
    let mut text = format!("  {seconds:>3} s ");
    for (pair, (rx, tx)) in rates.iter().enumerate() {
        _ = write!(text, "  pair {pair}: {rx:.2} in {tx:.2} out");
    }
    text.push_str("  Gbit/s\n");
    text
}

/// `part` of `full` in eighths of a character.
fn bar(part: f64, full: f64) -> String {
    const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let share = (part / full).clamp(0.0, 1.0);
    (0..WIDTH)
        .map(|i| {
            // How much of character i is covered.
            let covered = (share * WIDTH as f64 - i as f64).clamp(0.0, 1.0);
            if covered >= 1.0 {
                return '█';
            }
            let eighth = (1..8).filter(|n| f64::from(*n) / 8.0 <= covered).count();
            EIGHTHS.get(eighth).copied().unwrap_or(' ')
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_keep_their_width() {
        for share in [0.0, 0.01, 0.5, 0.999, 1.0, 7.0] {
            assert_eq!(bar(share, 1.0).chars().count(), WIDTH, "{share}");
        }
        assert_eq!(bar(1.0, 1.0).trim_end_matches('█'), "");
        assert_eq!(bar(0.0, 1.0).trim(), "");
        let half = bar(0.5, 1.0);
        assert_eq!(half.chars().filter(|c| *c == '█').count(), WIDTH / 2);
    }

    #[test]
    fn the_plain_line_has_each_pair() {
        let line = plain(4, &[(1.0, 0.25), (0.5, 0.0)]);
        assert_eq!(
            line,
            "    4 s   pair 0: 1.00 in 0.25 out  pair 1: 0.50 in 0.00 out  Gbit/s\n"
        );
    }
}
