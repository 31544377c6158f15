//! What `caught_up` stands for, and that whoever is connected gets on.

use super::*;

fn caught_up(history: &mut History, cursor: Cursor) {
    history.say(Record::CaughtUp { s: 2, cursor });
}

/// A right history, and long after it a second subscription, from the log's beginning.
fn late_comer() -> History {
    let mut history = History::small();
    history.minute();
    history.subscribe(2, Some(at(1, 0)), at(1, 0));
    history
}

#[test]
fn once_after_everything_that_was_there() {
    let mut history = late_comer();
    history.deliver(2, &[1, 2, 3, 4]);
    caught_up(&mut history, at(1, 4));
    history.say(Record::Disconnected { s: 2, code: None, status: None, cause: "cut".into() });
    history.say(Record::Resumed { s: 2, source: "live".into(), node: None });
    caught_up(&mut history, at(1, 4));
    history.stop(2, at(1, 4));
    history.passes();
}

#[test]
fn twice_on_one_connection() {
    let mut history = late_comer();
    history.deliver(2, &[1, 2, 3, 4]);
    caught_up(&mut history, at(1, 4));
    caught_up(&mut history, at(1, 4));
    history.stop(2, at(1, 4));
    history.breaks("caught_up");
}

#[test]
fn before_what_was_there() {
    let mut history = late_comer();
    history.deliver(2, &[1]);
    caught_up(&mut history, at(1, 1));
    history.deliver(2, &[2, 3, 4]);
    history.stop(2, at(1, 4));
    history.breaks("caught_up");
}

#[test]
fn a_node_that_is_cut_off_by_a_fault_may_know_less() {
    let mut history = late_comer();
    history.deliver(2, &[1]);
    history.lossy(4);
    history.epochs.pop();
    history.terms.pop();
    caught_up(&mut history, at(1, 1));
    history.healed();
    history.deliver(2, &[2, 3, 4]);
    history.stop(2, at(1, 4));
    history.passes();
}

#[test]
fn a_subscription_that_gets_nothing_any_more() {
    let mut history = late_comer();
    history.deliver(2, &[1]);
    history.minute();
    history.stop(2, at(1, 1));
    history.breaks("stands_still");
}
