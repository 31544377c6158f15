//! One event as one line for people.
//!
//! Pure. Nothing that a database holds can steer the terminal: control characters are shown, not sent.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use chrono::{DateTime, Utc};
use serde_json::value::RawValue;

use crate::client::{Event, Image, Op, Transition};

/// A value longer than this is cut, characters.
const MAX_VALUE_CHARS: usize = 60;
/// Columns of a row image that are shown.
const MAX_COLUMNS: usize = 12;

/// Whether to paint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Paint(pub(super) bool);

const DIM: &str = "2";
const BOLD: &str = "1";
const RED: &str = "31";
const GREEN: &str = "32";
const YELLOW: &str = "33";
const MAGENTA: &str = "35";
const CYAN: &str = "36";

impl Paint {
    /// `style` is an SGR parameter (ECMA-48).
    fn paint(self, style: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// News between the events.
pub(super) fn news(text: &str, paint: Paint) -> String {
    paint.paint(DIM, &format!("── {}", shown(text)))
}

/// `10:00:00.123 UPDATE public.orders id=42 status: "new" → "paid" 1.4 ms`.
pub(super) fn event_line(event: &Event, now: DateTime<Utc>, paint: Paint) -> String {
    let mut line = paint.paint(DIM, &event.ts.format("%H:%M:%S%.3f").to_string());
    let style = match event.op {
        Op::Insert => GREEN,
        Op::Update => YELLOW,
        Op::Delete | Op::Truncate => RED,
        Op::Event => CYAN,
        Op::Schema | Op::Other(_) => MAGENTA,
    };
    let op = shown(&format!("{:<8}", event.op));
    let _ = write!(line, " {} {}", paint.paint(style, &op), paint.paint(BOLD, &shown(&event.table)));
    if let Some(partition) = partition(event) {
        let _ = write!(line, " (only its partition {})", paint.paint(BOLD, &shown(&partition)));
    }
    if let Some(event_type) = &event.event_type {
        let _ = write!(line, " {}", paint.paint(CYAN, &shown(event_type)));
    }
    for (column, value) in event.key.columns() {
        let _ = write!(line, " {}={}", shown(&column), short(&value));
    }
    match event.transition {
        Some(Transition::Enter) => line.push_str(" (enters)"),
        Some(Transition::Leave) => line.push_str(" (leaves)"),
        Some(Transition::Unknown) | None => {}
    }
    line.push_str(&body(event, paint));
    let _ = write!(line, "  {}", paint.paint(DIM, &lag(event, now)));
    line
}

/// The partition that a TRUNCATE emptied, where it was not the whole table.
fn partition(event: &Event) -> Option<String> {
    let headers = (event.op == Op::Truncate).then(|| event.headers.columns())?;
    let (_, name) = headers.into_iter().find(|(name, _)| name == "tidewire.partition")?;
    Some(serde_json::from_str(name.get()).unwrap_or_else(|_| name.get().to_owned()))
}

fn body(event: &Event, paint: Paint) -> String {
    if event.omitted {
        return format!(" {}", paint.paint(RED, "rows omitted"));
    }
    match (&event.op, &event.before, &event.after) {
        (Op::Update, Image::Value(_), Image::Value(_)) => changes(event, paint),
        (Op::Event | Op::Schema, _, Image::Value(after)) => format!(" {}", short(after)),
        (_, _, Image::Value(_)) => columns(&event.after, &event.key),
        (_, Image::Value(_), _) => columns(&event.before, &event.key),
        _ => String::new(),
    }
}

/// The columns that differ, before and after.
fn changes(event: &Event, paint: Paint) -> String {
    let before: BTreeMap<_, _> = event.before.columns().into_iter().collect();
    let mut text = String::new();
    for (column, after) in event.after.columns() {
        let Some(before) = before.get(&column) else { continue };
        let differs = match &event.changed {
            Some(changed) => changed.contains(&column),
            None => before.get() != after.get(),
        };
        if differs {
            let (before, after) = (paint.paint(RED, &short(before)), paint.paint(GREEN, &short(&after)));
            let _ = write!(text, " {}: {before} → {after}", shown(&column));
        }
    }
    text
}

/// The row without its key, which stands before it.
fn columns(image: &Image, key: &Image) -> String {
    let key: Vec<_> = key.columns().into_iter().map(|(column, _)| column).collect();
    let columns: Vec<_> = image.columns().into_iter().filter(|(column, _)| !key.contains(column)).collect();
    let mut text = String::new();
    for (column, value) in columns.iter().take(MAX_COLUMNS) {
        let _ = write!(text, " {}: {}", shown(column), short(value));
    }
    if columns.len() > MAX_COLUMNS {
        let _ = write!(text, " … {} more", columns.len() - MAX_COLUMNS);
    }
    text
}

fn lag(event: &Event, now: DateTime<Utc>) -> String {
    let micros = (now - event.ts).num_microseconds().unwrap_or(i64::MAX);
    match micros {
        // Another machine's clock; it says nothing about the feed.
        i64::MIN..0 => "0 ms".into(),
        0..10_000 => format!("{}.{} ms", micros / 1000, micros % 1000 / 100),
        10_000..10_000_000 => format!("{} ms", micros / 1000),
        _ => format!("{} s", micros / 1_000_000),
    }
}

fn short(value: &RawValue) -> String {
    let text = value.get();
    match text.char_indices().nth(MAX_VALUE_CHARS) {
        Some((end, _)) => shown(&format!("{}…", &text[..end])),
        None => shown(text),
    }
}

/// Control characters as their code: a value must not move the cursor or retitle the window.
fn shown(text: &str) -> String {
    if !text.chars().any(char::is_control) {
        return text.to_owned();
    }
    text.chars().flat_map(|c| if c.is_control() { c.escape_unicode().collect() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(text: &str) -> Event {
        let text = format!(
            r#"{{"seq":1,"id":"5f0c0e4c-9a39-4f9b-8f54-6a3b7f1f2a10","table":"public.orders","tx":"7","tx_end":true,"ts":"2026-11-20T10:00:00.123456+00:00",{text}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    fn plain(event: &Event) -> String {
        event_line(event, event.ts + chrono::TimeDelta::microseconds(1_450), Paint(false))
    }

    #[test]
    fn an_update_shows_what_changed_and_from_what() {
        let update = event(
            r#""op":"UPDATE","key":{"id":42},"before":{"id":42,"status":"new","n":1},"after":{"id":42,"status":"paid","n":1},"changed":["status"],"transition":"enter""#,
        );
        let want = r#"10:00:00.123 UPDATE   public.orders id=42 (enters) status: "new" → "paid"  1.4 ms"#;
        assert_eq!(plain(&update), want);
    }

    #[test]
    fn an_insert_shows_the_row_and_a_delete_what_it_was() {
        let insert = event(r#""op":"INSERT","key":{"id":1},"before":null,"after":{"id":1,"n":10.50}"#);
        assert!(plain(&insert).contains("INSERT   public.orders id=1 n: 10.50 "), "{}", plain(&insert));
        let delete = event(r#""op":"DELETE","key":{"id":1},"before":{"id":1,"n":2},"after":null"#);
        assert!(plain(&delete).contains("DELETE   public.orders id=1 n: 2 "), "{}", plain(&delete));
    }

    /// Found in use: the TRUNCATE of one partition was shown as that of the whole table.
    #[test]
    fn a_truncated_partition_is_not_shown_as_the_whole_table() {
        for (headers, want) in [
            ("", "TRUNCATE public.orders  1.4 ms"),
            (r#","headers":null"#, "TRUNCATE public.orders  1.4 ms"),
            (r#","headers":{"traceparent":"00"}"#, "TRUNCATE public.orders  1.4 ms"),
            (
                r#","headers":{"tidewire.partition":"public.orders_1"}"#,
                "TRUNCATE public.orders (only its partition public.orders_1)  1.4 ms",
            ),
        ] {
            let line = plain(&event(&format!(r#""op":"TRUNCATE","before":null,"after":null{headers}"#)));
            assert!(line.ends_with(want), "{line}");
        }
    }

    #[test]
    fn nothing_in_the_database_steers_the_terminal() {
        let insert = event("\"op\":\"INSERT\",\"before\":null,\"after\":{\"a\u{9b}31m\":\"x\u{9d}\u{7f}\"}");
        assert!(!plain(&insert).chars().any(char::is_control), "{:?}", plain(&insert));
    }

    #[test]
    fn only_a_painted_line_has_colours() {
        let insert = event(r#""op":"INSERT","before":null,"after":{}"#);
        assert!(event_line(&insert, insert.ts, Paint(true)).contains("\x1b[32m"));
        assert!(!plain(&insert).contains('\x1b'));
    }

    #[test]
    fn a_long_value_is_cut_between_characters() {
        let long = "ä".repeat(100);
        let insert = event(&format!(r#""op":"INSERT","before":null,"after":{{"note":"{long}"}}"#));
        assert!(plain(&insert).contains('…'));
    }
}
