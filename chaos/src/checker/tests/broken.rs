//! What must fail.

use super::*;

fn nth_delivery(history: &mut History, n: usize) -> &mut Vec<Delivered> {
    let mut all = history.lines.iter_mut().filter_map(|record| match record {
        Record::Deliver { e, .. } => Some(e),
        _ => None,
    });
    all.nth(n).unwrap()
}

#[test]
fn an_acknowledged_transaction_that_the_log_lacks() {
    let mut history = History::small();
    history.written(5, &[insert(3, "d")]);
    history.say(Record::Ok { w: 0, n: 5 });
    history.breaks("lost");
}

#[test]
fn a_transaction_half_of_which_is_lost() {
    let mut history = History::small();
    history.written(5, &[insert(3, "d"), insert(4, "e")]);
    history.say(Record::Ok { w: 0, n: 5 });
    history.relay(5, &[insert(3, "d")]);
    history.breaks("lost");
}

#[test]
fn changes_of_one_transaction_in_another_order() {
    let mut history = History::small();
    let ops = [insert(3, "d"), insert(4, "e")];
    history.written(5, &ops);
    history.say(Record::Ok { w: 0, n: 5 });
    let [first, second] = ops;
    history.relay(5, &[second, first]);
    history.breaks("order");
}

#[test]
fn a_change_that_stands_in_the_place_of_another() {
    let mut history = History::small();
    let (first, second) = (event(1, "d"), event(2, "e"));
    history.written(5, &[first.clone(), second]);
    history.say(Record::Ok { w: 0, n: 5 });
    history.relay(5, &[first.clone(), first]);
    let verdict = history.check();
    let rules: Vec<&str> = verdict.violations.iter().map(|violation| violation.rule).collect();
    assert_eq!(rules, ["repeated", "lost"], "{:#?}", verdict.violations);
}

#[test]
fn a_lost_tail_with_the_end_of_a_transaction_and_without_its_beginning() {
    let mut history = History::small();
    history.lossy(4);
    let ops = [insert(3, "lost"), insert(4, "too")];
    history.written(5, &ops);
    history.say(Record::Ok { w: 0, n: 5 });
    let [first, second] = ops;
    history.log.push(row(1, 5, 5, false, &second));
    history.log.push(row(1, 6, 5, true, &first));
    history.healed();
    history.breaks("atomic");
}

#[test]
fn an_event_of_a_transaction_that_was_rolled_back() {
    let mut history = History::small();
    history.relay(3, &[insert(9, "never")]);
    history.breaks("invented");
}

#[test]
fn an_event_that_nobody_wrote() {
    let mut history = History::small();
    history.relay(77, &[insert(9, "from nowhere")]);
    history.breaks("invented");
}

#[test]
fn a_transaction_that_stands_twice_in_the_log() {
    let mut history = History::new();
    history.transaction(1, &[insert(1, "a")]);
    history.transaction(2, &[delete(1, "a")]);
    history.transaction(3, &[insert(1, "b")]);
    history.relay(2, &[delete(1, "b")]);
    history.log[3].val = Some("a".into());
    let verdict = history.check();
    assert!(verdict.violations.iter().any(|violation| violation.rule == "repeated"), "{verdict:#?}");
}

#[test]
fn a_log_with_a_gap() {
    let mut history = History::small();
    history.lines.retain(|record| !matches!(record, Record::Deliver { .. } | Record::Stop { .. }));
    history.log[3].seq = 5;
    history.breaks("dense");
}

#[test]
fn a_value_that_changed_on_its_way_into_the_log() {
    let mut history = History::small();
    history.log[2].before = Some("another".into());
    let verdict = history.check();
    assert!(verdict.violations.iter().any(|violation| violation.rule == "changed"), "{verdict:#?}");
}

#[test]
fn a_log_whose_rows_are_in_another_order_than_the_changes() {
    let mut history = History::new();
    history.written(1, &[insert(1, "a")]);
    history.say(Record::Ok { w: 0, n: 1 });
    history.transaction(2, &[update(1, "b", "a")]);
    history.relay(1, &[insert(1, "a")]);
    history.rows.insert(1, "b".into());
    let verdict = history.check();
    assert!(verdict.violations.iter().any(|violation| violation.rule == "order"), "{verdict:#?}");
}

#[test]
fn transactions_that_interleave() {
    let mut history = History::new();
    history.written(1, &[insert(1, "a"), insert(2, "b")]);
    history.say(Record::Ok { w: 0, n: 1 });
    history.relay(1, &[insert(1, "a")]);
    history.transaction(2, &[insert(3, "c")]);
    history.relay(1, &[insert(2, "b")]);
    history.breaks("atomic");
}

#[test]
fn an_end_of_a_transaction_that_is_not_marked() {
    let mut history = History::small();
    history.log[0].tx_end = false;
    history.breaks("atomic");
}

#[test]
fn a_table_that_is_not_what_the_log_says() {
    let mut history = History::small();
    history.rows.insert(1, "something else".into());
    history.breaks("table");
}

#[test]
fn an_event_that_a_client_never_saw() {
    let mut history = History::small();
    nth_delivery(&mut history, 1).remove(0);
    history.breaks("missed");
}

#[test]
fn a_hole_at_a_resume() {
    let mut history = History::small();
    history.subscribe(2, Some(at(1, 1)), at(1, 1));
    history.deliver(2, &[4]);
    history.stop(2, at(1, 4));
    history.breaks("missed");
}

#[test]
fn a_client_that_is_told_a_position_before_its_events() {
    let mut history = History::small();
    history.subscribe(2, None, at(1, 0));
    history.say(Record::Progress { s: 2, cursor: at(1, 4) });
    history.stop(2, at(1, 4));
    history.breaks("missed");
}

#[test]
fn an_event_after_a_position_that_covers_it() {
    let mut history = History::small();
    history.subscribe(2, None, at(1, 0));
    history.say(Record::Progress { s: 2, cursor: at(1, 1) });
    history.deliver(2, &[1]);
    history.deliver(2, &[2, 3]);
    history.stop(2, at(1, 3));
    history.breaks("bookmark");
}

#[test]
fn an_event_seen_twice_across_a_resume() {
    let mut history = History::small();
    let again = history.lines.iter().position(|record| matches!(record, Record::Stop { .. })).unwrap();
    history.lines.truncate(again);
    history.say(Record::Resumed { s: 1, source: "memory".into(), node: None });
    history.deliver(1, &[4]);
    let verdict = history.check();
    assert!(verdict.violations.iter().any(|violation| violation.rule == "unique"), "{verdict:#?}");
}

#[test]
fn events_in_another_order() {
    let mut history = History::small();
    nth_delivery(&mut history, 1).swap(0, 1);
    let verdict = history.check();
    assert!(verdict.violations.iter().any(|violation| violation.rule == "ordered"), "{verdict:#?}");
}

#[test]
fn another_event_under_the_same_number() {
    let mut history = History::small();
    nth_delivery(&mut history, 0)[0].1 = 99;
    history.breaks("same_log");
}

#[test]
fn an_event_that_no_log_has() {
    let mut history = History::small();
    history.lines.pop();
    history.deliver(1, &[5]);
    let verdict = history.check();
    let rules: Vec<&str> = verdict.violations.iter().map(|violation| violation.rule).collect();
    assert_eq!(rules, ["durable", "cursor"], "{:#?}", verdict.violations);
}

#[test]
fn an_event_that_is_delivered_before_its_commit_was_sent() {
    let mut history = History::small();
    history.lines.pop();
    history.say(Record::Begin { w: 0, n: 5 });
    history.deliver(1, &[5]);
    history.say(Record::Commit { w: 0, n: 5, xid: 5, ops: vec![insert(3, "d")] });
    history.say(Record::Ok { w: 0, n: 5 });
    history.relay(5, &[insert(3, "d")]);
    history.matched(&[(1, 5)]);
    history.breaks("durable");
}

#[test]
fn an_event_that_the_filter_does_not_let_through() {
    let mut history = History::small();
    history.matched(&[(1, 2), (4, 4)]);
    history.breaks("filter");
}

#[test]
fn a_row_that_leaves_or_enters_and_nobody_says_so() {
    for moved in [(vec![(3, 3)], Vec::new()), (Vec::new(), vec![(3, 3)])] {
        let mut history = History::small();
        history.moved = moved;
        history.breaks("transition");
    }
}

#[test]
fn a_row_that_is_said_to_move_and_does_not_or_the_other_way() {
    for said in ["enter", "leave", "unknown"] {
        let mut history = History::small();
        nth_delivery(&mut history, 1)[1].2 = Some(said.into());
        history.clone().breaks("transition");
        // Enter for leave, leave for enter.
        let run = vec![(3, 3)];
        history.moved = if said == "enter" { (Vec::new(), run) } else { (run, Vec::new()) };
        history.breaks("transition");
    }
}

#[test]
fn a_batch_that_ends_inside_a_transaction_as_if_it_were_whole() {
    let mut history = History::small();
    let whole = nth_delivery(&mut history, 1);
    let second = whole.pop().unwrap();
    let at_third = history.lines.iter().position(|record| matches!(record, Record::Deliver { e, .. } if e[0].0 == 4));
    let record = Record::Deliver { s: 1, e: vec![second], cursor: at(1, 3), open: false };
    history.lines.insert(at_third.unwrap(), record);
    for record in &mut history.lines {
        if let Record::Deliver { e, cursor, .. } = record {
            *cursor = at(1, e[0].0);
        }
    }
    history.breaks("atomic");
}

#[test]
fn a_subscription_that_begins_inside_a_transaction() {
    let mut history = History::small();
    history.subscribe(2, None, at(1, 2));
    history.deliver(2, &[3, 4]);
    history.stop(2, at(1, 4));
    history.breaks("atomic");
}

#[test]
fn a_resume_that_begins_elsewhere() {
    let mut history = History::small();
    history.subscribe(2, Some(at(1, 1)), at(1, 3));
    history.deliver(2, &[4]);
    history.stop(2, at(1, 4));
    history.breaks("resumable");
}

#[test]
fn a_client_in_a_lost_tail_that_goes_on_in_silence() {
    let mut history = History::new();
    history.transaction(1, &[insert(1, "a")]);
    history.rolled_back(9, &[insert(9, "never")]);
    history.subscribe(1, None, at(1, 0));
    history.deliver(1, &[1]);
    history.lossy(1);
    history.written(2, &[insert(2, "lost")]);
    history.say(Record::Ok { w: 0, n: 2 });
    history.log.push(row(1, 2, 2, true, &insert(2, "lost")));
    history.deliver_of(1, 1, 1, &[2], false);
    history.healed();
    history.transaction(3, &[insert(3, "new")]);
    history.transaction(4, &[insert(4, "newer")]);
    history.deliver_of(1, 2, 0, &[3], false);
    history.stop(1, at(2, 3));
    history.matched(&[(1, 3)]);
    let verdict = history.check();
    assert!(verdict.violations.iter().any(|violation| violation.rule == "honest"), "{verdict:#?}");
}

#[test]
fn a_client_that_ends_in_a_lost_tail_and_was_never_told() {
    let mut history = History::new();
    history.transaction(1, &[insert(1, "a")]);
    history.rolled_back(9, &[insert(9, "never")]);
    history.subscribe(1, None, at(1, 0));
    history.deliver(1, &[1]);
    history.lossy(1);
    history.written(2, &[insert(2, "lost")]);
    history.say(Record::Ok { w: 0, n: 2 });
    history.log.push(row(1, 2, 2, true, &insert(2, "lost")));
    history.deliver_of(1, 1, 1, &[2], false);
    history.healed();
    history.stop(1, at(1, 2));
    history.matched(&[(1, 1)]);
    history.breaks("honest");
}

#[test]
fn a_failover_that_never_came_about_excuses_no_loss() {
    let mut history = History::small();
    history.lossy(4);
    history.epochs.pop();
    history.terms.pop();
    history.written(5, &[insert(3, "d")]);
    history.say(Record::Ok { w: 0, n: 5 });
    history.healed();
    history.breaks("lost");
}

#[test]
fn a_position_before_the_event_that_it_comes_with() {
    let mut history = History::small();
    for record in &mut history.lines {
        if let Record::Deliver { e, cursor, .. } = record
            && e[0].0 == 2
        {
            *cursor = at(1, 2);
        }
    }
    history.breaks("bookmark");
}

#[test]
fn a_resync_without_need() {
    for reason in ["history_diverged", "cursor_expired"] {
        let mut history = History::small();
        let position = at(1, 4);
        history.lines.pop();
        history.say(Record::Resync { s: 1, reason: reason.into(), position, message: String::new() });
        history.breaks("honest");
    }
}

#[test]
fn terms_that_go_back() {
    let mut history = History::small();
    history.terms = vec![(2, 1, 10), (1, 1, 20)];
    history.breaks("one_leader");
}

#[test]
fn a_close_code_that_no_document_knows() {
    // 1005, 1006 and 1015 must never be sent (RFC 6455, 7.4.1).
    for code in [4999, 1005, 1006, 1015] {
        let mut history = History::small();
        let cause = format!("closed by the server: {code} so it says");
        history.say(Record::Disconnected { s: 1, code: Some(code), status: None, cause });
        history.breaks("codes");
    }
}

#[test]
fn a_status_that_no_document_knows() {
    for status in [200, 400, 500, 501] {
        let mut history = History::small();
        let cause = format!("HTTP {status} instead of a WebSocket");
        history.say(Record::Disconnected { s: 1, code: None, status: Some(status), cause });
        history.breaks("codes");
    }
}

#[test]
fn a_gap_that_the_client_library_found() {
    let mut history = History::small();
    let cause = "a frame of `x` follows on 3, but the position is 2".to_owned();
    history.say(Record::Disconnected { s: 1, code: None, status: None, cause });
    history.breaks("resumable");
}

#[test]
fn a_client_that_is_refused_for_good() {
    let mut history = History::small();
    history.say(Record::Refused { s: 1, code: Some(4401), error: "unauthenticated".into() });
    history.breaks("refused");
}

#[test]
fn what_only_a_fault_saw() {
    let mut history = History::small();
    history.lossy(4);
    history.healed();
    if let Some(Record::FaultDone(done)) = history.lines.last_mut() {
        done.violations.push("the old leader wrote".into());
    }
    history.breaks("fault");
}

#[test]
fn a_loss_that_no_lossy_failover_excuses() {
    let mut history = History::small();
    history.written(5, &[insert(3, "d")]);
    history.say(Record::Ok { w: 0, n: 5 });
    // Two minutes later.
    history.lines.extend(std::iter::repeat_n(Record::Outbox { rows: 0 }, 120_000));
    history.lossy(4);
    history.healed();
    history.breaks("lost");
}

#[test]
fn a_run_that_proves_nothing_says_so() {
    let verdict = History::new().check();
    assert!(verdict.vacuous.iter().any(|why| why.contains("deliveries")), "{verdict:?}");
    assert!(verdict.vacuous.iter().any(|why| why.contains("log")), "{verdict:?}");
}
