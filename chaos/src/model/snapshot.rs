//! From a snapshot to the stream: rows, the log's end and the snapshot of one moment, then the events after it, without
//! those that the snapshot saw already.

use stateright::{Model, Property};

use super::{breaks, holds};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Design {
    Right,
    /// Every event after the log's end of that moment is applied.
    WithoutXidRule,
    /// The log's end is read by a later statement than the rows.
    EndReadLater,
}

const TRANSACTIONS: usize = 3;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct State {
    /// Committed transactions, in the order of their commits.
    committed: Vec<usize>,
    /// Relayed ones.
    log: Vec<usize>,
    /// What the rows show, and where the stream begins.
    rows: Option<Vec<usize>>,
    end: Option<usize>,
    read: usize,
    /// How often each change was applied by the client.
    applied: [u8; TRANSACTIONS],
    skipped: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Commit(usize),
    Relay(usize),
    ReadRows,
    ReadEnd,
    Receive,
}

struct Snapshot(Design);

impl Model for Snapshot {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State::default()]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        for t in 0..TRANSACTIONS {
            if !state.committed.contains(&t) {
                steps.push(Step::Commit(t));
            } else if !state.log.contains(&t) {
                steps.push(Step::Relay(t));
            }
        }
        if state.rows.is_none() {
            steps.push(Step::ReadRows);
        } else if state.end.is_none() {
            steps.push(Step::ReadEnd);
        } else {
            steps.push(Step::Receive);
        }
    }

    fn next_state(&self, before: &State, step: Step) -> Option<State> {
        let mut state = before.clone();
        match step {
            Step::Commit(t) => state.committed.push(t),
            Step::Relay(t) => state.log.push(t),
            Step::ReadRows => {
                for t in &before.committed {
                    state.applied[*t] += 1;
                }
                state.rows = Some(before.committed.clone());
                // One transaction, one snapshot: the end is of the same moment.
                if self.0 != Design::EndReadLater {
                    state.end = Some(before.log.len());
                    state.read = before.log.len();
                }
            }
            Step::ReadEnd => {
                state.end = Some(before.log.len());
                state.read = before.log.len();
            }
            Step::Receive => {
                let t = *before.log.get(before.read)?;
                state.read += 1;
                let visible = before.rows.as_ref().is_some_and(|rows| rows.contains(&t));
                if visible && self.0 != Design::WithoutXidRule {
                    state.skipped = true;
                } else {
                    state.applied[t] += 1;
                }
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no change twice", |_, state: &State| state.applied.iter().all(|times| *times < 2)),
            Property::always("no change lost", |_, state: &State| {
                let all = state.end.is_some() && state.log.len() == TRANSACTIONS && state.read == TRANSACTIONS;
                !all || state.applied.iter().all(|times| *times == 1)
            }),
            Property::sometimes("an event that the rows showed already is skipped", |_, state: &State| state.skipped),
            Property::sometimes("rows and stream share the changes", |_, state: &State| {
                state.rows.as_ref().is_some_and(|rows| rows.len() == 1) && state.applied == [1; TRANSACTIONS]
            }),
        ]
    }
}

#[test]
fn snapshot_and_stream_are_each_change_once() {
    holds(Snapshot(Design::Right));
}

#[test]
fn without_the_xid_rule_changes_are_applied_twice() {
    breaks(Snapshot(Design::WithoutXidRule), "no change twice");
}

#[test]
fn an_end_that_is_read_later_loses_changes() {
    breaks(Snapshot(Design::EndReadLater), "no change lost");
}
