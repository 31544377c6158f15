//! Random scripts against the machine's promises, judged by what a client would see.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use serde_json::json;
use uuid::Uuid;

use super::*;
use crate::protocol::message::{ResyncReason, Window};

const TIMING: Timing = Timing {
    heartbeat: Duration::from_secs(20),
    progress: Duration::from_secs(10),
    auth_timeout: Duration::from_secs(5),
    expects_answers: true,
};
const LIMITS: Limits =
    Limits { message_bytes: 1 << 20, subscriptions: 4, filter_bytes: 100, messages_per_s: 10, frame_bytes: 1 << 20 };

fn at(seq: Seq) -> Cursor {
    Cursor::at(1, seq, Uuid::from_u128(u128::from(seq)))
}

fn welcome() -> Welcome {
    Welcome {
        version: 1,
        connection: "c".to_owned(),
        node: "n".to_owned(),
        heartbeat_ms: 20_000,
        progress_ms: 10_000,
        window: Window { memory_ms: 0, history_ms: 0 },
        limits: LIMITS,
    }
}

fn refusal() -> WireError {
    WireError::never(ErrorCode::Forbidden, "no")
}

/// What happens to a connection.
#[derive(Clone, Debug)]
enum Step {
    Auth,
    Garbage,
    Subscribe(usize),
    Unsubscribe(usize),
    Ping,
    Sync(u64),
    /// The credentials, or the oldest wish, are judged.
    Grant(u64),
    Refuse,
    NotResumed,
    /// A frame for a subscription, so far on (or back, where 0) from its position.
    Events(usize, u64, bool),
    Passed(usize, u64),
    Reached(usize, u64),
    Resync(usize),
    Progress(bool),
    SyncFound(u64),
    SyncFailed,
    Settle,
    Wait(u64),
    Drain(u64),
    Heard,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::Auth),
        1 => Just(Step::Garbage),
        12 => (0usize..6).prop_map(Step::Subscribe),
        4 => (0usize..6).prop_map(Step::Unsubscribe),
        2 => Just(Step::Ping),
        6 => (0u64..20).prop_map(Step::Sync),
        16 => (0u64..50).prop_map(Step::Grant),
        2 => Just(Step::Refuse),
        2 => Just(Step::NotResumed),
        20 => (0usize..6, 0u64..10, any::<bool>()).prop_map(|(id, by, open)| Step::Events(id, by, open)),
        8 => (0usize..6, 0u64..10).prop_map(|(id, by)| Step::Passed(id, by)),
        14 => (0usize..6, 0u64..10).prop_map(|(id, by)| Step::Reached(id, by)),
        2 => (0usize..6).prop_map(Step::Resync),
        8 => any::<bool>().prop_map(Step::Progress),
        5 => (0u64..60).prop_map(Step::SyncFound),
        1 => Just(Step::SyncFailed),
        10 => Just(Step::Settle),
        10 => (0u64..4_000).prop_map(Step::Wait),
        1 => (0u64..60_000).prop_map(Step::Drain),
        10 => Just(Step::Heard),
    ]
}

/// What a client knows of one subscription.
#[derive(Debug)]
struct Seen {
    position: Cursor,
    caught_up: bool,
}

/// The machine, its driver, and the client at the other end.
struct Bench {
    machine: Machine,
    now: Instant,
    closed: bool,
    welcomed: bool,
    authentications: usize,
    // Wishes that the driver has not answered, by serial.
    wishes: VecDeque<(u64, String)>,
    // Subscriptions as the client sees them.
    seen: HashMap<String, Seen>,
    // Said by the client and not answered so far.
    asked: HashMap<String, usize>,
    syncs: VecDeque<u64>,
    unanswered_syncs: usize,
    // Ids that the driver serves.
    served: HashSet<String>,
    end: Seq,
}

impl Bench {
    fn new(start: Instant) -> Self {
        Self {
            machine: Machine::new(start, TIMING, LIMITS),
            now: start,
            closed: false,
            welcomed: false,
            authentications: 0,
            wishes: VecDeque::new(),
            seen: HashMap::new(),
            asked: HashMap::new(),
            syncs: VecDeque::new(),
            unanswered_syncs: 0,
            served: HashSet::new(),
            end: 0,
        }
    }

    fn say(&mut self, message: &serde_json::Value) {
        self.machine.message(self.now, &message.to_string());
    }

    fn act(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Auth => self.say(&json!({"type": "auth", "token": "t"})),
            Step::Garbage => self.machine.message(self.now, "{"),
            Step::Subscribe(id) => {
                if !self.closed {
                    *self.asked.entry(format!("s{id}")).or_default() += 1;
                }
                self.say(&json!({"type": "subscribe", "id": format!("s{id}"), "tables": ["t"]}));
            }
            Step::Unsubscribe(id) => self.say(&json!({"type": "unsubscribe", "id": format!("s{id}")})),
            Step::Ping => self.say(&json!({"type": "ping", "t": 7})),
            Step::Sync(xid) => {
                if !self.closed {
                    self.unanswered_syncs += 1;
                }
                self.say(&json!({"type": "sync", "tx": xid.to_string(), "timeout_ms": 5_000}));
            }
            Step::Grant(_) if self.authentications > 0 => {
                self.authentications -= 1;
                self.machine.welcome(welcome());
            }
            Step::Refuse if self.authentications > 0 => {
                self.authentications -= 1;
                self.machine.refuse(refusal(), CloseCode::Unauthenticated);
            }
            Step::Grant(seq) => {
                let Some((serial, _)) = self.wishes.pop_front() else { return Ok(()) };
                if let Some(id) = self.machine.started(self.now, serial, at(seq), None, Source::Live) {
                    prop_assert!(self.served.insert(id.to_string()), "{id} is served twice");
                }
            }
            Step::Refuse => {
                if let Some((serial, _)) = self.wishes.pop_front() {
                    self.machine.not_started(serial, refusal());
                }
            }
            Step::NotResumed => {
                if let Some((serial, _)) = self.wishes.pop_front() {
                    self.machine.not_resumed(serial, self.resync(String::new()));
                }
            }
            Step::Events(id, by, open) => return self.events(&format!("s{id}"), by, open),
            Step::Passed(id, by) => {
                let (id, seq) = self.ahead(id, by);
                self.machine.passed(&id, seq);
            }
            Step::Reached(id, by) => {
                let (id, seq) = self.ahead(id, by);
                self.machine.reached(self.now, &id, at(seq));
            }
            Step::Resync(id) => self.machine.resync(self.resync(format!("s{id}"))),
            Step::Progress(current) => self.machine.progress(self.now, current),
            Step::SyncFound(seq) => self.judge_sync(Some(seq)),
            Step::SyncFailed => self.judge_sync(None),
            Step::Settle => self.machine.settle_syncs(),
            Step::Wait(millis) => self.wait(Duration::from_millis(millis)),
            Step::Drain(slot) => {
                self.machine.drain(self.now, Duration::from_millis(slot), Duration::from_millis(slot * 2))
            }
            Step::Heard => self.machine.heard(self.now),
        }
        self.hear()
    }

    fn judge_sync(&mut self, found: Option<u64>) {
        match (self.syncs.pop_front(), found) {
            (Some(serial), Some(seq)) => self.machine.sync_found(serial, at(seq)),
            (Some(serial), None) => self.machine.sync_failed(serial, unavailable("no")),
            (None, _) => {}
        }
    }

    fn resync(&self, id: String) -> Resync {
        let reason = ResyncReason::CursorExpired;
        Resync { id, reason, oldest: None, newest: Some(at(self.end)), message: "gone".to_owned() }
    }

    /// A position of the hub, which is never behind what it delivered.
    fn ahead(&mut self, id: usize, by: u64) -> (String, Seq) {
        let id = format!("s{id}");
        let position = self.machine.position(&id).map_or(0, |position| position.seq);
        (id, position + by)
    }

    fn events(&mut self, id: &str, by: u64, open: bool) -> Result<(), TestCaseError> {
        let Some(position) = self.machine.position(id) else {
            prop_assert_eq!(self.machine.events(self.now, id, at(9), false), None);
            return Ok(());
        };
        let cursor = at(position.seq + by);
        let before = self.machine.events(self.now, id, cursor, open);
        prop_assert_eq!(before.is_some(), by > 0 && !self.closed, "a frame goes out when it leads on");
        self.hear()?;
        if let Some(before) = before {
            let seen = self.seen.get_mut(id).expect("frames are for those who were told of their subscription");
            prop_assert_eq!(before, seen.position, "prev is the position before");
            seen.position = cursor;
            self.end = self.end.max(cursor.seq);
        }
        Ok(())
    }

    /// Time passes in the steps that the machine asks for.
    fn wait(&mut self, time: Duration) {
        let until = self.now + time;
        while !self.machine.is_closed() && self.machine.deadline() <= until {
            self.now = self.now.max(self.machine.deadline());
            let due = self.machine.progress_due(self.now);
            self.machine.tick(self.now);
            if due {
                self.machine.progress(self.now, true);
            }
            if self.machine.deadline() <= self.now {
                // Nothing may keep the driver spinning, except subscriptions that wait inside a transaction.
                self.now += Duration::from_millis(1);
            }
        }
        self.now = self.now.max(until);
    }

    fn hear(&mut self) -> Result<(), TestCaseError> {
        while let Some(output) = self.machine.poll() {
            prop_assert!(!self.closed, "after the close: {:?}", output);
            match output {
                Output::Send(message) => self.client(message)?,
                Output::Ping => {}
                Output::Close(_) => {
                    self.closed = true;
                    self.served.clear();
                }
                Output::Authenticate(_) => self.authentications += 1,
                Output::Start { serial, subscribe } => self.wishes.push_back((serial, subscribe.id)),
                Output::Stop(id) => {
                    self.served.remove(&*id);
                }
                Output::Sync { serial, .. } => self.syncs.push_back(serial),
            }
        }
        prop_assert_eq!(self.closed, self.machine.is_closed());
        Ok(())
    }

    fn client(&mut self, message: ServerMessage) -> Result<(), TestCaseError> {
        match message {
            ServerMessage::Welcome(_) => {
                prop_assert!(!std::mem::replace(&mut self.welcomed, true), "welcome comes once");
            }
            ServerMessage::Subscribed { id, cursor, .. } => {
                self.answered(&id)?;
                let seen = Seen { position: cursor.unwrap(), caught_up: false };
                prop_assert!(self.seen.insert(id, seen).is_none(), "subscribed twice");
            }
            ServerMessage::CaughtUp { id, cursor } => {
                let seen = self.seen.get_mut(&id).expect("caught up without a subscription");
                prop_assert!(!std::mem::replace(&mut seen.caught_up, true), "caught_up comes once");
                prop_assert!(cursor >= seen.position, "caught_up goes back");
                seen.position = cursor;
            }
            ServerMessage::Progress { ids, cursor } => {
                for id in ids {
                    let seen = self.seen.get_mut(&id).expect("progress without a subscription");
                    prop_assert!(seen.caught_up && cursor >= seen.position, "progress goes back or comes early");
                    seen.position = cursor;
                }
            }
            ServerMessage::ResyncRequired(resync) => {
                if self.seen.remove(&resync.id).is_none() {
                    self.answered(&resync.id)?;
                }
            }
            ServerMessage::Unsubscribed { id } => {
                // A wish that is taken back before it was answered is answered by this.
                if self.seen.remove(&id).is_none() {
                    self.asked.remove(&id);
                }
            }
            ServerMessage::Synced { cursor, .. } => {
                self.unanswered_syncs -= 1;
                // What a client hears before `synced` covers it, unless nothing was for it: no subscription is behind.
                prop_assert!(cursor.epoch == 1);
            }
            ServerMessage::Error { id: Some(id), .. } => self.answered(&id)?,
            ServerMessage::Error { id: None, code, .. } => {
                let of_sync = matches!(code, ErrorCode::Unavailable | ErrorCode::RateLimited | ErrorCode::BadMessage);
                if of_sync && self.unanswered_syncs > 0 {
                    self.unanswered_syncs -= 1;
                }
            }
            ServerMessage::Pong { t } => prop_assert_eq!(t, Some(json!(7))),
            ServerMessage::Drain { .. } => {}
        }
        Ok(())
    }

    fn answered(&mut self, id: &str) -> Result<(), TestCaseError> {
        let open = self.asked.get_mut(id).filter(|count| **count > 0);
        prop_assert!(open.is_some(), "an answer for {} that nobody asked", id);
        *open.unwrap() -= 1;
        Ok(())
    }

    /// Everything that waits is judged; then nothing may be unanswered.
    fn finish(&mut self) -> Result<(), TestCaseError> {
        while !self.closed && (self.authentications > 0 || !self.wishes.is_empty()) {
            self.act(Step::Grant(1))?;
        }
        if !self.closed && self.welcomed {
            let open: Vec<_> = self.asked.iter().filter(|(_, count)| **count > 0).collect();
            prop_assert!(open.is_empty(), "unanswered: {:?}", open);
        }
        self.machine.heard(self.now);
        // Longer than any sync, shorter than a silence that closes.
        self.wait(Duration::from_secs(6));
        self.hear()?;
        prop_assert!(self.closed || !self.welcomed || self.unanswered_syncs == 0, "{} syncs", self.unanswered_syncs);
        // A silent client ends.
        self.wait(TIMING.heartbeat * 3);
        self.hear()?;
        prop_assert!(self.closed);
        self.act(Step::Subscribe(1))?;
        self.act(Step::Ping)
    }
}

proptest! {
    #[test]
    fn whatever_comes_the_promises_hold(script in prop::collection::vec(step(), 1..150)) {
        let mut bench = Bench::new(Instant::now());
        bench.act(Step::Auth)?;
        bench.act(Step::Grant(0))?;
        for step in script {
            bench.act(step)?;
        }
        bench.finish()?;
    }

    #[test]
    fn before_welcome_nothing_is_served(script in prop::collection::vec(step(), 1..30)) {
        let mut bench = Bench::new(Instant::now());
        for step in script {
            bench.act(step)?;
            prop_assert!(bench.welcomed || bench.seen.is_empty() && bench.wishes.is_empty());
        }
        bench.finish()?;
    }
}

fn open(now: Instant) -> Machine {
    let mut machine = Machine::new(now, TIMING, LIMITS);
    machine.welcome(welcome());
    let _ = machine.poll();
    machine
}

fn outputs(machine: &mut Machine) -> Vec<Output> {
    std::iter::from_fn(|| machine.poll()).collect()
}

#[test]
fn a_burst_is_taken_then_reading_pauses_and_insistence_closes() {
    let start = Instant::now();
    let mut machine = open(start);
    for _ in 0..50 {
        assert_eq!(machine.paused_until(start), None);
        machine.message(start, r#"{"type":"ping"}"#);
    }
    let resume = machine.paused_until(start).expect("the burst is spent");
    assert!(resume > start && resume <= start + Duration::from_millis(101));
    assert_eq!(machine.paused_until(resume + Duration::from_millis(1)), None);

    // A client that sends whenever it is read stays above the rate; after ten seconds of that it is closed.
    let mut now = start;
    while !machine.is_closed() && now < start + Duration::from_secs(60) {
        now = machine.paused_until(now).unwrap_or(now);
        machine.message(now, r#"{"type":"ping"}"#);
    }
    assert!(machine.is_closed() && now >= start + Duration::from_secs(9), "{:?}", now - start);
    assert_eq!(outputs(&mut machine).last(), Some(&Output::Close(CloseCode::RateLimited)));

    // One that keeps to the rate is never closed.
    let mut machine = open(start);
    for index in 0..1_000 {
        machine.message(start + Duration::from_millis(100) * index, r#"{"type":"ping"}"#);
    }
    assert!(!machine.is_closed());
}

#[test]
fn an_id_can_be_used_again_and_the_answer_to_its_old_wish_is_not_taken_for_the_new_one() {
    let now = Instant::now();
    let mut machine = open(now);
    let subscribe = r#"{"type":"subscribe","id":"s","tables":["t"]}"#;
    machine.message(now, subscribe);
    machine.message(now, r#"{"type":"unsubscribe","id":"s"}"#);
    machine.message(now, subscribe);
    assert_eq!(machine.started(now, 1, at(5), None, Source::Live), None);
    assert_eq!(machine.started(now, 2, at(7), None, Source::Live).as_deref(), Some("s"));
    assert_eq!(machine.position("s"), Some(at(7)));
    machine.not_started(1, refusal());
    assert_eq!(machine.position("s"), Some(at(7)));
}

#[test]
fn synced_waits_for_every_subscription_that_runs_or_starts() {
    let now = Instant::now();
    let mut machine = open(now);
    for id in ["a", "b"] {
        machine.message(now, &json!({"type": "subscribe", "id": id, "tables": ["t"]}).to_string());
    }
    machine.started(now, 1, at(1), None, Source::Live);
    machine.message(now, r#"{"type":"sync","tx":"50"}"#);
    let _ = outputs(&mut machine);
    // Wishes and syncs are numbered together: this is the third.
    machine.sync_found(3, at(4));
    machine.events(now, "a", at(4), false);
    machine.settle_syncs();
    assert_eq!(outputs(&mut machine), [], "b is still starting");
    machine.started(now, 2, at(2), None, Source::Live);
    machine.settle_syncs();
    assert!(outputs(&mut machine).iter().all(|output| !matches!(output, Output::Send(ServerMessage::Synced { .. }))));
    machine.passed("b", 4);
    machine.settle_syncs();
    let synced = ServerMessage::Synced { tx: "50".to_owned(), cursor: at(4) };
    assert_eq!(outputs(&mut machine), [Output::Send(synced)]);
}

/// A live subscription that has caught up at 10 while the log stands there.
fn caught_up_at_ten() -> (Machine, Instant) {
    let now = Instant::now();
    let mut machine = open(now);
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
