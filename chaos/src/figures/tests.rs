use std::collections::BTreeMap;
use std::convert::Infallible;

use tidewire::client::Cursor;
use uuid::Uuid;

use super::*;
use crate::history::{Delivered, FaultDone, FaultOn, LogRow, Record, Write};

const SECOND: Micros = 1_000_000;

fn commit(t: Micros, xid: u64) -> Line {
    let write = Write { table: "public.t".into(), op: "INSERT".into(), key: 1, val: xid.to_string(), prev: None };
    Line(t, Record::Commit { w: 0, n: xid, xid, ops: vec![write] })
}

fn row(seq: u64, xid: u64, relayed: Micros) -> Line {
    let row = LogRow {
        branch: 0,
        seq,
        xid,
        tx_end: true,
        event_id: Uuid::nil(),
        table: "public.t".into(),
        op: "INSERT".into(),
        key: Some(1),
        val: None,
        prev: None,
        before: None,
        relayed: relayed as i64,
        fingerprint: 0,
    };
    Line(relayed, Record::Log(row))
}

fn deliver(t: Micros, s: u32, seq: u64) -> Line {
    Line(t, Record::Deliver { s, e: vec![Delivered(seq, 0, None)], cursor: cursor(seq), open: false })
}

fn cursor(seq: u64) -> Cursor {
    Cursor { epoch: 1, seq, check: 0 }
}

fn on(t: Micros, f: u32, class: &str) -> Line {
    Line(t, Record::FaultOn(FaultOn { f, class: class.into(), variant: "x".into(), target: "node1".into() }))
}

fn done(t: Micros, f: u32, class: &str) -> Line {
    let done = FaultDone {
        f,
        class: class.into(),
        took: true,
        progressed: true,
        caught_up: Some(7),
        figures: BTreeMap::new(),
        violations: Vec::new(),
    };
    Line(t, Record::FaultDone(done))
}

fn figures(lines: Vec<Line>) -> Figures {
    measure(lines.into_iter().map(Ok::<_, Infallible>)).unwrap()
}

#[test]
fn a_leader_kill_is_measured_by_the_silence_of_the_log() {
    let lines = vec![
        commit(0, 1),
        on(SECOND, 0, "F2"),
        commit(SECOND + 1, 2),
        Line(2 * SECOND, Record::FaultOff { f: 0 }),
        done(3 * SECOND, 0, "F2"),
        row(1, 1, SECOND - 10),
        row(2, 2, SECOND + 250_000),
    ];
    let fault = &figures(lines).faults[0];
    assert_eq!(fault.figures["relay_silence_us"], 250_000.0);
    assert_eq!(fault.figures["caught_up_us"], 7.0);
    assert!(fault.alone);
}

#[test]
fn a_fault_within_another_one_is_not_alone() {
    let lines = vec![on(0, 0, "F2"), on(SECOND, 1, "F1"), done(2 * SECOND, 0, "F2"), done(3 * SECOND, 1, "F1")];
    assert!(figures(lines).faults.iter().all(|fault| !fault.alone));
}

#[test]
fn lag_runs_from_the_commit_to_the_handler() {
    let lines = vec![commit(100, 5), deliver(2_100, 1, 1), row(1, 5, 1_000)];
    let lag = figures(lines).lag;
    assert_eq!((lag[0].events, lag[0].p50, lag[0].max), (1, 2_000, 2_000));
}

#[test]
fn a_repeated_transaction_number_means_the_last_commit_before_the_row() {
    let lines = vec![commit(100, 5), commit(9_000, 5), deliver(2_100, 1, 1), row(1, 5, 1_000)];
    assert_eq!(figures(lines).lag[0].p50, 2_000);
}

#[test]
fn buckets_hold_what_their_edges_say() {
    for micros in [2, 3, 10, 999, 1_000, 123_456] {
        assert!(bucket_edge(bucket(micros)) >= micros as f64, "{micros}");
        assert!(bucket_edge(bucket(micros)) <= micros as f64 * 1.45, "{micros}");
    }
}
