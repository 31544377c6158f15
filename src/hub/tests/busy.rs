//! Found in review: on a busy table every group was passed over for what all of them cost, a group of thousands first of all,
//! and each of its listeners then rendered the same events again. And what a look is charged for.

use super::*;
use crate::hub::look::{Look, Worked};

fn table(filter: Option<&str>) -> Plans {
    let columns = [("a", ColumnType::Int4), ("b", ColumnType::Text)].map(|(name, kind)| Column::new(name, kind));
    let filter = filter.map(|text| Filter::compile(text, &columns).unwrap());
    let plan =
        TablePlan { ops: OpSet::ALL, filter, condition: None, mask: ColumnMask::All, columns: None, basis: None };
    Plans::Exact(HashMap::from([("public.t".into(), Arc::new(plan))]))
}

/// A row of some 350 bytes.
fn small(seq: Seq, xid: u64, tx_end: bool) -> Event {
    let after = format!(r#"{{"a":{},"b":"x","c":"{}"}}"#, seq % 10, "c".repeat(180));
    Event { xid, tx_end, ..event(seq, Operation::Insert, &after) }
}

/// One group of many, and many groups of one that no index serves.
fn crowd(hub: &Arc<Hub>, listeners: usize, groups: usize, terms: &str) -> (Vec<Tap>, Vec<Tap>) {
    let popular = (0..listeners).map(|_| hub.join("popular", &Arc::default(), || table(None))).collect();
    let others = (0..groups).map(|n| {
        let filter = format!("a > 5 AND b >= 'x' AND a <> {}{terms}", 1_000 + n);
        hub.join(&filter, &Arc::default(), || table(Some(&filter)))
    });
    (popular, others.collect())
}

/// Reads everything from frames alone: how much that was, and up to where. None: it came to where there are none.
fn framed(tap: &Tap) -> Option<(usize, Seq)> {
    let (mut count, mut passed) = (0, 0);
    loop {
        match tap.group().held(passed) {
            Held::Frame(frame) => (count, passed) = (count + frame.count, frame.through),
            Held::Nothing => return Some((count, passed)),
            Held::Behind => return None,
        }
    }
}

#[test]
fn a_busy_table_passes_nobody_over_for_what_all_cost_together() {
    // A node that reads on after a gap, and one that gets a chunk for many groups.
    for (events, groups) in [(2_000, 120), (131, 1_800)] {
        let hub = hub();
        let (popular, others) = crowd(&hub, 50, groups, "");
        let log: Vec<Event> = (1..=events).map(|seq| small(seq, seq, true)).collect();
        hub.append(&log, Instant::now()).unwrap();
        assert_eq!(edge(&hub), (events, events), "the calls after the first go on to the end");
        assert_eq!(hub.metrics.filters_passed_over_total.get(), 0, "{events} events and {groups} groups");
        let all = usize::try_from(events).unwrap();
        let matching = log.iter().filter(|event| event.seq % 10 > 5).count();
        for tap in &popular {
            assert_eq!(framed(tap), Some((all, events)), "{events} events and {groups} groups");
        }
        for tap in &others {
            assert_eq!(framed(tap).unwrap().0, matching);
        }
    }
}

#[test]
fn a_large_transaction_leaves_the_frames_to_those_who_are_many_and_is_never_torn() {
    const EVENTS: Seq = 2_000;
    let hub = hub();
    let terms = " AND (a > 0 OR b = 'y')".repeat(12);
    let (popular, others) = crowd(&hub, 200, 60, &terms);
    let log: Vec<Event> = (1..=EVENTS).map(|seq| small(seq, 7, seq == EVENTS)).collect();
    hub.append(&log, Instant::now()).unwrap();
    let passed_over = hub.metrics.filters_passed_over_total.get();
    assert!(passed_over > 0 && passed_over <= 60, "{passed_over}");
    for tap in &popular {
        assert_eq!(framed(tap), Some((2_000, EVENTS)));
    }
    let Held::Frame(frame) = popular[0].group().held(0) else { panic!("no frame") };
    assert_eq!((frame.count, frame.open), (2_000, false), "one transaction, one frame");
    for tap in &others {
        assert_eq!(read(tap, 0), (800, EVENTS), "those who were passed over look themselves");
    }
}

#[test]
fn the_memory_of_a_call_passes_nobody_over_while_it_can_end() {
    let hub = model::hub_of(64 << 20, FRAME_BYTES, 4 << 20);
    let taps: Vec<Tap> = (0..20).map(|n| hub.join(&format!("group {n}"), &Arc::default(), || table(None))).collect();
    let log: Vec<Event> = (1..=200).map(|seq| small(seq, seq, true)).collect();
    for _ in 0..10 {
        let base = hub.high_water();
        let events: Vec<Event> = log.iter().map(|event| Event { seq: base + event.seq, ..event.clone() }).collect();
        hub.append(&events, Instant::now()).unwrap();
    }
    assert_eq!(hub.metrics.filters_passed_over_total.get(), 0);
    assert!(hub.kept.bytes() <= 4 << 20);
    for tap in &taps {
        assert_eq!(read(tap, 0), (2_000, 2_000));
    }
}

#[test]
fn equal_readers_behind_their_frames_get_what_the_first_of_them_rendered() {
    let hub = hub();
    let (popular, _) = crowd(&hub, 3, 0, "");
    let start = Instant::now();
    let log: Vec<Event> = (1..=2_000).map(|seq| small(seq, seq, true)).collect();
    hub.append(&log, start).unwrap();
    for n in 1..=3 {
        hub.tick(start + FRAME_AGE * n);
    }
    assert!(matches!(popular[0].group().held(0), Held::Behind));
    let all = |tap: &Tap| {
        let (mut passed, mut frames) = (0, Vec::new());
        while let Pull::Frame(frame) = tap.pull(passed) {
            passed = frame.through;
            frames.push(frame);
        }
        assert_eq!(passed, 2_000);
        frames
    };
    // One after the other goes through all of it.
    let first = all(&popular[0]);
    for tap in &popular[1..] {
        for (frame, of_first) in all(tap).iter().zip(&first) {
            assert!(Arc::ptr_eq(frame, of_first), "rendered again through {}", frame.through);
        }
    }
    let alone = hub.join("alone", &Arc::default(), || table(None));
    all(&alone);
    assert!(alone.group().found((hub.edge().generation, 0)).is_none(), "nobody else would take it");
}

#[test]
fn frames_from_before_a_dear_event_stay_and_so_do_those_between_two() {
    let hub = model::hub_of(64 << 20, FRAME_BYTES, 64 << 20);
    let tap = hub.join("dear", &Arc::default(), dear_plans);
    let is_frame =
        |after: Seq, through: Seq| matches!(tap.group().held(after), Held::Frame(frame) if frame.through == through);
    let is_behind = |after: Seq| matches!(tap.group().held(after), Held::Behind);
    hub.append(&[insert(1)], Instant::now()).unwrap();
    hub.append(&[large(2)], Instant::now()).unwrap();
    assert!(is_frame(0, 1) && is_behind(1) && matches!(tap.group().held(2), Held::Nothing));
    hub.append(&[insert(3)], Instant::now()).unwrap();
    assert!(is_frame(0, 1) && is_behind(1) && is_frame(2, 3));
    // One stretch without frames is remembered.
    hub.append(&[large(4)], Instant::now()).unwrap();
    hub.append(&[large(5)], Instant::now()).unwrap();
    assert!(is_behind(0) && is_behind(1) && is_frame(2, 3) && is_behind(3) && is_behind(4));
    hub.append(&[insert(6)], Instant::now()).unwrap();
    assert!(is_frame(2, 3) && is_behind(3) && is_frame(5, 6));
    assert_eq!(read(&tap, 0), (6, 6));
}

/// A subscription by glob whose table takes this long to be found, once plans were forgotten: as if the process had been
/// stopped, or had waited for a processor.
fn paused(hub: &Arc<Hub>, pause: Duration) -> (Tap, Box<Look>) {
    let tap = hub.join("glob", &Arc::default(), || {
        // Dear by its estimate; done in some milliseconds.
        let terms: Vec<String> = (0..8).map(|n| format!("b LIKE '%q{n}%'")).collect();
        let plans = table(Some(&format!("{} OR a = 1", terms.join(" OR "))));
        let resolve = move |name: &str| {
            std::thread::sleep(pause);
            plans.of(&name.into())
        };
        Plans::Globs { resolve: Box::new(resolve), known: parking_lot::Mutex::default() }
    });
    hub.append(&[large(1)], Instant::now()).unwrap();
    let Pull::Dear(look) = tap.pull(0) else { panic!("not dear") };
    tap.group().plans.forget();
    (tap, look)
}

#[tokio::test]
async fn a_pause_of_the_process_is_not_charged_to_a_look() {
    const PAUSE: Duration = Duration::from_millis(1_500);
    let hub = hub();
    let (_tap, mut look) = paused(&hub, PAUSE);
    let never = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let began = Instant::now();
    look.limit(PAUSE / 2);
    let (worked, took) = look.run(never).await;
    assert!(matches!(worked, Worked::Done(_)), "{worked:?}");
    assert!(took < PAUSE / 2 && began.elapsed() > PAUSE, "{took:?} of {:?}", began.elapsed());
}

#[tokio::test]
async fn what_is_too_expensive_for_one_of_a_group_is_not_tried_by_all() {
    let hub = hub();
    let taps: Vec<Tap> = (0..2).map(|_| hub.join("dear", &Arc::default(), dear_plans)).collect();
    hub.append(&[large(1)], Instant::now()).unwrap();
    let never = || Arc::new(std::sync::atomic::AtomicBool::new(false));
    let [first, second] = [0, 1].map(|n| match taps[n].pull(0) {
        Pull::Dear(look) => look,
        other => panic!("not dear: {other:?}"),
    });
    let mut first = first;
    first.limit(Duration::from_millis(1));
    assert!(matches!(first.run(never()).await.0, Worked::TooExpensive));
    let (worked, took) = second.run(never()).await;
    assert!(matches!(worked, Worked::TooExpensive) && took.is_zero(), "{worked:?} after {took:?}");
}
