//! The relay: transactions that overlap, claims, numbering, and two nodes that may both believe they lead.

use stateright::{Model, Property};

use super::{breaks, holds};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Design {
    Right,
    /// The position is the highest outbox id relayed.
    CursorIsOutboxId,
    /// The floor moves on and forgets who was still running.
    FloorForgetsRunning,
    /// A claim takes one row of a transaction at a time.
    TornClaim,
    /// Transactions are ordered by xid.
    OrderByXid,
    /// A claim is committed whoever holds the lock by then.
    NoFencing,
}

/// What each transaction writes, by key.
const TRANSACTIONS: [&[u8]; 3] = [&[1, 2], &[2], &[3]];
/// The last one is rolled back instead of committed.
const ROLLED_BACK: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Status {
    Running,
    Committed,
    Gone,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Transaction {
    status: Status,
    xid: Option<u8>,
    /// Outbox ids of the rows written so far.
    ids: Vec<u8>,
}

/// A row of the log: number, transaction, outbox id, end of the transaction.
type Row = (u8, usize, u8, bool);

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Leader {
    leading: bool,
    newest: u8,
    floor: u8,
    /// Transactions that ran when the floor was set.
    running: Vec<usize>,
    /// Claimed and not committed yet.
    claim: Option<(Vec<Row>, u8, Vec<usize>)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    transactions: Vec<Transaction>,
    next_id: u8,
    next_xid: u8,
    /// Rows that wait: (outbox id, transaction).
    outbox: Vec<(u8, usize)>,
    log: Vec<Row>,
    lock: Option<usize>,
    nodes: [Leader; 2],
    takeovers: u8,
    refused: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Write(usize),
    End(usize),
    Lead(usize),
    Claim(usize),
    Commit(usize),
    /// Postgres ends a node's session; the node may not know.
    SessionEnds(usize),
}

struct Relay(Design);

impl Relay {
    /// What a claim of `node` takes now, in its order.
    fn claim(&self, state: &State, node: usize) -> (Vec<Row>, u8, Vec<usize>) {
        let leader = &state.nodes[node];
        let visible = |t: usize| state.transactions[t].status == Status::Committed;
        let looked_at = |id: u8, t: usize| match self.0 {
            Design::CursorIsOutboxId => id > state.log.iter().map(|row| row.2).max().unwrap_or(0),
            Design::FloorForgetsRunning => id > leader.floor,
            _ => id > leader.floor || leader.running.contains(&t),
        };
        let mut rows: Vec<(u8, usize)> =
            state.outbox.iter().copied().filter(|(id, t)| visible(*t) && looked_at(*id, *t)).collect();
        let last = |t: usize| rows.iter().filter(|row| row.1 == t).map(|row| row.0).max();
        let order: Vec<_> = rows
            .iter()
            .map(|(id, t)| match self.0 {
                Design::OrderByXid => (state.transactions[*t].xid, *id),
                _ => (last(*t), *id),
            })
            .collect();
        let mut sorted: Vec<usize> = (0..rows.len()).collect();
        sorted.sort_by_key(|at| order[*at]);
        rows = sorted.iter().map(|at| rows[*at]).collect();
        if self.0 == Design::TornClaim {
            rows.truncate(1);
        }
        let numbered = rows.iter().enumerate().map(|(at, (id, t))| {
            let end = rows.get(at + 1).is_none_or(|next| next.1 != *t);
            (leader.newest + at as u8 + 1, *t, *id, end)
        });
        let running = (0..TRANSACTIONS.len()).filter(|t| {
            let transaction = &state.transactions[*t];
            transaction.status == Status::Running && transaction.xid.is_some()
        });
        (numbered.collect(), state.next_id - 1, running.collect())
    }
}

impl Model for Relay {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let idle = Transaction { status: Status::Running, xid: None, ids: Vec::new() };
        vec![State {
            transactions: vec![idle; TRANSACTIONS.len()],
            next_id: 1,
            next_xid: 1,
            outbox: Vec::new(),
            log: Vec::new(),
            lock: None,
            nodes: Default::default(),
            takeovers: 0,
            refused: false,
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        for (t, transaction) in state.transactions.iter().enumerate() {
            if transaction.status != Status::Running {
                continue;
            }
            match TRANSACTIONS[t].get(transaction.ids.len()) {
                // A row that another open transaction has changed is waited for.
                Some(key) => {
                    let held = state.transactions.iter().enumerate().any(|(other, open)| {
                        other != t
                            && open.status == Status::Running
                            && TRANSACTIONS[other][..open.ids.len()].contains(key)
                    });
                    if !held {
                        steps.push(Step::Write(t));
                    }
                }
                None => steps.push(Step::End(t)),
            }
        }
        for (node, leader) in state.nodes.iter().enumerate() {
            if state.lock.is_none() && !leader.leading && state.takeovers < 2 {
                steps.push(Step::Lead(node));
            }
            if leader.leading && leader.claim.is_none() {
                steps.push(Step::Claim(node));
            }
            if leader.claim.is_some() {
                steps.push(Step::Commit(node));
            }
            if state.lock == Some(node) && state.takeovers < 2 {
                steps.push(Step::SessionEnds(node));
            }
        }
    }

    fn next_state(&self, before: &State, step: Step) -> Option<State> {
        let mut state = before.clone();
        match step {
            Step::Write(t) => {
                let transaction = &mut state.transactions[t];
                if transaction.xid.is_none() {
                    transaction.xid = Some(state.next_xid);
                    state.next_xid += 1;
                }
                transaction.ids.push(state.next_id);
                state.outbox.push((state.next_id, t));
                state.next_id += 1;
            }
            Step::End(t) if t == ROLLED_BACK => {
                state.transactions[t].status = Status::Gone;
                state.outbox.retain(|row| row.1 != t);
            }
            Step::End(t) => state.transactions[t].status = Status::Committed,
            Step::Lead(node) => {
                state.lock = Some(node);
                state.takeovers += 1;
                let newest = state.log.iter().map(|row| row.0).max().unwrap_or(0);
                state.nodes[node] = Leader { leading: true, newest, ..Leader::default() };
            }
            Step::Claim(node) => {
                let claim = self.claim(before, node);
                if claim.0.is_empty() && claim.1 == before.nodes[node].floor && claim.2 == before.nodes[node].running {
                    return None;
                }
                state.nodes[node].claim = Some(claim);
            }
            Step::Commit(node) => {
                let (rows, floor, running) = state.nodes[node].claim.take()?;
                // The claim ran on the session that held the lock: without it, it ended with the session.
                if state.lock != Some(node) && self.0 != Design::NoFencing {
                    state.nodes[node] = Leader::default();
                    state.refused = true;
                    return Some(state);
                }
                state.outbox.retain(|(id, _)| rows.iter().all(|row| row.2 != *id));
                let leader = &mut state.nodes[node];
                leader.newest += rows.len() as u8;
                // What was not taken stays above the floor.
                if self.0 != Design::TornClaim {
                    (leader.floor, leader.running) = (floor, running);
                }
                state.log.extend(rows);
            }
            Step::SessionEnds(_) => state.lock = None,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("dense", |_, state: &State| {
                state.log.iter().enumerate().all(|(at, row)| usize::from(row.0) == at + 1)
            }),
            Property::always("unique", |_, state: &State| {
                state.log.iter().enumerate().all(|(at, row)| state.log[..at].iter().all(|before| before.2 != row.2))
            }),
            Property::always("no event of a rollback", |_, state: &State| {
                state.log.iter().all(|row| state.transactions[row.1].status == Status::Committed)
            }),
            Property::always("atomic", |_, state: &State| {
                state.log.windows(2).all(|pair| pair[0].3 != (pair[0].1 == pair[1].1))
                    && state.log.last().is_none_or(|row| row.3)
            }),
            Property::always("order of each key", |_, state: &State| {
                let of = |row: &Row| {
                    let at = state.transactions[row.1].ids.iter().position(|id| *id == row.2)?;
                    TRANSACTIONS[row.1].get(at)
                };
                state
                    .log
                    .iter()
                    .enumerate()
                    .all(|(at, row)| state.log[..at].iter().all(|before| of(before) != of(row) || before.2 < row.2))
            }),
            // Once everything is over and a leader has looked again and found nothing, everything is in the log.
            Property::always("complete", |model, state: &State| {
                let over = state.transactions.iter().all(|transaction| transaction.status != Status::Running);
                let leader = state.lock.map(|node| (node, &state.nodes[node]));
                let done = leader.is_some_and(|(node, leader)| {
                    leader.claim.is_none() && leader.running.is_empty() && model.claim(state, node).0.is_empty()
                });
                !(over && done) || state.outbox.is_empty()
            }),
            Property::sometimes("a late commit of a low id is relayed", |_, state: &State| {
                state.log.windows(2).any(|pair| pair[1].2 < pair[0].2)
            }),
            Property::sometimes("a leader that lost its lock tries to commit", |_, state: &State| state.refused),
            Property::sometimes("a second leader relays", |_, state: &State| {
                state.takeovers == 2 && state.log.len() == 3 && state.lock.is_some()
            }),
        ]
    }
}

#[test]
fn the_relay_loses_repeats_and_reorders_nothing() {
    holds(Relay(Design::Right));
}

#[test]
fn an_outbox_id_as_position_loses_late_commits() {
    breaks(Relay(Design::CursorIsOutboxId), "complete");
}

#[test]
fn a_floor_that_forgets_who_was_running_loses_late_commits() {
    breaks(Relay(Design::FloorForgetsRunning), "complete");
}

#[test]
fn a_torn_claim_tears_a_transaction() {
    breaks(Relay(Design::TornClaim), "atomic");
}

#[test]
fn the_order_of_xids_is_not_the_order_of_changes() {
    breaks(Relay(Design::OrderByXid), "order of each key");
}

#[test]
fn without_fencing_two_leaders_give_one_number_twice() {
    breaks(Relay(Design::NoFencing), "dense");
}
