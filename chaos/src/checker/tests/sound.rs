//! What must pass: histories that are right, though they look odd.

use super::*;

#[test]
fn a_run_without_any_fault() {
    History::small().passes();
}

#[test]
fn a_commit_without_an_answer_that_happened() {
    let mut history = History::small();
    history.written(5, &[insert(3, "d")]);
    history.say(Record::Unknown { w: 0, n: 5, error: "cut".into() });
    history.relay(5, &[insert(3, "d")]);
    history.passes();
}

#[test]
fn a_commit_without_an_answer_that_did_not_happen() {
    let mut history = History::small();
    history.written(5, &[insert(3, "d")]);
    history.say(Record::Unknown { w: 0, n: 5, error: "cut".into() });
    history.passes();
}

#[test]
fn an_event_that_is_delivered_before_its_commit_was_answered() {
    let mut history = History::small();
    history.lines.pop();
    history.written(5, &[insert(3, "d")]);
    history.deliver(1, &[5]);
    history.say(Record::Ok { w: 0, n: 5 });
    history.relay(5, &[insert(3, "d")]);
    history.matched(&[(1, 5)]);
    history.passes();
}

#[test]
fn a_process_that_begins_again_from_an_older_cursor_sees_events_again() {
    let mut history = History::small();
    history.subscribe(2, Some(at(1, 1)), at(1, 1));
    history.deliver(2, &[2, 3]);
    history.deliver(2, &[4]);
    history.stop(2, at(1, 4));
    history.passes();
}

#[test]
fn a_subscription_that_ends_early_owes_nothing_after_its_position() {
    let mut history = History::small();
    history.subscribe(2, None, at(1, 0));
    history.deliver(2, &[1]);
    history.stop(2, at(1, 1));
    history.passes();
}

#[test]
fn a_large_transaction_in_open_batches() {
    let mut history = History::new();
    history.transaction(1, &[insert(1, "a"), insert(2, "b"), insert(3, "c")]);
    history.rolled_back(2, &[insert(9, "never")]);
    history.subscribe(1, None, at(1, 0));
    history.deliver_of(1, 1, 0, &[1], true);
    history.deliver_of(1, 1, 0, &[2], true);
    history.deliver(1, &[3]);
    history.stop(1, at(1, 3));
    history.matched(&[(1, 3)]);
    history.passes();
}

#[test]
fn a_process_that_begins_again_inside_an_open_transaction() {
    let mut history = History::new();
    history.transaction(1, &[insert(1, "a"), insert(2, "b"), insert(3, "c")]);
    history.subscribe(1, None, at(1, 0));
    history.deliver_of(1, 1, 0, &[1], true);
    history.stop(1, at(1, 1));
    history.subscribe(2, Some(at(1, 1)), at(1, 1));
    history.deliver(2, &[2, 3]);
    history.say(Record::CaughtUp { s: 2, cursor: at(1, 3) });
    history.stop(2, at(1, 3));
    history.matched(&[(1, 3)]);
    history.passes();
}

#[test]
fn a_filter_leaves_gaps_where_postgres_does() {
    let mut history = History::small();
    history.lines.retain(|record| !matches!(record, Record::Deliver { .. }));
    history.deliver(1, &[2]);
    history.deliver(1, &[4]);
    history.matched(&[(2, 2), (4, 4)]);
    history.passes();
}

#[test]
fn rows_that_enter_and_leave_as_postgres_says() {
    for said in ["enter", "leave"] {
        let mut history = History::small();
        for record in &mut history.lines {
            if let Record::Deliver { e, .. } = record
                && e[0].0 == 2
            {
                e[1].2 = Some(said.into());
            }
        }
        let run = vec![(3, 3)];
        history.moved = if said == "enter" { (run, Vec::new()) } else { (Vec::new(), run) };
        history.passes();
    }
}

#[test]
fn a_connection_that_is_lost_and_resumes() {
    let mut history = History::small();
    history.say(Record::Disconnected { s: 1, code: Some(1012), status: None, cause: "drain".into() });
    history.say(Record::Disconnected { s: 1, code: None, status: Some(503), cause: "no node".into() });
    history.say(Record::Resumed { s: 1, source: "memory".into(), node: None });
    history.passes();
}

#[test]
fn every_way_to_lose_a_connection_that_the_protocol_knows() {
    let mut history = History::small();
    for code in crate::checker::CLOSE_CODES {
        history.say(Record::Disconnected { s: 1, code: Some(code), status: None, cause: "closed".into() });
    }
    for status in [429, 502, 503, 504] {
        history.say(Record::Disconnected { s: 1, code: None, status: Some(status), cause: "busy".into() });
    }
    // As the client library says it.
    let (code, reason, message) = (1006, "without a goodbye".to_owned(), String::new());
    let cause = tidewire::client::Disconnect::Closed { code, reason, message }.to_string();
    history.say(Record::Disconnected { s: 1, code: Some(code), status: None, cause });
    history.passes();
}

/// The old log had seq 3 and 4 of other transactions; a client saw 3 of them.
fn lost_tail() -> History {
    let mut history = History::new();
    history.transaction(1, &[insert(1, "a")]);
    history.transaction(2, &[insert(2, "b")]);
    history.rolled_back(9, &[insert(9, "never")]);
    history.subscribe(1, None, at(1, 0));
    history.deliver(1, &[1]);
    history.deliver(1, &[2]);
    history.lossy(2);
    history.written(3, &[insert(3, "lost"), insert(4, "too")]);
    history.say(Record::Ok { w: 0, n: 3 });
    history.log.push(row(1, 3, 3, false, &insert(3, "lost")));
    history.log.push(row(1, 4, 3, true, &insert(4, "too")));
    history.matched(&[(1, 3)]);
    history
}

#[test]
fn a_client_in_a_lost_tail_that_is_told() {
    let mut history = lost_tail();
    history.deliver_of(1, 1, 1, &[3, 4], false);
    let position = lost_at(4);
    history.healed();
    history.say(Record::Resync { s: 1, reason: "history_diverged".into(), position, message: String::new() });
    history.transaction(4, &[insert(5, "new")]);
    history.passes();
}

#[test]
fn a_client_that_stood_before_the_lost_tail_goes_on() {
    let mut history = lost_tail();
    history.healed();
    history.transaction(4, &[insert(5, "new")]);
    history.deliver_of(1, 2, 0, &[3], false);
    history.stop(1, at(2, 3));
    history.passes();
}

#[test]
fn a_position_of_what_came_after_the_log_was_read() {
    let mut history = History::small();
    history.lines.pop();
    // The lines of the log come before those of clients that are still there.
    history.lines.extend(std::mem::take(&mut history.log).into_iter().map(Record::Log));
    history.say(Record::Progress { s: 1, cursor: at(1, 5) });
    history.stop(1, at(1, 5));
    history.passes();
}

#[test]
fn a_lost_transaction_whose_number_comes_again() {
    let mut history = lost_tail();
    history.healed();
    history.say(Record::Begin { w: 1, n: 1 });
    history.say(Record::Commit { w: 1, n: 1, xid: 3, ops: vec![insert(5, "new")] });
    history.say(Record::Ok { w: 1, n: 1 });
    history.relay(3, &[insert(5, "new")]);
    history.passes();
}

/// Relayed in parts; the database went away between two of them.
#[test]
fn a_lost_tail_that_ends_inside_a_transaction() {
    let mut history = History::small();
    history.lossy(4);
    let ops = [insert(3, "lost"), insert(4, "too")];
    history.written(5, &ops);
    history.say(Record::Ok { w: 0, n: 5 });
    history.log.push(row(1, 5, 5, false, &ops[0]));
    history.healed();
    history.passes();
}
