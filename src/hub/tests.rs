//! The hub's end of subscriptions that a schema change breaks, and its positions inside transactions.

mod busy;
mod memory;
mod model;

use std::collections::HashMap;

use super::*;
use crate::auth::scope::{ColumnMask, OpSet};
use crate::cursor::EpochStart;
use crate::event::NewEvent;
use crate::filter::{Column, ColumnType, Filter};
use crate::hub::plan::TablePlan;
use crate::protocol::message::ResyncReason;

const FRAME_BYTES: usize = 1 << 20;

fn hub() -> Arc<Hub> {
    let options = HubOptions {
        ring_window: Duration::from_secs(300),
        ring_bytes: 1 << 20,
        frame_bytes: FRAME_BYTES,
        frames_bytes: 64 << 20,
    };
    let hub = Arc::new(Hub::new(options, Arc::new(Metrics::new().unwrap())));
    hub.restart(0, None, None, Epochs::default());
    hub.hold(false);
    hub
}

fn event(seq: Seq, operation: Operation, after: &str) -> Event {
    let id = Uuid::from_u128(u128::from(seq));
    let new = NewEvent {
        event_id: id,
        table: "public.t",
        operation,
        key: None,
        old_key: None,
        before: None,
        after: Some(after),
        event_type: None,
        headers: None,
        xid: seq,
        created_at: chrono::DateTime::UNIX_EPOCH,
        omitted: false,
    };
    let mut body = String::new();
    new.compose(&mut body);
    let table = "public.t".into();
    Event { seq, id, xid: seq, operation, tx_end: true, omitted: false, table, body: body.into() }
}

fn insert(seq: Seq) -> Event {
    event(seq, Operation::Insert, r#"{"a":1}"#)
}

fn drops(seq: Seq, column: &str) -> Event {
    let after = format!(r#"{{"changes":[{{"kind":"drop_column","column":"{column}"}}],"columns":[],"relid":1}}"#);
    event(seq, Operation::Schema, &after)
}

fn plans() -> Plans {
    let filter = Filter::compile("a = 1", &[Column::new("a", ColumnType::Int4)]).unwrap();
    let plan = TablePlan {
        ops: OpSet::ALL,
        filter: Some(filter),
        condition: None,
        mask: ColumnMask::All,
        columns: None,
        basis: None,
    };
    Plans::Exact(HashMap::from([("public.t".into(), Arc::new(plan))]))
}

fn join(hub: &Arc<Hub>) -> Tap {
    hub.join("k", &Arc::default(), plans)
}

fn frame(pull: Pull) -> (usize, Seq) {
    match pull {
        Pull::Frame(frame) => (frame.count, frame.through),
        other => panic!("no frame: {other:?}"),
    }
}

#[test]
fn a_subscription_ends_after_what_came_before_the_change_that_breaks_it() {
    let hub = hub();
    let tap = join(&hub);
    hub.append(&[insert(1), drops(2, "b"), insert(3), drops(4, "a"), insert(5)], Instant::now()).unwrap();
    assert_eq!(frame(tap.pull(0)), (4, 4), "up to the change itself");
    let Pull::Ended(ended) = tap.pull(4) else { panic!("not ended") };
    assert_eq!((ended.seq, ended.reason), (4, ResyncReason::SchemaChanged));

    let after = join(&hub);
    hub.append(&[insert(6)], Instant::now()).unwrap();
    assert_eq!(frame(after.pull(5)), (1, 6), "whoever joins later gets a group of its own");
    drop(tap);
    hub.append(&[insert(7)], Instant::now()).unwrap();
    assert_eq!(frame(after.pull(6)), (1, 7), "the end of the old group takes nothing from the new one");
}

#[test]
fn whoever_catches_up_across_the_change_is_stopped_before_it() {
    let hub = hub();
    hub.append(&[insert(1), insert(2), drops(3, "a"), insert(4)], Instant::now()).unwrap();
    let tap = join(&hub);
    assert_eq!(frame(tap.pull(0)), (2, 2));
    assert!(matches!(tap.pull(2), Pull::Ended(ended) if ended.seq == 2));
    assert!(matches!(tap.pull(3), Pull::Frame(_)), "after the change the plan fits");
    assert_eq!(tap.group().ended(), None, "it ends nothing for the others");
}

#[test]
fn a_listener_far_behind_its_ended_group_reads_the_ring_up_to_the_end() {
    let hub = hub();
    hub.append(&[insert(1)], Instant::now()).unwrap();
    let tap = join(&hub);
    hub.append(&[insert(2), drops(3, "a"), insert(4)], Instant::now()).unwrap();
    assert_eq!(frame(tap.pull(0)).1, 2);
    // What the ring has is read up to the change; its own frames would have told that as well.
    assert!(matches!(tap.pull(2), Pull::Ended(_)));
    assert!(matches!(tap.pull(3), Pull::Ended(_)));
}

/// One that does not end its transaction.
fn inside(seq: Seq) -> Event {
    Event { tx_end: false, ..insert(seq) }
}

fn first_epoch() -> Epochs {
    Epochs::new(vec![EpochStart { epoch: 1, start_seq: 0 }])
}

fn edge(hub: &Hub) -> (Seq, Seq) {
    let edge = hub.edge();
    (edge.boundary.seq, edge.deliverable.seq)
}

/// A node that starts while a transaction larger than its ring is relayed in parts.
#[test]
fn a_ring_that_begins_inside_a_transaction_tells_nobody_a_position_in_it() {
    let hub = hub();
    hub.restart(5, Some(Uuid::from_u128(5)), Some((3, Uuid::from_u128(3))), Epochs::default());
    assert_eq!(edge(&hub), (3, 5));
    hub.append(&[inside(6)], Instant::now()).unwrap();
    assert_eq!(edge(&hub), (3, 5));
    let tap = join(&hub);
    assert!(matches!(tap.pull(3), Pull::Log), "whoever begins now reads the whole transaction from the log");
    hub.append(&[insert(7)], Instant::now()).unwrap();
    assert_eq!(edge(&hub), (7, 7));
}

#[test]
fn a_tail_that_is_lost_inside_a_transaction_leaves_the_position_before_it() {
    let hub = hub();
    hub.restart(0, None, None, first_epoch());
    let tap = join(&hub);
    hub.append(&[insert(1), inside(2), inside(3), insert(4)], Instant::now()).unwrap();
    assert_eq!(edge(&hub), (4, 4));
    let epochs = [(1, 0), (2, 3)].map(|(epoch, start_seq)| EpochStart { epoch, start_seq });
    let [first, third] = [1, 3].map(Uuid::from_u128);
    hub.set_epochs(Epochs::new(epochs.into()), Some(third), Some((1, first)));
    assert_eq!(edge(&hub), (1, 3));
    assert!(matches!(tap.pull(1), Pull::Idle(_)));
    hub.append(&[insert(4)], Instant::now()).unwrap();
    assert_eq!(frame(tap.pull(1)), (3, 4), "whole, with the end that it has now");
}

/// The lost tail of the first failover must go, though the second one began far beyond it.
#[test]
fn a_node_that_slept_through_two_failovers_forgets_the_first_ones_tail() {
    let hub = hub();
    hub.restart(0, None, None, first_epoch());
    hub.append(&[insert(1), insert(2), insert(3)], Instant::now()).unwrap();
    let epochs = [(1, 0), (2, 1), (3, 500)].map(|(epoch, start_seq)| EpochStart { epoch, start_seq });
    let first = Uuid::from_u128(1);
    hub.set_epochs(Epochs::new(epochs.into()), Some(first), Some((1, first)));
    assert_eq!((hub.high_water(), edge(&hub)), (1, (1, 1)));
}

/// The second of two primaries never heard of the first one's epoch, and gave its own.
#[test]
fn an_epoch_that_is_gone_takes_its_events_with_it() {
    let hub = hub();
    let list = |starts: [(u32, Seq); 2]| {
        Epochs::new(starts.map(|(epoch, start_seq)| EpochStart { epoch, start_seq }).to_vec())
    };
    hub.restart(0, None, None, list([(1, 0), (2, 2)]));
    hub.append(&[insert(1), insert(2), insert(3), insert(4)], Instant::now()).unwrap();
    let third = Uuid::from_u128(3);
    hub.set_epochs(list([(1, 0), (7, 3)]), Some(third), Some((3, third)));
    assert_eq!(hub.high_water(), 2);
}

#[test]
fn a_transaction_that_a_subscription_ends_in_is_not_called_whole() {
    let torn = [inside(1), Event { tx_end: false, ..drops(2, "a") }, insert(3)];
    let is_open = |pull: Pull| matches!(pull, Pull::Frame(frame) if frame.open);
    let live = hub();
    let tap = join(&live);
    live.append(&torn, Instant::now()).unwrap();
    assert!(is_open(tap.pull(0)));
    let late = hub();
    late.append(&torn, Instant::now()).unwrap();
    assert!(is_open(join(&late).pull(0)), "catching up");
}

#[test]
fn whoever_waits_inside_a_transaction_is_woken_at_its_end_even_if_that_is_not_for_him() {
    let hub = hub();
    hub.restart(5, Some(Uuid::from_u128(5)), Some((3, Uuid::from_u128(3))), Epochs::default());
    let signal = Arc::new(Signal::default());
    let _tap = hub.join("k", &signal, plans);
    let woken = Arc::new(Woken::default());
    signal.register(&Arc::clone(&woken).into());
    hub.append(&[event(6, Operation::Insert, r#"{"a":2}"#)], Instant::now()).unwrap();
    assert!(woken.0.load(Ordering::Relaxed));
}

#[derive(Default)]
struct Woken(std::sync::atomic::AtomicBool);

impl std::task::Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Found in review: a session read the edge, the log was exchanged for another one, and what the session then took was half
/// of the one and half of the other.
#[test]
fn what_is_taken_while_an_epoch_begins_is_told_from_what_was_before_by_its_generation() {
    const EPOCHS: u32 = 300;
    const APPENDED: Seq = 5;
    const LOST: Seq = 2;
    // Epoch n + 1 begins after APPENDED - LOST more events than epoch n.
    let epochs_up_to = |newest: u32| {
        Epochs::new(
            (1..=newest).map(|n| EpochStart { epoch: n, start_seq: u64::from(n - 1) * (APPENDED - LOST) }).collect(),
        )
    };
    let id = |epoch: u32, seq: Seq| Uuid::from_u128(u128::from(epoch) << 64 | u128::from(seq));
    let hub = hub();
    hub.restart(0, None, None, epochs_up_to(1));
    hub.hold(false);
    let first = hub.edge().generation;
    let tap = join(&hub);
    let looks = AtomicU64::new(0);
    let taken = std::thread::scope(|scope| {
        scope.spawn(|| {
            for epoch in 1..=EPOCHS {
                let newest = hub.high_water();
                let events: Vec<Event> =
                    (newest + 1..=newest + APPENDED).map(|seq| Event { id: id(epoch, seq), ..insert(seq) }).collect();
                hub.append(&events, Instant::now()).unwrap();
                // Once with the events there; from then on both go at their own pace.
                let seen = looks.load(Ordering::Relaxed);
                while looks.load(Ordering::Relaxed) < seen + 2 {
                    std::thread::yield_now();
                }
                let start = newest + APPENDED - LOST;
                hub.set_epochs(epochs_up_to(epoch + 1), Some(id(epoch, start)), None);
            }
        });
        let (mut passed, mut judged, mut taken) = (0, first, 0_u32);
        while judged < first + u64::from(EPOCHS) {
            looks.fetch_add(1, Ordering::Relaxed);
            let edge = hub.edge();
            if edge.held {
                continue;
            }
            if edge.generation != judged {
                judged = edge.generation;
                passed = passed.min((judged - first) * (APPENDED - LOST));
                continue;
            }
            let pull = tap.pull(passed);
            if hub.edge().generation != edge.generation {
                continue;
            }
            let Pull::Frame(frame) = pull else { continue };
            let epoch = epochs_up_to(u32::try_from(judged - first).unwrap() + 1).of(frame.through);
            assert_eq!(frame.cursor, Cursor::at(epoch, frame.through, id(epoch, frame.through)));
            passed = frame.through;
            taken += 1;
        }
        taken
    });
    assert!(taken > 0, "nothing was taken at all");
}

/// Found in review: only their size bounded them, so 10,000 quiet subscriptions kept 10 GB.
#[test]
fn frames_are_let_go_of_in_time_and_whoever_is_behind_reads_the_ring() {
    let hub = hub();
    let tap = join(&hub);
    let start = Instant::now();
    hub.append(&[insert(1)], start).unwrap();
    hub.tick(start + FRAME_AGE);
    assert!(hub.metrics.frames_bytes.get() > 0, "whoever is a little behind takes them");
    hub.append(&[insert(2)], start).unwrap();
    hub.tick(start + FRAME_AGE * 2);
    assert!(matches!(tap.group().held(0), Held::Behind));
    assert!(matches!(tap.group().held(1), Held::Frame(_)));
    hub.tick(start + FRAME_AGE * 3);
    assert_eq!(hub.metrics.frames_bytes.get(), 0);
    assert_eq!(frame(tap.pull(0)), (2, 2));
    assert!(matches!(tap.pull(2), Pull::Idle(_)));
}

/// Rows of this size, and conditions that read them hundreds of times: found in review, one connection with sixty of them
/// and one row stopped a node for fifteen seconds.
fn large(seq: Seq) -> Event {
    event(seq, Operation::Insert, &format!(r#"{{"a":1,"b":"{}"}}"#, "x".repeat(900_000)))
}

fn dear_plans() -> Plans {
    let terms = vec!["b LIKE '%_q0_0%'"; 200].join(" OR ");
    let columns = [Column::new("a", ColumnType::Int4), Column::new("b", ColumnType::Text)];
    let filter = Filter::compile(&format!("a < 2 AND ({terms} OR a = 1)"), &columns).unwrap();
    let plan = TablePlan {
        ops: OpSet::ALL,
        filter: Some(filter),
        condition: None,
        mask: ColumnMask::All,
        columns: None,
        basis: None,
    };
    Plans::Exact(HashMap::from([("public.t".into(), Arc::new(plan))]))
}

/// Reads everything after `passed`, as a session does; how much that was, and up to where.
fn read(tap: &Tap, mut passed: Seq) -> (usize, Seq) {
    let mut count = 0;
    loop {
        let pull = match tap.pull(passed) {
            Pull::Dear(look) => look.at_once(),
            pull => pull,
        };
        match pull {
            Pull::Frame(frame) => (count, passed) = (count + frame.count, frame.through),
            Pull::Nothing(cursor) => passed = cursor.seq,
            _ => return (count, passed),
        }
    }
}

#[test]
fn a_dear_filter_is_passed_over_and_its_readers_look_themselves() {
    let hub = hub();
    let dear: Vec<Tap> = (0..2).map(|_| hub.join("dear", &Arc::default(), dear_plans)).collect();
    let cheap = join(&hub);
    hub.append(&[insert(1), large(2), insert(3)], Instant::now()).unwrap();
    assert_eq!(hub.metrics.filters_passed_over_total.get(), 1);
    assert_eq!(frame(cheap.pull(0)), (2, 2), "others get theirs at once");
    assert_eq!(frame(cheap.pull(2)), (1, 3));
    for tap in &dear {
        assert!(matches!(tap.pull(0), Pull::Dear(_)), "not where others wait");
        assert_eq!(read(tap, 0), (3, 3));
    }
    let found = dear[0].group().found((hub.edge().generation, 0));
    assert!(found.is_some(), "the second one took what the first one had found");
    assert_eq!(frame(dear[0].pull(2)), (1, 3), "what is cheap follows without a thread");
    hub.append(&[insert(4)], Instant::now()).unwrap();
    assert_eq!(frame(dear[0].pull(3)), (1, 4), "and from the group's frames");
}

#[test]
fn a_dear_subscription_ends_where_the_change_that_breaks_it_stands() {
    let hub = hub();
    let tap = hub.join("dear", &Arc::default(), dear_plans);
    hub.append(&[insert(1), large(2), drops(3, "b"), insert(4)], Instant::now()).unwrap();
    assert_eq!(read(&tap, 0), (2, 2));
    // As whoever catches up, it is not shown the change itself: it is told of it.
    assert!(matches!(tap.pull(2), Pull::Ended(ended) if ended.reason == ResyncReason::SchemaChanged));
}

#[test]
fn equal_subscriptions_share_a_group_and_all_groups_one_memory_of_frames() {
    const LIMIT: usize = 1 << 20;
    let options = HubOptions {
        ring_window: Duration::from_secs(300),
        ring_bytes: 64 << 20,
        frame_bytes: 1 << 20,
        frames_bytes: LIMIT,
    };
    let hub = Arc::new(Hub::new(options, Arc::new(Metrics::new().unwrap())));
    hub.restart(0, None, None, Epochs::default());
    hub.hold(false);
    let all = || {
        let plan = TablePlan {
            ops: OpSet::ALL,
            filter: None,
            condition: None,
            mask: ColumnMask::All,
            columns: None,
            basis: None,
        };
        Plans::Exact(HashMap::from([("public.t".into(), Arc::new(plan))]))
    };
    let taps: Vec<Tap> = (0..200).map(|n| hub.join(&format!("key {}", n % 100), &Arc::default(), all)).collect();
    assert_eq!(hub.metrics.filter_groups.get(), 100);
    for seq in 1..=12 {
        let row = event(seq, Operation::Insert, &format!(r#"{{"a":1,"b":"{}"}}"#, "x".repeat(100_000)));
        hub.append(&[row], Instant::now()).unwrap();
        assert!(hub.kept.bytes() <= LIMIT, "{} bytes of frames", hub.kept.bytes());
    }
    assert!(hub.metrics.frames_evicted_total.get() > 0);
    for tap in &taps {
        let mut passed = 0;
        let mut rows = 0;
        while let Pull::Frame(frame) = tap.pull(passed) {
            (passed, rows) = (frame.through, rows + frame.count);
        }
        assert_eq!((passed, rows), (12, 12), "each reads everything, from frames or from the ring");
    }
}

#[test]
fn messages_are_shared_by_those_of_one_id_and_right_for_all() {
    let hub = hub();
    let tap = join(&hub);
    hub.append(&[insert(1)], Instant::now()).unwrap();
    let Pull::Frame(frame) = tap.pull(0) else { panic!("no frame") };
    let prev = Cursor::origin(0);
    let before = hub.kept.bytes();
    let alone = frame.message("alone", &prev);
    assert_eq!(hub.kept.bytes(), before, "what one reader is written is not kept");
    let [first, second, third] = [0; 3].map(|_| frame.message("o\"x", &prev));
    assert_eq!(first, second);
    assert_eq!(second.as_ptr(), third.as_ptr(), "shared from the second on");
    assert_eq!(hub.kept.bytes(), before + first.len());
    for (message, id) in [(&alone, "alone"), (&third, "o\"x"), (&frame.message("other", &prev), "other")] {
        let value: serde_json::Value = serde_json::from_slice(message).unwrap();
        assert_eq!((value["id"].as_str(), value["events"].as_array().unwrap().len()), (Some(id), 1));
    }
    drop((frame, tap));
    hub.tick(Instant::now() + FRAME_AGE);
    hub.tick(Instant::now() + FRAME_AGE * 2);
    hub.tick(Instant::now() + FRAME_AGE * 3);
    assert_eq!(hub.kept.bytes(), 0);
}
