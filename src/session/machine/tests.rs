//! Random scripts against the machine's promises, judged by what a client would see.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use serde_json::json;
use uuid::Uuid;

use super::*;
use crate::protocol::message::{ResyncReason, Window};

mod examples;

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
            ServerMessage::Error { id: None, tx, .. } => {
                if tx.is_some() {
                    prop_assert!(self.unanswered_syncs > 0, "an answer to a sync that nobody asked for");
                    self.unanswered_syncs -= 1;
                }
            }
            ServerMessage::Pong { t } => prop_assert_eq!(t.as_ref().map(|t| t.text()), Some("7")),
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
