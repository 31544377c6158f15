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
    ended(history, 1, at(1, 4)).is_late("back");
}

#[test]
fn a_subscription_that_is_answered_when_it_is_asked_for_again() {
    let mut history = unfinished();
    ask(&mut history, 2, 2);
    ask(&mut history, 3, 2);
    history.say(Record::Subscribed { s: 3, cursor: at(1, 4), source: "live".into(), node: None });
    history.minute();
    ended(history, 1, at(1, 4)).is_in_time();
}

#[test]
fn a_subscription_that_is_asked_for_shortly_before_the_end() {
    let mut history = unfinished();
    history.minute();
    ask(&mut history, 2, 2);
    ended(history, 1, at(1, 4)).is_in_time();
}

#[test]
fn a_client_that_never_comes_back() {
    let mut history = unfinished();
    lost(&mut history, 1);
    history.minute();
    lost(&mut history, 1);
    ended(history, 1, at(1, 4)).is_late("back");
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
    ended(history, 1, at(1, 4)).is_in_time();
}

#[test]
fn a_client_that_comes_back() {
    let mut history = unfinished();
    lost(&mut history, 1);
    history.say(Record::Resumed { s: 1, source: "memory".into(), node: None });
    history.minute();
    ended(history, 1, at(1, 4)).is_in_time();
}

#[test]
fn a_process_that_ends_and_no_other_begins() {
    let mut history = History::small();
    history.subscribe(2, Some(at(1, 4)), at(1, 4));
    history.minute();
    ended(history, 2, at(1, 4)).is_late("back");
}

#[test]
fn a_client_that_never_gets_as_far_as_a_subscription() {
    let mut history = unfinished();
    history.plan = serde_json::json!({ "workload": { "clients": 2 } });
    history.minute();
    ended(history.clone(), 1, at(1, 4)).is_late("back");
    history.plan = serde_json::json!({ "workload": { "clients": 1 } });
    ended(history, 1, at(1, 4)).is_in_time();
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
