//! The last actions, which are printed with the seed when the test fails.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// The number of actions that are kept.
const KEPT: usize = 40;

/// What was done, by whom and when. It is printed when the test panics.
#[derive(Debug)]
pub struct Journal {
    seed: u64,
    started_at: Instant,
    lines: Mutex<(u64, VecDeque<String>)>,
}

impl Journal {
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            started_at: Instant::now(),
            lines: Mutex::default(),
        }
    }

    /// Notes an action before it begins.
    pub fn note(&self, actor: &str, action: &str) {
        let line = format!(
            "{:9.3} s {actor}: {action}",
            self.started_at.elapsed().as_secs_f64()
        );
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, kept) = &mut *lines;
        *count += 1;
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(line);
    }

    /// The number of actions so far.
    pub fn count(&self) -> u64 {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            // One write, because other threads may print as well.
            let actions: Vec<&str> = lines.1.iter().map(String::as_str).collect();
            eprintln!(
                "the run fails with SOAK_SEED={}; its last actions:\n{}",
                self.seed,
                actions.join("\n")
            );
        }
    }
}
