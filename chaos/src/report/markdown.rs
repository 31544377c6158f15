//! The report as a page.

use std::fmt::Write as _;

use super::{ClassSummary, Goal, Measure, Report, goals, quantile};
use crate::figures::bucket_edge;

/// Violations that stand on the page; the JSON has all that were kept.
const SHOWN: usize = 20;
/// Columns of the longest bar of a histogram.
const BAR: f64 = 40.0;
/// Upper edges of the failover histogram, milliseconds.
const EDGES_MS: [f64; 10] = [50.0, 100.0, 150.0, 200.0, 300.0, 500.0, 750.0, 1_000.0, 2_000.0, 3_000.0];

/// Writing to a `String` cannot fail.
macro_rules! put {
    ($page:expr) => { $page.push('\n') };
    ($page:expr, $($arg:tt)*) => {{ let _ = writeln!($page, $($arg)*); }};
}

pub(super) fn page(report: &Report, name: &str) -> String {
    let mut page = String::new();
    put!(page, "# {}\n", report.title);
    verdict(report, &mut page);
    put!(page, "- began {}, {:.1} minutes, {} runs", report.began, report.seconds / 60.0, report.runs.len());
    put!(page, "- version {}{}", report.version, report.commit.as_ref().map_or(String::new(), |c| format!(", {c}")));
    put!(page, "- again: `{}`", report.command);
    report.machine.iter().for_each(|line| put!(page, "- {line}"));
    put!(page, "\n![Lag over time]({name}-lag.svg)\n");
    checked(report, &mut page);
    faults(report, &mut page);
    failover(report, &mut page);
    put!(page, "\n![Failover times]({name}-failover.svg)");
    lag(report, &mut page);
    broken(report, &mut page);
    runs(report, &mut page);
    page
}

fn verdict(report: &Report, page: &mut String) {
    let violations = report.violations();
    let word = if violations == 0 { "Nothing was lost, repeated or reordered" } else { "PROMISES WERE BROKEN" };
    let (faults, deliveries) = (thousands(report.faults()), thousands(report.deliveries()));
    put!(
        page,
        "**{word}:** {faults} faults survived, {deliveries} deliveries checked, {violations} safety violations.\n"
    );
}

fn checked(report: &Report, page: &mut String) {
    put!(page, "## What was checked\n");
    put!(page, "| | |\n|---|---:|");
    let mut totals: std::collections::BTreeMap<String, u64> = std::collections::BTreeMap::new();
    for run in &report.runs {
        if let Ok(serde_json::Value::Object(counts)) = serde_json::to_value(&run.counts) {
            for (name, value) in counts {
                match value {
                    serde_json::Value::Number(n) => *totals.entry(name).or_default() += n.as_u64().unwrap_or(0),
                    serde_json::Value::Object(parts) => {
                        for (part, n) in parts {
                            *totals.entry(format!("{name}: {part}")).or_default() += n.as_u64().unwrap_or(0);
                        }
                    }
                    _ => {}
                }
            }
        }
    }
    for (name, total) in totals.iter().filter(|(name, _)| !name.starts_with("faults")) {
        put!(page, "| {} | {} |", name.replace('_', " "), thousands(*total));
    }
    let most = report.runs.iter().map(|run| run.node_bytes.1).max().unwrap_or(0);
    put!(page, "| most memory of all nodes together | {:.0} MiB |", most as f64 / f64::from(1 << 20));
}

fn faults(report: &Report, page: &mut String) {
    put!(page, "\n## Faults\n");
    put!(
        page,
        "Counted: the target held the role, the fault took effect, and progress was checked after the heal. Figures"
    );
    put!(page, "are of those that were alone in their window.\n");
    put!(page, "| class | injected | counted | alone | variants | figure | value | goal | |");
    put!(page, "|---|---:|---:|---:|---|---|---:|---:|---|");
    let classes = report.classes();
    let mut names: Vec<&String> = classes.keys().collect();
    names.sort_by_key(|name| (name.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(99), *name));
    for name in names {
        let class = &classes[name];
        if class.injected == 0 {
            let why: Vec<&str> = class.reasons.iter().map(String::as_str).collect();
            put!(page, "| {name} | SKIPPED | | | {} | | | | |", why.join("; "));
            continue;
        }
        let variants: Vec<&str> = class.variants.iter().map(String::as_str).collect();
        put!(
            page,
            "| {name} | {} | {} | {} | {} | | | | {} |",
            class.injected,
            class.counted,
            class.alone,
            variants.join(", "),
            if class.skipped > 0 { format!("{} skipped", class.skipped) } else { String::new() }
        );
        figures(name, class, page);
    }
}

fn figures(name: &str, class: &ClassSummary, page: &mut String) {
    let mut told: Vec<&str> = Vec::new();
    for goal in goals().iter().filter(|goal| goal.class == name || goal.class == "*") {
        let Some((value, met)) = class.figures.get(goal.figure).and_then(|values| goal.judge(values)) else { continue };
        told.push(goal.figure);
        let (what, value, limit) = (measure(goal), text(goal.figure, value), text(goal.figure, goal.value));
        let sign = if goal.measure == Measure::MedianAtLeast { "≥" } else { "≤" };
        let verdict = if met { "reached" } else { "**MISSED**" };
        put!(page, "| | | | | | {}, {what} | {value} | {sign} {limit} | {verdict} |", goal.text);
    }
    for (figure, values) in class.figures.iter().filter(|(figure, _)| !told.contains(&figure.as_str())) {
        let at = |share| quantile(values, share).map_or(String::new(), |value| text(figure, value));
        let label = figure.rsplit_once('_').map_or(figure.as_str(), |(label, _)| label).replace('_', " ");
        put!(page, "| | | | | | {label}, median / most of {} | {} / {} | | |", values.len(), at(0.5), at(1.0));
    }
}

const fn measure(goal: &Goal) -> &'static str {
    match goal.measure {
        Measure::Max => "most",
        Measure::P99 => "p99",
        Measure::Median | Measure::MedianAtLeast => "median",
    }
}

fn failover(report: &Report, page: &mut String) {
    put!(page, "\n## Failover times\n");
    let classes = report.classes();
    for (class, figure, title) in [
        ("F2", "relay_silence_us", "Leader killed: to the first row relayed again"),
        ("F3", "relay_silence_us", "Leader paused: to the first row relayed again"),
        ("F9", "relay_after_accept_us", "Postgres restarted: from accepting to the first row relayed"),
    ] {
        let Some(values) = classes.get(class).and_then(|class| class.figures.get(figure)) else { continue };
        put!(page, "{title} ({} of class {class}):\n\n```text", values.len());
        let mut below = 0;
        let most = values.len() as f64;
        for edge in EDGES_MS.iter().copied().chain([f64::INFINITY]) {
            let n = values.iter().filter(|value| **value / 1e3 <= edge).count();
            let here = n - below;
            below = n;
            if here > 0 {
                let label = if edge.is_finite() { format!("≤ {edge:>5.0} ms") } else { "more      ".into() };
                put!(page, "{label} {here:>4} {}", "#".repeat((here as f64 / most * BAR).ceil() as usize));
            }
        }
        put!(page, "```\n");
    }
}

fn lag(report: &Report, page: &mut String) {
    let mut buckets: Vec<u64> = Vec::new();
    for run in &report.runs {
        if buckets.len() < run.figures.lag_buckets.len() {
            buckets.resize(run.figures.lag_buckets.len(), 0);
        }
        run.figures.lag_buckets.iter().enumerate().for_each(|(at, n)| buckets[at] += n);
    }
    let total: u64 = buckets.iter().sum();
    if total == 0 {
        return;
    }
    put!(page, "\n## Lag: from COMMIT sent to the client's handler, all faults included\n");
    put!(page, "| share of {} deliveries | at most |\n|---|---:|", thousands(total));
    for share in [0.5, 0.9, 0.99, 0.999] {
        let mut sum = 0;
        let at = buckets.iter().position(|n| {
            sum += n;
            sum as f64 >= share * total as f64
        });
        put!(page, "| {:.1} % | {} |", share * 100.0, text("_us", bucket_edge(at.unwrap_or(0))));
    }
    let second = buckets.iter().enumerate().filter(|(at, _)| bucket_edge(*at) <= 1e6).map(|(_, n)| n).sum::<u64>();
    put!(page, "\nWithin one second, whatever the fault: {:.2} %.", second as f64 / total as f64 * 100.0);
}

fn broken(report: &Report, page: &mut String) {
    for (title, of) in [("Safety violations", 0), ("Kept late", 1)] {
        let all: Vec<_> = report
            .runs
            .iter()
            .flat_map(|run| (if of == 0 { &run.violations } else { &run.late }).iter().map(move |v| (run.seed, v)))
            .collect();
        put!(page, "\n## {title}: {}\n", all.len());
        for (seed, violation) in all.iter().take(SHOWN) {
            let at = violation.at as f64 / 1e6;
            put!(page, "- seed {seed}, {at:.3} s, **{}**: {}", violation.rule, violation.text);
        }
        if all.len() > SHOWN {
            put!(page, "- … and {} more, in the JSON", all.len() - SHOWN);
        }
    }
}

fn runs(report: &Report, page: &mut String) {
    for why in &report.not_carried_out {
        put!(page, "\n**Not carried out:** {}", why.lines().next().unwrap_or_default());
    }
    put!(page, "\n## Runs\n");
    put!(page, "| seed | server | seconds | faults | deliveries | violations | late | proves less because |");
    put!(page, "|---:|---|---:|---:|---:|---:|---:|---|");
    for run in &report.runs {
        let server = match (&run.mutant, run.failpoints) {
            (Some(mutant), _) => format!("mutant {mutant}"),
            (None, true) => "with fail points".into(),
            (None, false) => "as released".into(),
        };
        put!(
            page,
            "| {} | {server} | {:.0} | {} | {} | {} | {} | {} |",
            run.seed,
            run.figures.seconds,
            run.figures.faults.iter().filter(|fault| fault.took && fault.progressed).count(),
            thousands(run.figures.deliveries),
            run.violations.len(),
            run.late.len(),
            run.vacuous.join("; ")
        );
    }
}

/// A value in its unit.
pub(super) fn text(figure: &str, value: f64) -> String {
    if figure.ends_with("_us") {
        if value >= 1e6 { format!("{:.2} s", value / 1e6) } else { format!("{:.1} ms", value / 1e3) }
    } else if figure.ends_with("_bytes") {
        format!("{:.1} MiB", value / f64::from(1 << 20))
    } else if figure.ends_with("_x") {
        format!("{value:.1} ×")
    } else {
        format!("{value:.0}")
    }
}

/// `1234567` as `1,234,567`.
pub(super) fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
