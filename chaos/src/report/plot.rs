//! Two plots as SVG: lag over time with the faults drawn in, and failover times as bars.

use std::fmt::Write as _;

use super::{Report, quantile};

const WIDTH: f64 = 1200.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 56.0;
/// The plot's range, microseconds: a tenth of a millisecond to a hundred seconds.
const LOW: f64 = 100.0;
const HIGH: f64 = 1e8;
/// Points per line at most: neighbours are merged, the worst is kept.
const POINTS: usize = 1_100;

macro_rules! put {
    ($svg:expr, $($arg:tt)*) => {{ let _ = writeln!($svg, $($arg)*); }};
}

fn frame(title: &str) -> String {
    let mut svg = String::new();
    put!(svg, r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">"#);
    put!(svg, r##"<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>"##);
    put!(svg, r##"<text x="{LEFT}" y="22" font-size="15" fill="#222">{title}</text>"##);
    svg
}

fn height(micros: f64) -> f64 {
    let share = (micros.clamp(LOW, HIGH) / LOW).ln() / (HIGH / LOW).ln();
    HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
}

fn grid(svg: &mut String) {
    for (micros, label) in
        [(1e2, "0.1 ms"), (1e3, "1 ms"), (1e4, "10 ms"), (1e5, "100 ms"), (1e6, "1 s"), (1e7, "10 s"), (1e8, "100 s")]
    {
        let y = height(micros);
        put!(svg, r##"<line x1="{LEFT}" x2="{}" y1="{y:.1}" y2="{y:.1}" stroke="#ddd"/>"##, WIDTH - RIGHT);
        let x = LEFT - 8.0;
        put!(svg, r##"<text x="{x}" y="{:.1}" font-size="11" text-anchor="end" fill="#555">{label}</text>"##, y + 4.0);
    }
}

pub(super) fn lag(report: &Report) -> String {
    let mut svg = frame("Lag from COMMIT to the client's handler, by second: median, 99 %, worst. Bars: faults");
    grid(&mut svg);
    let total: f64 = report.runs.iter().map(|run| run.figures.seconds).sum::<f64>().max(1.0);
    let across = |second: f64| LEFT + second / total * (WIDTH - LEFT - RIGHT);
    let mut began = 0.0;
    let mut lines: [Vec<(f64, f64)>; 3] = Default::default();
    for run in &report.runs {
        for fault in run.figures.faults.iter().filter(|fault| fault.took) {
            let from = across(began + fault.on as f64 / 1e6);
            let to = across(began + fault.off.unwrap_or(fault.on) as f64 / 1e6).max(from + 0.6);
            let (width, y, h) = (to - from, TOP, HEIGHT - TOP - BOTTOM);
            let (class, variant) = (&fault.class, &fault.variant);
            put!(
                svg,
                r##"<rect x="{from:.1}" y="{y}" width="{width:.1}" height="{h}" fill="#c33" opacity="0.10"><title>{class} {variant}</title></rect>"##
            );
        }
        for second in &run.figures.lag {
            let x = across(began + f64::from(second.second));
            for (line, value) in lines.iter_mut().zip([second.max, second.p99, second.p50]) {
                line.push((x, value as f64));
            }
        }
        began += run.figures.seconds;
        let x = across(began);
        put!(
            svg,
            r##"<line x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{}" stroke="#bbb" stroke-dasharray="2 3"/>"##,
            HEIGHT - BOTTOM
        );
    }
    for (line, colour) in lines.iter().zip(["#d9b23c", "#3a7bd5", "#1a7f37"]) {
        let chunk = line.len().div_ceil(POINTS).max(1);
        let points: Vec<String> = line
            .chunks(chunk)
            .map(|part| {
                let worst = part.iter().map(|(_, value)| *value).fold(0.0, f64::max);
                format!("{:.1},{:.1}", part[0].0, height(worst))
            })
            .collect();
        put!(svg, r#"<polyline fill="none" stroke="{colour}" stroke-width="1" points="{}"/>"#, points.join(" "));
    }
    for minute in 0..=10 {
        let at = total * f64::from(minute) / 10.0;
        let (x, y) = (across(at), HEIGHT - BOTTOM + 18.0);
        let label = if total >= 600.0 { format!("{:.0} min", at / 60.0) } else { format!("{at:.0} s") };
        put!(svg, r##"<text x="{x:.1}" y="{y}" font-size="11" text-anchor="middle" fill="#555">{label}</text>"##);
    }
    for (at, (name, colour)) in [("median", "#1a7f37"), ("99 %", "#3a7bd5"), ("worst", "#d9b23c")].iter().enumerate() {
        let x = LEFT + 90.0 * at as f64;
        let y = HEIGHT - 14.0;
        put!(svg, r#"<text x="{x}" y="{y}" font-size="12" fill="{colour}">■ {name}</text>"#);
    }
    svg + "</svg>\n"
}

pub(super) fn failover(report: &Report) -> String {
    let mut svg = frame("Failover, each dot one fault: time until the relay went on. Line: median");
    grid(&mut svg);
    let classes = report.classes();
    let shown = [
        ("F2", "relay_silence_us", "leader killed"),
        ("F3", "relay_silence_us", "leader paused"),
        ("F5", "relay_silence_us", "leader cut off"),
        ("F9", "relay_after_accept_us", "Postgres restarted"),
        ("F10", "relay_after_accept_us", "failover, synchronous"),
        ("F11", "relay_after_accept_us", "failover, tail lost"),
        ("F13", "relay_silence_us", "backend ended"),
    ];
    let column = (WIDTH - LEFT - RIGHT) / shown.len() as f64;
    for (at, (class, figure, label)) in shown.iter().enumerate() {
        let x = LEFT + column * (at as f64 + 0.5);
        let y = HEIGHT - BOTTOM + 18.0;
        put!(
            svg,
            r##"<text x="{x:.1}" y="{y}" font-size="11" text-anchor="middle" fill="#333">{class} {label}</text>"##
        );
        let Some(values) = classes.get(*class).and_then(|class| class.figures.get(*figure)) else { continue };
        for (n, value) in values.iter().enumerate() {
            let dx = ((n * 37) % 61) as f64 - 30.0;
            put!(
                svg,
                r##"<circle cx="{:.1}" cy="{:.1}" r="3" fill="#3a7bd5" opacity="0.6"/>"##,
                x + dx,
                height(*value)
            );
        }
        if let Some(median) = quantile(values, 0.5) {
            let y = height(median);
            let (from, to) = (x - 40.0, x + 40.0);
            put!(
                svg,
                r##"<line x1="{from:.1}" x2="{to:.1}" y1="{y:.1}" y2="{y:.1}" stroke="#222" stroke-width="2"/>"##
            );
        }
    }
    svg + "</svg>\n"
}
