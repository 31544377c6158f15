//! Figures of one fault: how long the relay was silent, how long clients saw nothing, when everybody had caught up.

use super::FaultFigures;
use super::timeline::{Timeline, Turn};
use crate::history::Micros;

/// What a fault may still cause after its heal.
const AFTER: Micros = 2_000_000;
/// Connections that a fault cost are noticed within this (a caught-up client notices silence in 20 s).
const NOTICED: Micros = 25_000_000;
/// The backlog counts as drained when a row is relayed this soon after its commit.
const DRAINED: Micros = 500_000;
/// Faults closer than this to another one are not alone.
const ELBOW: Micros = 1_000_000;

/// Faults that take away the process or the session that relays: the relay's silence begins with them.
fn silences_relay(class: &str) -> bool {
    matches!(class, "F2" | "F3" | "F5" | "F6" | "F10" | "F11" | "F13" | "F16" | "F20" | "FP")
}

/// Faults whose victims find out only by silence.
fn notices_late(class: &str) -> bool {
    matches!(class, "F4" | "F7" | "F8")
}

pub(super) fn measure(timeline: &Timeline) -> Vec<FaultFigures> {
    let mut all: Vec<FaultFigures> = Vec::new();
    for (f, (on, fault)) in &timeline.on {
        let done = timeline.done.get(f);
        let mut figures = FaultFigures {
            f: *f,
            class: fault.class.clone(),
            variant: fault.variant.clone(),
            target: fault.target.clone(),
            on: *on,
            off: timeline.off.get(f).copied(),
            took: done.is_some_and(|(_, done)| done.took),
            progressed: done.is_some_and(|(_, done)| done.progressed),
            alone: alone(timeline, *f, *on),
            skipped: None,
            figures: done.map(|(_, done)| done.figures.clone()).unwrap_or_default(),
        };
        if let Some(caught_up) = done.and_then(|(_, done)| done.caught_up) {
            figures.figures.insert("caught_up_us".into(), caught_up as f64);
        }
        if figures.took {
            add_timeline(timeline, &mut figures);
        }
        all.push(figures);
    }
    all.extend(timeline.skipped.iter().map(|(f, (t, class, why))| FaultFigures {
        f: *f,
        class: class.clone(),
        on: *t,
        skipped: Some(why.clone()),
        ..FaultFigures::default()
    }));
    all.sort_by_key(|fault| fault.f);
    all
}

fn alone(timeline: &Timeline, f: u32, on: Micros) -> bool {
    let end = |f: &u32| timeline.done.get(f).map_or(timeline.end, |(t, _)| *t);
    let ends = end(&f);
    timeline.on.iter().filter(|(other, _)| **other != f).all(|(other, (t, _))| *t > ends || end(other) + ELBOW < on)
}

fn add_timeline(timeline: &Timeline, fault: &mut FaultFigures) {
    let off = fault.off.unwrap_or(timeline.end);
    if silences_relay(&fault.class) {
        insert(fault, "relay_silence_us", relay_silence(timeline, fault.on, off + AFTER));
    }
    if let Some(accepted) = fault.figures.remove("accepted_at_us") {
        insert(fault, "relay_after_accept_us", relayed_after(timeline, accepted as Micros));
    }
    let wide = timeline.wide();
    let untouched = |s: &u32| !was(timeline, *s, Turn::Lost, fault.on, off + AFTER);
    let silence = wide
        .iter()
        .filter(|s| untouched(s) && lived(timeline, **s, fault.on, off + AFTER))
        .filter_map(|s| client_silence(timeline, *s, fault.on, off + AFTER))
        .max();
    insert(fault, "others_silence_us", silence);
    let noticed = if notices_late(&fault.class) { off + NOTICED } else { off + AFTER };
    insert(fault, "losers_caught_up_us", losers_caught_up(timeline, fault.on, noticed));
    let closed = timeline.turns.keys().filter(|s| was(timeline, **s, Turn::Lost, fault.on, off)).count();
    fault.figures.insert("sockets_closed_n".into(), closed as f64);
    if let Some(ratio) = drain_ratio(timeline, off) {
        fault.figures.insert("drain_ratio_x".into(), ratio);
    }
}

fn insert(fault: &mut FaultFigures, name: &str, value: Option<Micros>) {
    if let Some(value) = value {
        fault.figures.insert(name.into(), value as f64);
    }
}

/// The longest time without a row relayed, of silences that reach into the window.
fn relay_silence(timeline: &Timeline, on: Micros, end: Micros) -> Option<Micros> {
    let first = timeline.relayed.partition_point(|(t, _)| *t <= on);
    let mut before = on;
    let mut worst = None;
    for (t, _) in &timeline.relayed[first..] {
        worst = worst.max(Some(t - before));
        if *t >= end {
            break;
        }
        before = *t;
    }
    worst
}

fn relayed_after(timeline: &Timeline, moment: Micros) -> Option<Micros> {
    let first = timeline.relayed.partition_point(|(t, _)| *t < moment);
    timeline.relayed.get(first).map(|(t, _)| t - moment)
}

fn was(timeline: &Timeline, s: u32, what: Turn, from: Micros, to: Micros) -> bool {
    timeline.turns.get(&s).is_some_and(|turns| turns.iter().any(|(t, turn)| *turn == what && *t >= from && *t <= to))
}

/// It had begun before the window and ended after it.
fn lived(timeline: &Timeline, s: u32, from: Micros, to: Micros) -> bool {
    let Some(calls) = timeline.calls.get(&s) else { return false };
    calls.first().is_some_and(|first| *first < from) && calls.last().is_some_and(|last| *last > to)
}

/// The longest time in which something had been relayed and nothing came: while nothing is written nobody is silent.
fn client_silence(timeline: &Timeline, s: u32, on: Micros, end: Micros) -> Option<Micros> {
    let calls = timeline.calls.get(&s)?;
    let first = calls.partition_point(|t| *t <= on);
    let mut before = on;
    let mut worst = None;
    for t in &calls[first..] {
        let due = timeline.relayed.partition_point(|(relayed, _)| *relayed < before);
        let since = timeline.relayed.get(due).map_or(*t, |(relayed, _)| *relayed);
        worst = worst.max(Some(t.saturating_sub(since)));
        if *t >= end {
            break;
        }
        before = *t;
    }
    worst
}

/// The longest way of a victim from its loss to the present again.
fn losers_caught_up(timeline: &Timeline, on: Micros, noticed: Micros) -> Option<Micros> {
    let back = |turns: &Vec<(Micros, Turn)>| {
        let lost = turns.iter().position(|(t, turn)| *turn == Turn::Lost && *t >= on && *t <= noticed)?;
        let after = turns[lost..].iter().find(|(_, turn)| matches!(turn, Turn::CaughtUp | Turn::Ended));
        after.filter(|(_, turn)| *turn == Turn::CaughtUp).map(|(t, _)| t - turns[lost].0)
    };
    timeline.turns.values().filter_map(back).max()
}

/// How many times faster than it was written the backlog was relayed after the heal; nothing if there was none.
fn drain_ratio(timeline: &Timeline, off: Micros) -> Option<f64> {
    let first = timeline.relayed.partition_point(|(t, _)| *t < off);
    let drained = timeline.relayed[first..]
        .iter()
        .position(|(t, committed)| committed.is_some_and(|committed| t.saturating_sub(committed) < DRAINED))?;
    if drained == 0 {
        return None;
    }
    let began = timeline.relayed[first].0;
    let seconds = (timeline.relayed[first + drained].0.saturating_sub(began)) as f64 / 1e6;
    let written: u64 = timeline
        .written
        .iter()
        .filter(|(t, _)| *t >= began && (*t - began) as f64 / 1e6 <= seconds)
        .map(|(_, rows)| rows)
        .sum();
    (written > 0 && seconds > 0.1).then(|| drained as f64 / written as f64)
}
