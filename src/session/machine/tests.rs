//! The machine under random scripts: a client that says anything, a driver that grants, refuses, delivers and lets time
//! pass in any order. Whatever is said is checked as a client would.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::protocol::message::ResyncReason;

const TIMING: Timing = Timing {
    heartbeat: Duration::from_secs(30),
    progress: Duration::from_secs(5),
    auth_timeout: Duration::from_secs(5),
    expects_answers: true,
};
const LIMITS: Limits =
    Limits { message_bytes: 65_536, subscriptions: 3, filter_bytes: 100, messages_per_s: 20, frame_bytes: 1 << 20 };
const IDS: [&str; 5] = ["a", "b", "c", "d", "e"];

#[derive(Clone, Debug)]
enum Step {
    Subscribe(usize),
    Unsubscribe(usize),
    Ping,
    Sync(u64),
    Text(&'static str),
    /// Grants the oldest wish that waits, at this seq.
    Grant(u64),
    Refuse,
    NotResumed,
    /// A frame that ends this much further; inside a transaction or not.
    Events(usize, u64, bool),
    /// Nothing for it up to this much further.
    Passed(usize, u64),
    /// It has everything up to the log's end.
    Reached(usize),
    Resync(usize),
    /// The log grows.
    Grow(u64),
    /// Time passes, milliseconds; then what is due is done.
    Time(u64, bool),
    SyncFound(u64),
    Drain,
    Close,
}

fn step() -> impl Strategy<Value = Step> {
    let id = 0..IDS.len();
    prop_oneof![
        4 => id.clone().prop_map(Step::Subscribe),
        2 => id.clone().prop_map(Step::Unsubscribe),
        1 => Just(Step::Ping),
        1 => (3_u64..9).prop_map(Step::Sync),
        1 => prop::sample::select(vec!["{}", "nonsense", r#"{"type":"auth","token":"x"}"#]).prop_map(Step::Text),
        6 => (0_u64..50).prop_map(Step::Grant),
        1 => Just(Step::Refuse),
        1 => Just(Step::NotResumed),
        8 => (id.clone(), 0_u64..20, any::<bool>()).prop_map(|(id, by, open)| Step::Events(id, by, open)),
        3 => (id.clone(), 0_u64..20).prop_map(|(id, by)| Step::Passed(id, by)),
        6 => id.clone().prop_map(Step::Reached),
        1 => id.prop_map(Step::Resync),
        6 => (1_u64..100).prop_map(Step::Grow),
        10 => (0_u64..8_000, any::<bool>()).prop_map(|(by, current)| Step::Time(by, current)),
        1 => (3_u64..9).prop_map(Step::SyncFound),
        1 => prop::bool::weighted(0.2).prop_map(|really| if really { Step::Drain } else { Step::Ping }),
        1 => prop::bool::weighted(0.2).prop_map(|really| if really { Step::Close } else { Step::Ping }),
    ]
}

/// What a client and a driver know of one subscription.
#[derive(Debug)]
struct Seen {
    position: Option<u64>,
    caught_up: bool,
    /// What the driver has handed over, or said that there was nothing in.
    has: u64,
    /// The position is inside a transaction.
    open: bool,
}

struct Play {
    machine: Machine,
    now: Instant,
    log: u64,
    wishes: VecDeque<(u64, String)>,
    seen: HashMap<String, Seen>,
    pings: usize,
    unsubscribed: usize,
    /// Subscribe messages without an answer so far.
    asked: usize,
    closed: bool,
}

fn at(seq: u64) -> Cursor {
    Cursor { epoch: 1, seq, check: 7 }
}

fn resync(id: &str) -> Resync {
    let message = String::new();
    Resync { id: id.to_owned(), reason: ResyncReason::TooFarBehind, oldest: None, newest: None, message }
}

impl Play {
    fn new() -> Self {
        let now = Instant::now();
        let mut machine = Machine::new(now, TIMING, LIMITS);
        machine.welcome(Welcome {
            version: 1,
            connection: String::new(),
            node: String::new(),
            heartbeat_ms: 1,
            progress_ms: 1,
            window: crate::protocol::message::Window { memory_ms: 0, history_ms: 0 },
            limits: LIMITS,
        });
        assert!(matches!(machine.poll(), Some(Output::Send(ServerMessage::Welcome(_)))));
        let (wishes, seen) = (VecDeque::new(), HashMap::new());
        Self { machine, now, log: 100, wishes, seen, pings: 0, unsubscribed: 0, asked: 0, closed: false }
    }

    fn say(&mut self, text: &str) {
        self.machine.message(self.now, text);
    }

    /// The seqs that may come next for `id`: from its own to the log's end.
    fn further(&self, id: &str, by: u64) -> Option<u64> {
        let seen = self.seen.get(id)?;
        seen.position?;
        Some((seen.has + by).min(self.log))
    }

    fn play(&mut self, step: &Step) {
        match *step {
            Step::Subscribe(id) => {
                self.asked += usize::from(!self.closed);
                self.say(&format!(r#"{{"type":"subscribe","id":"{}","tables":["t"]}}"#, IDS[id]));
            }
            Step::Unsubscribe(id) => {
                self.unsubscribed += usize::from(!self.closed);
                self.say(&format!(r#"{{"type":"unsubscribe","id":"{}"}}"#, IDS[id]));
            }
            Step::Ping => {
                self.pings += usize::from(!self.closed);
                self.say(r#"{"type":"ping"}"#);
            }
            Step::Sync(tx) => self.say(&format!(r#"{{"type":"sync","tx":"{tx}"}}"#)),
            Step::Text(text) => self.say(text),
            Step::Grant(back) => {
                let Some((serial, _)) = self.wishes.pop_front() else { return };
                let cursor = at(self.log.saturating_sub(back));
                self.machine.started(self.now, serial, cursor, Some(true), Source::Memory);
            }
            Step::Refuse => {
                let Some((serial, _)) = self.wishes.pop_front() else { return };
                self.machine.not_started(serial, unavailable("Postgres is away"));
            }
            Step::NotResumed => {
                let Some((serial, _)) = self.wishes.pop_front() else { return };
                self.machine.not_resumed(serial, resync(""));
            }
            Step::Events(id, by, open) => self.events(IDS[id], by, open),
            Step::Passed(id, by) => {
                let Some(seq) = self.further(IDS[id], by) else { return };
                self.machine.passed(IDS[id], seq);
                self.seen.get_mut(IDS[id]).unwrap().has = seq;
            }
            Step::Reached(id) => {
                let Some(seq) = self.further(IDS[id], u64::MAX / 2) else { return };
                let seen = self.seen.get_mut(IDS[id]).unwrap();
                // A whole transaction does not end where one is open.
                if seen.open && seen.position == Some(seq) {
                    return;
                }
                (seen.has, seen.open) = (seq, false);
                self.machine.reached(self.now, IDS[id], at(seq));
            }
            Step::Resync(id) => self.machine.resync(resync(IDS[id])),
            Step::Grow(by) => self.log += by,
            Step::Time(by, current) => self.time(by, current),
            Step::SyncFound(serial) => self.machine.sync_found(serial, at(self.log)),
            Step::Drain => self.machine.drain(self.now, Duration::from_secs(1), Duration::from_secs(2)),
            Step::Close => self.machine.close(CloseCode::Internal),
        }
    }

    fn events(&mut self, id: &str, by: u64, open: bool) {
        let Some(seq) = self.further(id, by) else { return };
        let seen = self.seen.get_mut(id).unwrap();
        let before = seen.position;
        let prev = self.machine.events(self.now, id, at(seq), open);
        if seq <= before.unwrap_or_default() || self.closed {
            assert_eq!(prev, None, "a frame went back");
            return;
        }
        assert_eq!(prev.map(|prev| prev.seq), before, "`prev` is the position before");
        (seen.position, seen.has, seen.open) = (Some(seq), seq, open);
    }

    fn time(&mut self, by: u64, current: bool) {
        self.now += Duration::from_millis(by);
        if self.machine.deadline() <= self.now && !self.closed {
            let due = self.machine.progress_due(self.now);
            self.machine.tick(self.now);
            if due {
                self.machine.progress(self.now, current);
            }
            if !self.machine.is_closed() {
                // Else the driver would turn for ever without waiting.
                assert!(self.machine.deadline() > self.now, "what is due is done");
            }
        }
    }

    /// Looks at what came out.
    fn look(&mut self) {
        while let Some(output) = self.machine.poll() {
            assert!(!self.closed, "nothing is said after a close: {output:?}");
            match output {
                Output::Send(message) => self.hear(message),
                Output::Start { serial, subscribe } => {
                    self.seen
                        .insert(subscribe.id.clone(), Seen { position: None, caught_up: false, has: 0, open: false });
                    self.wishes.push_back((serial, subscribe.id.clone()));
                }
                Output::Close(_) => self.closed = true,
                Output::Stop(id) => {
                    self.seen.remove(&*id);
                }
                Output::Ping | Output::Authenticate(_) | Output::Sync { .. } => {}
            }
        }
        assert_eq!(self.closed, self.machine.is_closed());
    }

    fn hear(&mut self, message: ServerMessage) {
        match message {
            ServerMessage::Subscribed { id, cursor, .. } => {
                self.asked -= 1;
                let seen = self.seen.get_mut(&id).expect("who asked");
                assert_eq!(seen.position, None, "answered once");
                seen.position = cursor.map(|cursor| cursor.seq);
                seen.has = seen.position.expect("a position");
            }
            ServerMessage::CaughtUp { id, cursor } => {
                let seen = self.seen.get_mut(&id).expect("who subscribed");
                assert!(!std::mem::replace(&mut seen.caught_up, true), "caught_up comes once");
                assert!(
                    Some(cursor.seq) >= seen.position && cursor.seq <= seen.has && !seen.open,
                    "{cursor:?} {seen:?}"
                );
                seen.position = Some(cursor.seq);
            }
            ServerMessage::Progress { ids, cursor } => {
                assert!(!ids.is_empty());
                for id in ids {
                    let seen = self.seen.get_mut(&id).expect("who subscribed");
                    assert!(seen.caught_up, "progress is for those who have caught up");
                    assert!(Some(cursor.seq) >= seen.position, "a position never goes back");
                    assert!(
                        cursor.seq <= seen.has,
                        "progress {cursor:?} passes over events that were not sent: {seen:?}"
                    );
                    assert!(!seen.open, "progress stands between transactions");
                    seen.position = Some(cursor.seq);
                }
            }
            ServerMessage::ResyncRequired(resync) => {
                // One that ran has been stopped before; another's wish ends here.
                if self.seen.get(&resync.id).is_some_and(|seen| seen.position.is_none()) {
                    self.seen.remove(&resync.id);
                    self.asked -= 1;
                }
            }
            ServerMessage::Error { id: Some(id), code, .. } => {
                self.asked -= 1;
                if code == ErrorCode::Unavailable {
                    self.seen.remove(&id);
                }
            }
            ServerMessage::Unsubscribed { .. } => self.unsubscribed -= 1,
            ServerMessage::Pong { .. } => self.pings -= 1,
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_script_makes_a_gap_a_step_back_or_a_wish_without_an_answer(script in prop::collection::vec(step(), 1..120)) {
        let mut play = Play::new();
        for step in &script {
            play.play(step);
            play.look();
            // The client answers pings, and says little.
            play.machine.heard(play.now);
        }
        if !play.closed {
            prop_assert_eq!((play.pings, play.unsubscribed), (0, 0));
            // What waits for an answer is judged, or was given up before.
            prop_assert!(play.asked <= script.len());
            while let Some((serial, _)) = play.wishes.pop_front() {
                play.machine.not_started(serial, unavailable("Postgres is away"));
                play.look();
            }
            prop_assert!(play.seen.values().all(|seen| seen.position.is_some()), "{:?}", play.seen);
        }
    }
}

/// A live subscription that has caught up at 10 while the log stands there.
fn caught_up_at_ten() -> (Machine, Instant) {
    let now = Instant::now();
    let mut machine = Play::new().machine;
    machine.message(now, r#"{"type":"subscribe","id":"a","tables":["t"]}"#);
    let Some(Output::Start { serial, .. }) = machine.poll() else { panic!("no wish") };
    machine.started(now, serial, at(10), None, Source::Live);
    machine.reached(now, "a", at(10));
    while machine.poll().is_some() {}
    (machine, now)
}

/// Once, progress said the node's own end, and who was still reading the log lost what lay between.
#[test]
fn progress_never_overtakes_what_was_delivered() {
    let (mut machine, now) = caught_up_at_ten();
    machine.passed("a", 15);
    let later = now + TIMING.progress;
    machine.progress(later, true);
    assert_eq!(machine.poll(), Some(Output::Send(ServerMessage::Progress { ids: vec!["a".into()], cursor: at(10) })));
    machine.reached(later, "a", at(20));
    machine.progress(later + TIMING.progress, true);
    assert_eq!(machine.poll(), Some(Output::Send(ServerMessage::Progress { ids: vec!["a".into()], cursor: at(20) })));
}

/// Once, a position inside a transaction made progress due for ever, and the node turned on the spot.
#[test]
fn an_open_transaction_is_no_reason_to_turn_for_ever() {
    let (mut machine, now) = caught_up_at_ten();
    assert_eq!(machine.events(now, "a", at(12), true), Some(at(10)));
    let later = now + TIMING.progress;
    assert!(machine.progress_due(later));
    machine.tick(later);
    machine.progress(later, true);
    assert_eq!(machine.poll(), None, "nothing is said inside a transaction");
    assert!(!machine.progress_due(later) && machine.deadline() > later);
}

/// A rewound log: what was passed over in silence is not promised any more.
#[test]
fn after_a_rewind_progress_repeats_the_position() {
    let (mut machine, now) = caught_up_at_ten();
    machine.reached(now, "a", at(30));
    machine.rewound("a");
    machine.progress(now + TIMING.progress, true);
    assert_eq!(machine.poll(), Some(Output::Send(ServerMessage::Progress { ids: vec!["a".into()], cursor: at(10) })));
}

#[test]
fn a_sync_that_was_given_up_takes_no_later_one_of_its_transaction_along() {
    let (mut machine, now) = caught_up_at_ten();
    let mut ask = |now| {
        machine.message(now, r#"{"type":"sync","tx":"7","timeout_ms":200}"#);
        match machine.poll() {
            Some(Output::Sync { serial, .. }) => serial,
            other => panic!("{other:?}"),
        }
    };
    let later = now + Duration::from_millis(200);
    let (first, second) = (ask(now), ask(later));
    machine.tick(later);
    assert!(matches!(machine.poll(), Some(Output::Send(ServerMessage::Error { .. }))));
    machine.sync_failed(first, unavailable("not over"));
    assert_eq!(machine.poll(), None);
    machine.sync_found(second, at(10));
    assert!(matches!(machine.poll(), Some(Output::Send(ServerMessage::Synced { .. }))));
}
