//! What must fail: positions inside transactions, and cursors that are not the log's.

use super::*;

/// One transaction of three rows, and a client that has two of them.
fn half_delivered(open: bool) -> History {
    let mut history = History::new();
    history.transaction(1, &[insert(1, "a"), insert(2, "b"), insert(3, "c")]);
    history.subscribe(1, None, at(1, 0));
    history.deliver_of(1, 1, 0, &[1, 2], open);
    history.matched(&[(1, 3)]);
    history
}

#[test]
fn a_progress_inside_a_transaction() {
    let mut history = half_delivered(true);
    history.say(Record::Progress { s: 1, cursor: at(1, 2) });
    history.deliver(1, &[3]);
    history.stop(1, at(1, 3));
    history.breaks("atomic");
}

#[test]
fn a_caught_up_inside_a_transaction_none_of_which_was_delivered() {
    let mut history = half_delivered(true);
    history.deliver(1, &[3]);
    history.stop(1, at(1, 3));
    let none = Want { tables: vec!["event:*".into()], filter: None, ops: None };
    history.say(Record::Subscribe { s: 2, client: 2, want: none.clone(), from: None });
    history.say(Record::Subscribed { s: 2, cursor: at(1, 0), source: "live".into(), node: None });
    history.say(Record::CaughtUp { s: 2, cursor: at(1, 2) });
    history.stop(2, at(1, 2));
    history.matches.push((none, Vec::new()));
    history.breaks("atomic");
}

#[test]
fn a_progress_inside_a_transaction_of_a_tail_that_was_lost() {
    let mut history = History::small();
    history.lines.pop();
    history.lossy(4);
    let ops = [insert(3, "lost"), insert(4, "too")];
    history.written(5, &ops);
    history.say(Record::Ok { w: 0, n: 5 });
    history.log.push(row(1, 5, 5, false, &ops[0]));
    history.log.push(row(1, 6, 5, true, &ops[1]));
    history.deliver_of(1, 1, 1, &[5], true);
    history.say(Record::Progress { s: 1, cursor: lost_at(5) });
    history.healed();
    let position = lost_at(5);
    history.say(Record::Resync { s: 1, reason: "history_diverged".into(), position, message: String::new() });
    history.breaks("atomic");
}

#[test]
fn a_cursor_that_was_saved_inside_a_transaction_that_was_called_whole() {
    let mut history = half_delivered(false);
    history.stop(1, at(1, 2));
    history.subscribe(2, Some(at(1, 2)), at(1, 2));
    history.deliver(2, &[3]);
    history.stop(2, at(1, 3));
    history.breaks("atomic");
}

/// A second subscription of an otherwise right history, which is given this position after everything.
fn told(cursor: Cursor) -> History {
    let mut history = History::small();
    history.subscribe(2, Some(at(1, 4)), at(1, 4));
    history.say(Record::Progress { s: 2, cursor });
    history
}

#[test]
fn a_cursor_of_an_epoch_that_the_log_never_had() {
    told(cursor(7, 0, 4)).breaks("cursor");
}

#[test]
fn a_cursor_beyond_the_end_of_the_log() {
    told(at(1, 5)).breaks("cursor");
}

#[test]
fn a_cursor_whose_check_is_of_another_event() {
    told(Cursor { check: 9, ..at(1, 4) }).breaks("cursor");
    let mut history = History::small();
    history.subscribe(2, None, Cursor { check: 9, ..at(1, 0) });
    history.breaks("cursor");
}

/// It holds the epoch in which its event was numbered, not that of whoever tells it.
#[test]
fn a_cursor_with_a_later_epoch_than_its_event() {
    let mut history = told(cursor(2, 0, 4));
    history.lossy(4);
    history.healed();
    history.breaks("cursor");
}

#[test]
fn a_cursor_of_a_lost_tail_with_the_check_of_another_event() {
    let mut history = History::small();
    history.lines.pop();
    history.lossy(4);
    history.written(5, &[insert(3, "lost")]);
    history.say(Record::Ok { w: 0, n: 5 });
    history.log.push(row(1, 5, 5, true, &insert(3, "lost")));
    history.say(Record::Progress { s: 1, cursor: at(1, 5) });
    history.healed();
    let position = lost_at(5);
    history.say(Record::Resync { s: 1, reason: "history_diverged".into(), position, message: String::new() });
    history.breaks("cursor");
}
