//! Moments of one connection that have a name.

use super::*;

fn open(now: Instant) -> Machine {
    let mut machine = Machine::new(now, TIMING, LIMITS);
    machine.welcome(welcome());
    let _ = machine.poll();
    machine
}

fn outputs(machine: &mut Machine) -> Vec<Output> {
    std::iter::from_fn(|| machine.poll()).collect()
}

#[test]
fn a_burst_is_taken_then_reading_pauses_and_insistence_closes() {
    let start = Instant::now();
    let mut machine = open(start);
    for _ in 0..50 {
        assert_eq!(machine.paused_until(start), None);
        machine.message(start, r#"{"type":"ping"}"#);
    }
    let resume = machine.paused_until(start).expect("the burst is spent");
    assert!(resume > start && resume <= start + Duration::from_millis(101));
    assert_eq!(machine.paused_until(resume + Duration::from_millis(1)), None);

    // A client that sends whenever it is read stays above the rate; after ten seconds of that it is closed.
    let mut now = start;
    while !machine.is_closed() && now < start + Duration::from_secs(60) {
        now = machine.paused_until(now).unwrap_or(now);
        machine.message(now, r#"{"type":"ping"}"#);
    }
    assert!(machine.is_closed() && now >= start + Duration::from_secs(9), "{:?}", now - start);
    assert_eq!(outputs(&mut machine).last(), Some(&Output::Close(CloseCode::RateLimited)));

    // One that keeps to the rate is never closed.
    let mut machine = open(start);
    for index in 0..1_000 {
        machine.message(start + Duration::from_millis(100) * index, r#"{"type":"ping"}"#);
    }
    assert!(!machine.is_closed());
}

#[test]
fn an_id_can_be_used_again_and_the_answer_to_its_old_wish_is_not_taken_for_the_new_one() {
    let now = Instant::now();
    let mut machine = open(now);
    let subscribe = r#"{"type":"subscribe","id":"s","tables":["t"]}"#;
    machine.message(now, subscribe);
    machine.message(now, r#"{"type":"unsubscribe","id":"s"}"#);
    machine.message(now, subscribe);
    assert_eq!(machine.started(now, 1, at(5), None, Source::Live), None);
    assert_eq!(machine.started(now, 2, at(7), None, Source::Live).as_deref(), Some("s"));
    assert_eq!(machine.position("s"), Some(at(7)));
    machine.not_started(1, refusal());
    assert_eq!(machine.position("s"), Some(at(7)));
}

#[test]
fn synced_waits_for_every_subscription_that_runs_or_starts() {
    let now = Instant::now();
    let mut machine = open(now);
    for id in ["a", "b"] {
        machine.message(now, &json!({"type": "subscribe", "id": id, "tables": ["t"]}).to_string());
    }
    machine.started(now, 1, at(1), None, Source::Live);
    machine.message(now, r#"{"type":"sync","tx":"50"}"#);
    let _ = outputs(&mut machine);
    // Wishes and syncs are numbered together: this is the third.
    machine.sync_found(3, at(4));
    machine.events(now, "a", at(4), false);
    machine.settle_syncs();
    assert_eq!(outputs(&mut machine), [], "b is still starting");
    machine.started(now, 2, at(2), None, Source::Live);
    machine.settle_syncs();
    assert!(outputs(&mut machine).iter().all(|output| !matches!(output, Output::Send(ServerMessage::Synced { .. }))));
    machine.passed("b", 4);
    machine.settle_syncs();
    let synced = ServerMessage::Synced { tx: "50".to_owned(), cursor: at(4) };
    assert_eq!(outputs(&mut machine), [Output::Send(synced)]);
}

/// A live subscription that has caught up at 10 while the log stands there.
fn caught_up_at_ten() -> (Machine, Instant) {
    let now = Instant::now();
    let mut machine = open(now);
    machine.message(now, r#"{"type":"subscribe","id":"a","tables":["t"]}"#);
    let Some(Output::Start { serial, .. }) = machine.poll() else { panic!("no wish") };
    machine.started(now, serial, at(10), None, Source::Live);
    machine.reached(now, "a", at(10));
    while machine.poll().is_some() {}
    (machine, now)
}

/// Once, progress said the node's own end, and who was still reading the log lost what lay between.
#[test]
fn progress_never_overtakes_what_was_delivered() {
    let (mut machine, now) = caught_up_at_ten();
    machine.passed("a", 15);
    let later = now + TIMING.progress;
    machine.progress(later, true);
    assert_eq!(machine.poll(), Some(Output::Send(ServerMessage::Progress { ids: vec!["a".into()], cursor: at(10) })));
    machine.reached(later, "a", at(20));
    machine.progress(later + TIMING.progress, true);
    assert_eq!(machine.poll(), Some(Output::Send(ServerMessage::Progress { ids: vec!["a".into()], cursor: at(20) })));
}

/// Once, a position inside a transaction made progress due for ever, and the node turned on the spot.
#[test]
fn an_open_transaction_is_no_reason_to_turn_for_ever() {
    let (mut machine, now) = caught_up_at_ten();
    assert_eq!(machine.events(now, "a", at(12), true), Some(at(10)));
    let later = now + TIMING.progress;
    assert!(machine.progress_due(later));
    machine.tick(later);
    machine.progress(later, true);
    assert_eq!(machine.poll(), None, "nothing is said inside a transaction");
    assert!(!machine.progress_due(later) && machine.deadline() > later);
}

/// A rewound log: what was passed over in silence is not promised any more.
#[test]
fn after_a_rewind_progress_repeats_the_position() {
    let (mut machine, now) = caught_up_at_ten();
    machine.reached(now, "a", at(30));
    machine.rewound("a");
    machine.progress(now + TIMING.progress, true);
    assert_eq!(machine.poll(), Some(Output::Send(ServerMessage::Progress { ids: vec!["a".into()], cursor: at(10) })));
}

#[test]
fn a_sync_that_was_given_up_takes_no_later_one_of_its_transaction_along() {
    let (mut machine, now) = caught_up_at_ten();
    let mut ask = |now| {
        machine.message(now, r#"{"type":"sync","tx":"7","timeout_ms":200}"#);
        match machine.poll() {
            Some(Output::Sync { serial, .. }) => serial,
            other => panic!("{other:?}"),
        }
    };
    let later = now + Duration::from_millis(200);
    let (first, second) = (ask(now), ask(later));
    machine.tick(later);
    assert!(matches!(machine.poll(), Some(Output::Send(ServerMessage::Error { .. }))));
    machine.sync_failed(first, unavailable("not over"));
    assert_eq!(machine.poll(), None);
    machine.sync_found(second, at(10));
    assert!(matches!(machine.poll(), Some(Output::Send(ServerMessage::Synced { .. }))));
}
