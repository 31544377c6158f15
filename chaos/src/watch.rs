//! What a run looks like while it goes: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use chaos::faults::FaultEvent;
use chaos::run::Watcher;
use indicatif::{ProgressBar, ProgressStyle};

/// A run's news on stderr.
#[derive(Debug)]
pub(crate) struct Screen {
    bar: ProgressBar,
    terminal: bool,
}

impl Screen {
    pub(crate) fn new(length: Duration) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(length.as_secs()) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{elapsed_precise} [{bar:30}] {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        Self { bar, terminal }
    }

    fn line(&self, text: &str) {
        if self.terminal {
            self.bar.println(text);
        } else {
            eprintln!("{text}");
        }
    }
}

impl Watcher for Screen {
    fn step(&self, text: &str) {
        self.line(&format!("-- {text}"));
    }

    fn fault(&self, event: &FaultEvent) {
        match event {
            FaultEvent::On(on) => self.line(&format!("{:>3} {:<4} {} on {}", on.f, on.class, on.variant, on.target)),
            FaultEvent::Off { .. } => {}
            FaultEvent::Done(done) => {
                let caught_up = done.caught_up.map_or_else(
                    || "clients did not catch up".to_owned(),
                    |micros| format!("caught up {:.2} s after the heal", micros as f64 / 1e6),
                );
                let took = if done.took { "" } else { ", did not take" };
                self.line(&format!("{:>3} {:<4}   {caught_up}{took}", done.f, done.class));
                for violation in &done.violations {
                    self.line(&format!("{:>3} {:<4}   VIOLATION {violation}", done.f, done.class));
                }
            }
            FaultEvent::Skipped { f, class, why } => self.line(&format!("{f:>3} {class:<4} SKIPPED {why}")),
        }
    }

    fn progress(&self, elapsed: Duration, committed: u64, delivered: u64) {
        self.bar.set_position(elapsed.as_secs());
        self.bar.set_message(format!("{committed} transactions, {delivered} deliveries"));
    }
}
