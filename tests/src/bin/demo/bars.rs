//! The progress of a load. On a terminal, it is one bar for each queue pair and direction, which is
//! redrawn in place; otherwise, it is one line of text every 2 seconds.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::sample::{CounterSample, FrameCount};

const WIDTH: usize = 20;
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

/// Draws the rates of each queue pair between two samples.
pub struct Bars {
    last: CounterSample,
    started_at: Instant,
    /// The highest rate so far in Gbit/s, which is the rate of a full bar.
    full: f64,
    /// The number of lines that the last call has drawn.
    lines: usize,
    is_terminal: bool,
}

impl Bars {
    /// Creates bars whose first rates are relative to `first`.
    pub fn new(first: CounterSample) -> Self {
        Self {
            started_at: first.at,
            last: first,
            full: 0.1,
            lines: 0,
            is_terminal: io::stdout().is_terminal(),
        }
    }

    /// Draws the rates since the previous drawing.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn draw(&mut self, now: CounterSample) -> io::Result<()> {
        let time = now.at.duration_since(self.last.at);
        if !self.is_terminal && time < PLAIN_INTERVAL {
            return Ok(());
        }
        let rates: Vec<(f64, f64)> = now
            .pairs
            .iter()
            .zip(&self.last.pairs)
            .map(|(new, old)| (rate(new.rx, old.rx, time), rate(new.tx, old.tx, time)))
            .collect();
        let seconds = now.at.duration_since(self.started_at).as_secs();
        let text = if self.is_terminal {
            self.bar_lines(&rates)
        } else {
            plain_line(seconds, &rates)
        };
        self.last = now;
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    fn bar_lines(&mut self, rates: &[(f64, f64)]) -> String {
        let highest = rates.iter().map(|(rx, tx)| rx.max(*tx));
        self.full = highest.fold(self.full, f64::max);
        let mut text = String::new();
        if self.lines > 0 {
            // Moves the cursor up to the first of the lines that were drawn last.
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

fn plain_line(seconds: u64, rates: &[(f64, f64)]) -> String {
    let mut text = format!("  {seconds:>3} s ");
    for (pair, (rx, tx)) in rates.iter().enumerate() {
        _ = write!(text, "  pair {pair}: {rx:.2} in {tx:.2} out");
    }
    text.push_str("  Gbit/s\n");
    text
}

/// Draws `part` of `full` as a bar, with a resolution of one eighth of a character.
fn bar(part: f64, full: f64) -> String {
    const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let share = (part / full).clamp(0.0, 1.0);
    (0..WIDTH)
        .map(|i| {
            // The covered part of character i.
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
    fn bar_has_the_same_width_for_every_rate() {
        for share in [0.0, 0.01, 0.5, 0.999, 1.0, 7.0] {
            assert_eq!(bar(share, 1.0).chars().count(), WIDTH, "{share}");
        }
        assert_eq!(bar(1.0, 1.0).trim_end_matches('█'), "");
        assert_eq!(bar(0.0, 1.0).trim(), "");
        let half = bar(0.5, 1.0);
        assert_eq!(half.chars().filter(|c| *c == '█').count(), WIDTH / 2);
    }

    #[test]
    fn plain_line_contains_the_rates_of_each_pair() {
        let line = plain_line(4, &[(1.0, 0.25), (0.5, 0.0)]);
        assert_eq!(
            line,
            "    4 s   pair 0: 1.00 in 0.25 out  pair 1: 0.50 in 0.00 out  Gbit/s\n"
        );
    }
}
