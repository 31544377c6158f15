//! What comes late, what is not counted, and what proves nothing.

use super::*;

fn lost(history: &mut History, s: u32) {
    history.say(Record::Disconnected { s, code: None, status: None, cause: "cut".into() });
}

fn ask(history: &mut History, s: u32, client: u32) {
    history.say(Record::Subscribe { s, client, want: everything(), from: None });
}

/// A right history whose client is still there.
fn unfinished() -> History {
    let mut history = History::small();
    history.lines.pop();
    history
}

/// Reads the log while clients are there, then ends them.
fn ended(mut history: History, s: u32, position: Cursor) -> History {
    history.lines.extend(std::mem::take(&mut history.log).into_iter().map(Record::Log));
    history.stop(s, position);
    history
}

#[test]
fn a_subscription_that_is_never_answered() {
    let mut history = unfinished();
    ask(&mut history, 2, 2);
    history.minute();
    ended(history, 1, at(1, 4)).comes_late("back");
}

#[test]
fn a_subscription_that_is_answered_when_it_is_asked_for_again() {
    let mut history = unfinished();
    ask(&mut history, 2, 2);
    ask(&mut history, 3, 2);
    history.say(Record::Subscribed { s: 3, cursor: at(1, 4), source: "live".into(), node: None });
    history.minute();
    ended(history, 1, at(1, 4)).comes_in_time();
}

#[test]
fn a_subscription_that_is_asked_for_shortly_before_the_end() {
    let mut history = unfinished();
    history.minute();
    ask(&mut history, 2, 2);
    ended(history, 1, at(1, 4)).comes_in_time();
}

#[test]
fn a_client_that_never_comes_back() {
    let mut history = unfinished();
    lost(&mut history, 1);
    history.minute();
    lost(&mut history, 1);
    ended(history, 1, at(1, 4)).comes_late("back");
}

#[test]
fn a_client_that_is_cut_off_by_a_fault_that_was_healed_just_now() {
    let mut history = unfinished();
    history.lossy(4);
    history.epochs.pop();
    history.terms.pop();
    lost(&mut history, 1);
    history.minute();
    history.healed();
    ended(history, 1, at(1, 4)).comes_in_time();
}

#[test]
fn a_client_that_comes_back() {
    let mut history = unfinished();
    lost(&mut history, 1);
    history.say(Record::Resumed { s: 1, source: "memory".into(), node: None });
    history.minute();
    ended(history, 1, at(1, 4)).comes_in_time();
}

#[test]
fn a_process_that_ends_and_no_other_begins() {
    let mut history = History::small();
    history.subscribe(2, Some(at(1, 4)), at(1, 4));
    history.minute();
    ended(history, 2, at(1, 4)).comes_late("back");
}

#[test]
fn a_client_that_never_gets_as_far_as_a_subscription() {
    let mut history = unfinished();
    history.plan = serde_json::json!({ "workload": { "clients": 2 } });
    history.minute();
    ended(history.clone(), 1, at(1, 4)).comes_late("back");
    history.plan = serde_json::json!({ "workload": { "clients": 1 } });
    ended(history, 1, at(1, 4)).comes_in_time();
}

#[test]
fn a_fault_without_an_end_is_not_counted_and_the_run_says_so() {
    let mut history = History::small();
    history.lossy(4);
    let whole = {
        let mut history = history.clone();
        history.healed();
        history.check()
    };
    assert_eq!(whole.counts.faults.get("F11"), Some(&1));
    assert!(whole.vacuous.iter().all(|why| !why.contains("cut short")), "{whole:?}");
    history.say(Record::FaultOff { f: 7 });
    let verdict = history.check();
    assert!(verdict.counts.faults.is_empty(), "{verdict:?}");
    assert!(verdict.vacuous.iter().any(|why| why.contains("F11") && why.contains("cut short")), "{verdict:?}");
}

/// A fault over which nothing was lost; the client is still there.
fn survived(change: impl FnOnce(&mut FaultDone)) -> History {
    let mut history = unfinished();
    history.lossy(4);
    history.epochs.pop();
    history.terms.pop();
    history.healed_with(change);
    history.stop(1, at(1, 4));
    history
}

#[test]
fn a_fault_after_which_nothing_moves() {
    survived(|_| {}).comes_in_time();
    survived(|done| done.progressed = false).comes_late("progress");
    // It proves nothing, but nothing is late either.
    survived(|done| (done.took, done.progressed) = (false, false)).comes_in_time();
}

#[test]
fn clients_that_catch_up_late() {
    survived(|done| done.caught_up = Some(30_000_000)).comes_in_time();
    survived(|done| done.caught_up = Some(30_000_001)).comes_late("caught_up");
}

#[test]
fn a_client_that_ends_behind_the_log() {
    let mut history = History::small();
    history.subscribe(2, None, at(1, 0));
    history.deliver(2, &[1]);
    history.stop(2, at(1, 1));
    history.comes_late("drain");
}

#[test]
fn rows_that_are_left_in_the_outbox() {
    let mut history = History::small();
    history.outbox = 1;
    history.comes_late("drain");
}

#[test]
fn a_client_that_hears_nothing_while_nothing_is_wrong() {
    let mut history = unfinished();
    history.minute();
    history.say(Record::Progress { s: 1, cursor: at(1, 4) });
    let quiet = ended(history.clone(), 1, at(1, 4));
    quiet.comes_late("bookmark");
    // Nobody promises it to one that has no connection.
    history.lines.insert(history.lines.len() - 2, Record::Resumed { s: 1, source: "memory".into(), node: None });
    let before = history.lines.iter().rposition(|record| matches!(record, Record::Deliver { .. })).unwrap();
    history
        .lines
        .insert(before + 1, Record::Disconnected { s: 1, code: Some(1012), status: None, cause: "drain".into() });
    ended(history, 1, at(1, 4)).comes_in_time();
}

#[test]
fn of_each_rule_twenty_violations_are_kept_and_all_are_counted() {
    let mut history = History::small();
    for n in 0..25 {
        history.say(Record::Disconnected { s: 1, code: Some(4999), status: None, cause: n.to_string() });
    }
    history.say(Record::Resumed { s: 1, source: "memory".into(), node: None });
    history.say(Record::Refused { s: 1, code: Some(4401), error: "unauthenticated".into() });
    let verdict = history.check();
    let kept = |rule: &str| verdict.violations.iter().filter(|violation| violation.rule == rule).count();
    assert_eq!((kept("codes"), kept("refused")), (20, 1));
    assert_eq!((verdict.counts.violations["codes"], verdict.counts.violations["refused"]), (25, 1));
}

#[test]
fn of_each_rule_twenty_late_promises_are_kept() {
    let mut history = History::small();
    for s in 2..30 {
        history.subscribe(s, None, at(1, 0));
        history.deliver(s, &[1]);
        history.stop(s, at(1, 1));
    }
    assert_eq!(history.check().late.len(), 20);
}

#[test]
fn every_reason_why_a_run_proves_less_is_said() {
    let verdict = survived(|done| done.took = false).check();
    let says = |verdict: &Verdict, what: &str| verdict.vacuous.iter().any(|why| why.contains(what));
    assert!(says(&verdict, "F11 never took effect") && says(&verdict, "deliveries"), "{verdict:?}");
    for what in ["the log was not read", "several rows", "rolled back", "nobody asked Postgres"] {
        assert!(!says(&verdict, what), "{what}: {verdict:?}");
    }
    let mut history = History::new();
    history.transaction(1, &[insert(1, "a")]);
    history.subscribe(1, None, at(1, 0));
    let verdict = history.check();
    for what in ["several rows", "rolled back", "nobody asked Postgres"] {
        assert!(says(&verdict, what), "{what}: {verdict:?}");
    }
}
