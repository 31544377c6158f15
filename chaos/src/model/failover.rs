//! Failover: a standby that has all of the log or only its beginning takes over; the old primary may come back.

use stateright::{Model, Property};

use super::{breaks, holds};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Design {
    Right,
    /// Cursors are compared by their number alone.
    NoCheck,
    /// Every cursor of an older epoch is sent back.
    EpochAlone,
    /// Nodes serve whatever primary they reach.
    OldPrimaryAccepted,
}

const FAILOVERS: u8 = 2;
const LENGTH: usize = 4;

/// An event: the epoch in which it was numbered is its identity.
type Event = u8;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    /// The logs of the primary, of its standby, and of a primary that was left behind.
    primary: Vec<Event>,
    standby: usize,
    old: Option<(u8, Vec<Event>)>,
    epoch: u8,
    /// (epoch, how many events stood before it), oldest first.
    epochs: Vec<(u8, usize)>,
    /// The client's cursor: epoch, number; and what it saw under each number.
    cursor: (u8, usize),
    seen: Vec<Event>,
    connected: bool,
    /// It was told to start over, with its cursor and whether that was in a lost tail.
    told: Option<bool>,
    lost: bool,
    mixed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Append,
    Replicate,
    Failover,
    /// Somebody still writes to the old primary.
    AppendToOld,
    Connect,
    Deliver,
    /// A node that was cut off reaches the old primary first.
    DeliverFromOld,
    Disconnect,
}

struct Failover(Design);

impl State {
    fn diverged(&self) -> bool {
        self.epochs.iter().any(|(epoch, start)| *epoch > self.cursor.0 && *start < self.cursor.1)
    }

    fn epoch_of(&self, number: usize) -> u8 {
        self.epochs.iter().rev().find(|(_, start)| *start < number).map_or(1, |(epoch, _)| *epoch)
    }
}

impl Model for Failover {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            primary: Vec::new(),
            standby: 0,
            old: None,
            epoch: 1,
            epochs: vec![(1, 0)],
            cursor: (1, 0),
            seen: Vec::new(),
            connected: false,
            told: None,
            lost: false,
            mixed: false,
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        if state.primary.len() < LENGTH {
            steps.push(Step::Append);
        }
        if state.standby < state.primary.len() {
            steps.push(Step::Replicate);
        }
        if state.epoch <= FAILOVERS {
            steps.push(Step::Failover);
        }
        if state.old.as_ref().is_some_and(|(_, log)| log.len() < LENGTH) {
            steps.push(Step::AppendToOld);
        }
        if state.told.is_none() {
            steps.extend(if state.connected {
                vec![Step::Deliver, Step::DeliverFromOld, Step::Disconnect]
            } else {
                vec![Step::Connect]
            });
        }
    }

    fn next_state(&self, before: &State, step: Step) -> Option<State> {
        let mut state = before.clone();
        match step {
            Step::Append => state.primary.push(state.epoch),
            Step::Replicate => state.standby += 1,
            Step::Failover => {
                state.old = Some((state.epoch, state.primary.clone()));
                state.lost |= state.standby < state.primary.len();
                state.primary.truncate(state.standby);
                state.epoch += 1;
                state.epochs.push((state.epoch, state.standby));
                // Nodes lost their connections; every position is judged anew.
                state.connected = false;
            }
            Step::AppendToOld => {
                // Marked with a number that no epoch has: it never was part of the log.
                if let Some((_, log)) = &mut state.old {
                    log.push(100);
                }
            }
            Step::Connect => match self.0 {
                Design::NoCheck => state.connected = true,
                Design::EpochAlone if state.cursor.0 < state.epoch && state.cursor.1 > 0 => {
                    state.told = Some(state.diverged());
                }
                _ if state.diverged() => state.told = Some(true),
                _ => state.connected = true,
            },
            Step::Deliver => {
                let next = *state.primary.get(state.cursor.1)?;
                state.seen.truncate(state.cursor.1);
                state.seen.push(next);
                state.cursor = (state.epoch_of(state.cursor.1 + 1), state.cursor.1 + 1);
            }
            Step::DeliverFromOld => {
                if self.0 != Design::OldPrimaryAccepted {
                    return None;
                }
                let (epoch, log) = state.old.clone()?;
                let next = *log.get(state.cursor.1)?;
                state.mixed |= next == 100;
                state.seen.push(next);
                state.cursor = (epoch, state.cursor.1 + 1);
            }
            Step::Disconnect => state.connected = false,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            // Who is connected has seen exactly the beginning of the log, or will be told at the next connection.
            Property::always("nobody diverges in silence", |_, state: &State| {
                !state.connected || state.primary.starts_with(&state.seen)
            }),
            Property::always("only the diverged are told", |_, state: &State| state.told != Some(false)),
            Property::always("nothing of the old primary", |_, state: &State| !state.mixed),
            Property::sometimes("a tail is lost and its reader is told", |_, state: &State| {
                state.lost && state.told == Some(true)
            }),
            Property::sometimes("a failover without loss goes unnoticed", |_, state: &State| {
                !state.lost && state.epoch == 3 && state.seen.len() == LENGTH && state.connected
            }),
            Property::sometimes("a reader before the fork goes on", |_, state: &State| {
                state.lost && state.connected && state.seen.len() == LENGTH
            }),
        ]
    }
}

#[test]
fn exactly_the_readers_of_a_lost_tail_are_told() {
    holds(Failover(Design::Right));
}

#[test]
fn without_a_check_readers_of_a_lost_tail_go_on_in_silence() {
    breaks(Failover(Design::NoCheck), "nobody diverges in silence");
}

#[test]
fn an_epoch_alone_sends_everybody_back() {
    breaks(Failover(Design::EpochAlone), "only the diverged are told");
}

#[test]
fn an_old_primary_that_is_accepted_tells_what_never_was() {
    breaks(Failover(Design::OldPrimaryAccepted), "nothing of the old primary");
}
