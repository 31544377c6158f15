//! What a command prints in the end.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use chaos::campaign::Caught;
use chaos::preflight::Abilities;
use chaos::report::{Report, RunSummary, goals, quantile};
use chrono::{DateTime, Utc};

/// An empty report of this machine and these sources.
pub(super) fn begin(what: &str, began: DateTime<Utc>, abilities: &Abilities, server: &Path) -> Report {
    Report {
        title: format!("{what} of {}", began.format("%Y-%m-%d")),
        version: first_line(Command::new(server).arg("--version")).unwrap_or_default(),
        commit: first_line(Command::new("git").args([
            "-C",
            env!("CARGO_MANIFEST_DIR"),
            "describe",
            "--always",
            "--dirty",
        ])),
        began: began.format("%Y-%m-%d %H:%M UTC").to_string(),
        seconds: 0.0,
        machine: machine(),
        cannot: abilities.cannot(),
        command: command_line(),
        runs: Vec::new(),
        not_carried_out: Vec::new(),
    }
}

fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

/// Without paths of this machine.
fn command_line() -> String {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    format!("cargo run --release -p chaos -- {}", arguments.join(" "))
}

fn machine() -> Vec<String> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let model = field(&read("/proc/cpuinfo"), "model name").unwrap_or_default();
    let memory = field(&read("/proc/meminfo"), "MemTotal").unwrap_or_default();
    let postgres = chaos::cluster::find_binaries()
        .ok()
        .and_then(|folder| first_line(Command::new(folder.join("postgres")).arg("--version")))
        .unwrap_or_default();
    let haproxy = first_line(Command::new("haproxy").arg("-v")).unwrap_or_default();
    let kernel = read("/proc/sys/kernel/osrelease");
    vec![
        format!("{processors} processors ({model}), {memory}, Linux {}", kernel.trim()),
        format!("{postgres}; {}", haproxy.split(" - ").next().unwrap_or_default()),
    ]
}

pub(super) fn print(summary: &RunSummary) {
    println!("{}", text(summary));
}

fn text(summary: &RunSummary) -> String {
    let mut out = String::new();
    let faults = summary.figures.faults.iter().filter(|fault| fault.took && fault.progressed).count();
    let counts = &summary.counts;
    let _ = writeln!(
        out,
        "seed {}: {faults} faults survived, {} deliveries checked, {} transactions ({} with no answer, {} of them happened), {} resyncs",
        summary.seed,
        counts.deliveries,
        counts.transactions_ok,
        counts.transactions_unknown,
        counts.unknown_that_happened,
        counts.resyncs.values().sum::<u64>()
    );
    for violation in &summary.violations {
        let _ = writeln!(out, "VIOLATION {} at {:.3} s: {}", violation.rule, violation.at as f64 / 1e6, violation.text);
    }
    for late in &summary.late {
        let _ = writeln!(out, "late {} at {:.3} s: {}", late.rule, late.at as f64 / 1e6, late.text);
    }
    for why in &summary.vacuous {
        let _ = writeln!(out, "proves less: {why}");
    }
    let _ = write!(
        out,
        "{}",
        if summary.violations.is_empty() { "nothing was lost, repeated or reordered" } else { "PROMISES WERE BROKEN" }
    );
    out
}

pub(super) fn print_all(report: &Report) {
    println!(
        "{} runs, {} faults survived, {} deliveries checked, {} violations",
        report.runs.len(),
        report.faults(),
        report.deliveries(),
        report.violations()
    );
    let classes = report.classes();
    for goal in goals().iter().filter(|goal| goal.class != "*") {
        let Some(values) = classes.get(goal.class).and_then(|class| class.figures.get(goal.figure)) else { continue };
        if let Some((value, met)) = goal.judge(values) {
            let median = quantile(values, 0.5).unwrap_or(value);
            let word = if met { "reached" } else { "MISSED" };
            println!(
                "{:<4} {:<50} {:>12.0} (median {median:.0}, goal {:.0}) {word}",
                goal.class, goal.text, value, goal.value
            );
        }
    }
}

pub(super) fn print_caught(caught: &Caught) {
    match (caught.run, caught.seed) {
        (Some(run), Some(seed)) => {
            println!("{}: caught in run {run} (seed {seed}) by {}", caught.name, caught.rules.join(", "));
        }
        _ => println!("{}: ESCAPED ({})", caught.name, caught.breaks),
    }
}

/// The table of mutants, as it is committed.
pub(super) fn write_caught(folder: &Path, all: &[Caught]) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut page = String::from(
        "# Mutants: servers that are broken on purpose, and who noticed\n\n`cargo run --release -p chaos -- mutants`\n\n| mutant | what it breaks | caught in run | by the rules |\n|---|---|---:|---|\n",
    );
    for caught in all {
        let run = caught.run.map_or_else(|| "**escaped**".to_owned(), |run| run.to_string());
        let _ = writeln!(page, "| {} | {} | {run} | {} |", caught.name, caught.breaks, caught.rules.join(", "));
    }
    std::fs::write(folder.join("mutants.md"), page)?;
    Ok(())
}
