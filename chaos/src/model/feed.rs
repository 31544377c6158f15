//! Nodes that follow the log by a feed that may lose and repeat, rings and a log that are trimmed, and a client that
//! resumes on either node and whose filter hides an event.

use stateright::{Model, Property};

use super::{breaks, holds};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Design {
    Right,
    /// What the feed brings is taken, whatever is missing before it.
    TrustFeed,
    /// A position one before the ring's beginning is served from the ring.
    TrimOneTooMany,
    /// A resume begins with the event at the position.
    ResumeInclusive,
    /// A position is told when the node has the event, not when the client does.
    ProgressBeforeEvents,
    /// A node that stood still answers from what it believes.
    StaleAnswers,
}

const EVENTS: u8 = 3;
/// The client's filter lets it not through: only positions tell that it is past.
const HIDDEN: u8 = 2;
/// Resumes of the client; more change nothing but the number of states.
const CONNECTIONS: u8 = 3;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Node {
    /// The ring: what lies after `base` up to `newest` is believed to be there.
    base: u8,
    newest: u8,
    /// Numbers that the ring really has.
    ring: Vec<u8>,
    /// Announcements on their way.
    feed: Vec<u8>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct State {
    log_oldest: u8,
    log_newest: u8,
    nodes: [Node; 2],
    /// The client: where it is connected, what the server counts as sent, its own position, and what it saw.
    on: Option<usize>,
    sent: u8,
    position: u8,
    seen: Vec<u8>,
    connections: u8,
    resynced: Option<(u8, u8)>,
    from_log: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Append,
    Hear(usize),
    Lose(usize),
    Reconcile(usize),
    TrimRing(usize),
    TrimLog,
    Connect(usize),
    Deliver,
    Progress,
    Disconnect,
}

struct Feed(Design);

impl Feed {
    /// What a node does for the client.
    fn served(&self, before: &State, step: Step) -> Option<State> {
        let mut state = before.clone();
        match step {
            Step::Connect(n) => {
                state.connections += 1;
                let node = &state.nodes[n];
                if state.position > node.newest {
                    // Behind the client: it must read the log's end before it can say anything.
                    if self.0 == Design::StaleAnswers {
                        state.resynced = Some((state.position, state.log_oldest));
                        return Some(state);
                    }
                    return None;
                }
                if state.position < node.base && state.position + 1 < state.log_oldest {
                    state.resynced = Some((state.position, state.log_oldest));
                    return Some(state);
                }
                state.on = Some(n);
                state.sent = state.position.saturating_sub(u8::from(self.0 == Design::ResumeInclusive));
            }
            Step::Deliver => {
                let node = &state.nodes[state.on?];
                let slack = u8::from(self.0 == Design::TrimOneTooMany);
                let next = if state.sent + slack >= node.base {
                    node.ring.iter().copied().find(|seq| *seq > state.sent)?
                } else if state.sent + 1 >= state.log_oldest && state.sent < state.log_newest {
                    state.from_log = true;
                    state.sent + 1
                } else if state.sent + 1 < state.log_oldest {
                    // It left the log while it was connected.
                    state.resynced = Some((state.sent, state.log_oldest));
                    state.on = None;
                    return Some(state);
                } else {
                    return None;
                };
                state.sent = next;
                if next != HIDDEN {
                    state.position = next;
                    state.seen.push(next);
                }
            }
            Step::Progress => {
                let node = &state.nodes[state.on?];
                let all = state.sent == node.newest;
                if !all && self.0 != Design::ProgressBeforeEvents || state.position >= node.newest {
                    return None;
                }
                state.position = node.newest;
                state.sent = node.newest;
            }
            _ => return None,
        }
        Some(state)
    }
}

impl Model for Feed {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State { log_oldest: 1, ..State::default() }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        if state.log_newest < EVENTS {
            steps.push(Step::Append);
        }
        for (n, node) in state.nodes.iter().enumerate() {
            if !node.feed.is_empty() {
                steps.extend([Step::Hear(n), Step::Lose(n)]);
            }
            if node.newest < state.log_newest {
                steps.push(Step::Reconcile(n));
            }
            if node.base + 1 < node.newest {
                steps.push(Step::TrimRing(n));
            }
            if state.on.is_none() && state.connections < CONNECTIONS && state.resynced.is_none() {
                steps.push(Step::Connect(n));
            }
        }
        if state.log_oldest + 1 < state.log_newest {
            steps.push(Step::TrimLog);
        }
        if state.on.is_some() {
            steps.extend([Step::Deliver, Step::Progress, Step::Disconnect]);
        }
    }

    fn next_state(&self, before: &State, step: Step) -> Option<State> {
        let mut state = before.clone();
        match step {
            Step::Append => {
                state.log_newest += 1;
                state.nodes.iter_mut().for_each(|node| node.feed.push(state.log_newest));
            }
            Step::Lose(n) => drop(state.nodes[n].feed.remove(0)),
            Step::Hear(n) => {
                let node = &mut state.nodes[n];
                let seq = node.feed.remove(0);
                if seq == node.newest + 1 || self.0 == Design::TrustFeed && seq > node.newest {
                    node.ring.push(seq);
                    node.newest = seq;
                }
            }
            Step::Reconcile(n) => {
                let (oldest, newest) = (state.log_oldest, state.log_newest);
                let node = &mut state.nodes[n];
                // What was trimmed before it was read: the ring begins anew.
                if node.newest + 1 < oldest {
                    (node.base, node.newest) = (oldest - 1, oldest - 1);
                    node.ring.clear();
                }
                node.ring.extend(node.newest + 1..=newest);
                node.newest = newest;
            }
            Step::TrimRing(n) => {
                let node = &mut state.nodes[n];
                node.base += 1;
                let base = node.base;
                node.ring.retain(|seq| *seq > base);
            }
            Step::TrimLog => state.log_oldest += 1,
            Step::Connect(_) | Step::Deliver | Step::Progress => return self.served(before, step),
            Step::Disconnect => state.on = None,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            // Whatever it was to see at or before its position was seen.
            Property::always("no loss", |_, state: &State| {
                (1..=state.position).all(|seq| seq == HIDDEN || state.seen.contains(&seq))
            }),
            Property::always("unique and in order", |_, state: &State| {
                state.seen.windows(2).all(|pair| pair[0] < pair[1])
            }),
            Property::always("honest", |_, state: &State| {
                state.resynced.is_none_or(|(position, oldest)| position + 1 < oldest)
            }),
            Property::sometimes("a resume is served from the log", |_, state: &State| {
                state.from_log && state.connections > 1
            }),
            Property::sometimes("somebody is told that the log is gone", |_, state: &State| state.resynced.is_some()),
            Property::sometimes("a position is told past a hidden event", |_, state: &State| state.position == HIDDEN),
            Property::sometimes("everything is seen over three connections", |_, state: &State| {
                state.connections == CONNECTIONS && state.seen.len() == usize::from(EVENTS - 1)
            }),
        ]
    }
}

#[test]
fn a_client_loses_and_repeats_nothing_whatever_the_feed_does() {
    holds(Feed(Design::Right));
}

#[test]
fn a_feed_that_is_trusted_loses_events() {
    breaks(Feed(Design::TrustFeed), "no loss");
}

#[test]
fn a_ring_that_serves_one_too_early_loses_an_event() {
    breaks(Feed(Design::TrimOneTooMany), "no loss");
}

#[test]
fn a_resume_that_includes_its_position_repeats_an_event() {
    breaks(Feed(Design::ResumeInclusive), "unique and in order");
}

#[test]
fn progress_before_its_events_loses_them_at_the_next_resume() {
    breaks(Feed(Design::ProgressBeforeEvents), "no loss");
}

#[test]
fn a_stale_node_that_answers_sends_clients_back_without_need() {
    breaks(Feed(Design::StaleAnswers), "honest");
}
