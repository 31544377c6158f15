//! The machine, by script and by chance.

use std::cell::RefCell;
use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::client::frame;

const SECOND: Duration = Duration::from_secs(1);

fn cursor(seq: u64) -> Cursor {
    Cursor { epoch: 1, seq, check: 0 }
}

fn welcome() -> String {
    r#"{"type":"welcome","version":1,"connection":"c-1","node":"n1","heartbeat_ms":30000,"progress_ms":5000,"window":{"memory_ms":1,"history_ms":2},"limits":{"message_bytes":65536,"subscriptions":128,"filter_bytes":4096,"messages_per_s":20,"frame_bytes":1048576}}"#.into()
}

fn subscribed(seq: u64) -> String {
    format!(r#"{{"type":"subscribed","id":"a","cursor":"{}","recovered":true,"source":"memory"}}"#, cursor(seq))
}

fn caught_up(seq: u64) -> String {
    format!(r#"{{"type":"caught_up","id":"a","cursor":"{}"}}"#, cursor(seq))
}

fn progress(seq: u64) -> String {
    format!(r#"{{"type":"progress","ids":["a"],"cursor":"{}"}}"#, cursor(seq))
}

fn events(prev: u64, last: u64) -> String {
    format!(
        r#"{{"type":"events","id":"a","prev":"{}","cursor":"{}","events":[{{"seq":{last}}}]}}"#,
        cursor(prev),
        cursor(last)
    )
}

/// A machine with a script's convenience; the driver's part of handing out is played by `handed`.
struct Script {
    machine: Machine,
    now: Instant,
    handed: RefCell<HashMap<String, Cursor>>,
}

impl Script {
    fn new(attempts: Option<u32>) -> Self {
        Self { machine: Machine::new(attempts, FIRST_ATTEMPTS), now: Instant::now(), handed: RefCell::default() }
    }

    /// Connected, with the subscription `a` that has caught up at `seq`.
    fn live(seq: u64) -> Self {
        let mut script = Self::new(Some(3));
        script.open();
        script.machine.subscribe(request("a")).unwrap();
        script.say(&subscribed(seq));
        script.say(&caught_up(seq));
        script
    }

    fn open(&mut self) -> Vec<Action> {
        self.machine.connected(self.now);
        self.say(&welcome())
    }

    fn say(&mut self, text: &str) -> Vec<Action> {
        self.machine.message(frame::read(&text.into()).unwrap(), self.now);
        let actions = self.take_actions();
        for action in &actions {
            let Action::Deliver(id, delivery) = action else { continue };
            let position = match delivery {
                Delivery::Started { cursor, .. } | Delivery::CaughtUp(cursor) | Delivery::Progress(cursor) => *cursor,
                Delivery::Frame(frame) => frame.cursor(),
                _ => continue,
            };
            self.handed.borrow_mut().insert(id.to_string(), position);
        }
        actions
    }

    fn lose(&mut self, cause: Disconnect, dice: f64) -> (Next, Vec<Action>) {
        let next = self.machine.lost(cause, self.now, dice, &|id| self.handed.borrow().get(id).copied());
        (next, self.take_actions())
    }

    fn take_actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.machine.next_action()).collect()
    }

    fn pass(&mut self, time: Duration) -> Vec<Action> {
        self.now += time;
        self.machine.tick(self.now);
        self.take_actions()
    }
}

fn request(id: &str) -> Subscribe {
    Subscribe { id: id.into(), tables: vec!["t".into()], ops: None, filter: None, columns: None, from: WireFrom::Now }
}

fn network() -> Disconnect {
    Disconnect::Network("reset".into())
}

fn closed(code: u16) -> Disconnect {
    Disconnect::Closed { code, reason: "x".into(), message: String::new() }
}

fn asked(actions: &[Action]) -> Vec<WireFrom> {
    let from = |action: &Action| match action {
        Action::Send(ClientMessage::Subscribe(subscribe)) => Some(subscribe.from.clone()),
        _ => None,
    };
    actions.iter().filter_map(from).collect()
}

#[test]
fn a_subscription_is_asked_for_when_the_server_is_there() {
    let mut script = Script::new(None);
    script.machine.subscribe(request("a")).unwrap();
    assert!(script.take_actions().is_empty());
    assert_eq!(asked(&script.open()), [WireFrom::Now]);
    let started = script.say(&subscribed(5));
    assert!(matches!(started[..], [Action::Deliver(_, Delivery::Started { cursor: at, .. })] if at == cursor(5)));
}

#[test]
fn a_lost_connection_is_resumed_after_what_was_handed_out() {
    let mut script = Script::live(5);
    script.say(&events(5, 7));
    script.handed.borrow_mut().insert("a".into(), cursor(6));
    let (next, actions) = script.lose(network(), 1.0);
    assert_eq!(next, Next::ConnectAfter(BASE_BACKOFF));
    assert!(matches!(actions[..], [Action::Deliver(_, Delivery::Disconnected { .. })]));
    script.now += SECOND;
    assert_eq!(asked(&script.open()), [WireFrom::Cursor(cursor(6).to_string())]);
    let actions = script.say(&subscribed(6));
    let [Action::Deliver(_, Delivery::Resumed(resumed))] = &actions[..] else { panic!("{actions:?}") };
    let want = Resumed { from: cursor(6), source: Source::Memory, attempt: 1, node: "n1".into(), away: SECOND };
    assert_eq!(*resumed, want);
}

#[test]
fn a_frame_that_does_not_follow_on_the_position_ends_the_connection() {
    let mut script = Script::live(5);
    let actions = script.say(&events(6, 7));
    assert!(matches!(actions[..], [Action::Leave(Disconnect::Mismatch { .. })]));
    assert_eq!(script.handed.borrow()["a"], cursor(5));
}

#[test]
fn a_position_never_goes_back() {
    for text in [events(5, 4), progress(4), caught_up(4)] {
        let actions = Script::live(5).say(&text);
        assert!(matches!(actions[..], [Action::Leave(Disconnect::Mismatch { .. })]), "{text}");
    }
}

#[test]
fn a_resume_that_begins_elsewhere_is_not_believed() {
    let mut script = Script::live(5);
    script.lose(network(), 0.0);
    script.open();
    assert!(matches!(script.say(&subscribed(6))[..], [Action::Leave(Disconnect::Mismatch { .. })]));
}

#[test]
fn progress_moves_the_position() {
    let mut script = Script::live(5);
    script.say(&progress(9));
    assert!(matches!(script.say(&events(9, 10))[..], [Action::Deliver(_, Delivery::Frame(_))]));
}

#[test]
fn silence_is_death_sooner_when_everything_is_live() {
    let mut script = Script::live(5);
    assert!(script.pass(15 * SECOND - Duration::from_millis(1)).is_empty());
    assert!(matches!(script.pass(Duration::from_millis(1))[..], [Action::Leave(Disconnect::Silence(_))]));

    let mut script = Script::live(5);
    script.machine.subscribe(request("b")).unwrap();
    script.take_actions();
    assert!(script.pass(59 * SECOND).is_empty());
    assert!(matches!(script.pass(SECOND)[..], [Action::Leave(Disconnect::Silence(_))]));
}

#[test]
fn a_connection_that_is_not_read_is_not_taken_for_dead() {
    let mut script = Script::live(5);
    script.machine.pause(true, script.now);
    assert_eq!(script.machine.deadline(), None);
    assert!(script.pass(1000 * SECOND).is_empty());
    script.machine.pause(false, script.now);
    assert_eq!(script.machine.deadline(), Some(script.now + 15 * SECOND));
}

#[test]
fn a_server_that_never_welcomes_is_left() {
    let mut script = Script::new(None);
    script.machine.connected(script.now);
    assert!(matches!(script.pass(WELCOME_TIMEOUT)[..], [Action::Leave(Disconnect::NoWelcome(_))]));
}

#[test]
fn a_draining_node_is_left_at_the_slot_and_the_next_one_is_tried_at_once() {
    let mut script = Script::live(5);
    script.say(r#"{"type":"drain","reconnect_after_ms":700,"deadline_ms":10000}"#);
    assert!(script.pass(Duration::from_millis(699)).is_empty());
    assert!(matches!(script.pass(Duration::from_millis(1))[..], [Action::Leave(Disconnect::Drain)]));
    assert_eq!(script.lose(Disconnect::Drain, 1.0).0, Next::ConnectAfter(Duration::ZERO));
}

#[test]
fn the_servers_own_close_at_the_slot_waits_no_further() {
    let mut script = Script::live(5);
    script.say(r#"{"type":"drain","reconnect_after_ms":700,"deadline_ms":10000}"#);
    assert_eq!(script.lose(closed(1012), 1.0).0, Next::ConnectAfter(Duration::ZERO));
}

#[test]
fn waits_double_up_to_ten_seconds_and_end_at_the_limit() {
    let mut script = Script::live(5);
    script.machine.attempts = Some(8);
    let waits: Vec<_> = (0..8).map(|_| script.lose(network(), 1.0).0).collect();
    let want = [500, 1000, 2000, 4000, 8000, 10_000, 10_000, 10_000];
    assert_eq!(waits, want.map(|ms| Next::ConnectAfter(Duration::from_millis(ms))));
    let (next, actions) = script.lose(network(), 1.0);
    assert_eq!(next, Next::Stop);
    assert!(matches!(&actions[..], [Action::GiveUp(ClientError::GaveUp { attempts: 8, .. })]));
}

#[test]
fn only_progress_resets_the_count_of_attempts() {
    let mut script = Script::live(5);
    for _ in 0..3 {
        assert!(matches!(script.lose(network(), 0.0).0, Next::ConnectAfter(_)));
        script.open();
        script.say(&subscribed(5));
    }
    assert_eq!(script.lose(network(), 0.0).0, Next::Stop);

    let mut script = Script::live(5);
    for _ in 0..10 {
        assert!(matches!(script.lose(network(), 0.0).0, Next::ConnectAfter(_)));
        script.open();
        script.say(&subscribed(5));
        script.say(&caught_up(5));
    }
}

#[test]
fn a_client_that_was_never_connected_gives_up_early() {
    let mut script = Script::new(None);
    for _ in 0..FIRST_ATTEMPTS {
        assert!(matches!(script.lose(network(), 0.0).0, Next::ConnectAfter(_)));
    }
    assert_eq!(script.lose(network(), 0.0).0, Next::Stop);
}

#[test]
fn the_servers_wish_to_wait_is_granted_within_reason() {
    let http = |seconds| Disconnect::Http { status: 503, message: String::new(), retry_after: Some(seconds * SECOND) };
    assert_eq!(Script::live(5).lose(http(7), 0.0).0, Next::ConnectAfter(7 * SECOND));
    assert_eq!(Script::live(5).lose(http(86_400), 0.0).0, Next::ConnectAfter(MAX_RETRY_AFTER));
}

/// Found in review: a key's limit of connections passes with time, and its error says so, but the close said stop.
#[test]
fn a_client_over_its_keys_limit_waits_as_asked_and_comes_back() {
    let mut script = Script::live(5);
    script.say(r#"{"type":"error","code":"rate_limited","message":"full","retry":"backoff","retry_after_ms":5000}"#);
    assert_eq!(script.lose(closed(4429), 0.0).0, Next::ConnectAfter(5 * SECOND));
    // What the error asked for counts once.
    assert!(matches!(script.lose(closed(4429), 0.0).0, Next::ConnectAfter(wait) if wait < 5 * SECOND));
}

#[test]
fn a_close_that_says_stop_is_final_and_its_error_tells_why() {
    let mut script = Script::live(5);
    script.say(r#"{"type":"error","code":"unauthenticated","message":"the key was revoked","retry":"never"}"#);
    let (next, actions) = script.lose(closed(4440), 0.0);
    assert_eq!(next, Next::Stop);
    let [Action::GiveUp(error)] = &actions[..] else { panic!("{actions:?}") };
    assert!(error.to_string().contains("the key was revoked"), "{error}");
}

#[test]
fn a_resync_is_the_last_word_of_a_subscription() {
    let mut script = Script::live(5);
    let text =
        r#"{"type":"resync_required","id":"a","reason":"table_dropped","oldest":null,"newest":null,"message":"m"}"#;
    assert!(matches!(script.say(text)[..], [Action::Deliver(_, Delivery::Resync(_))]));
    assert!(script.say(&events(5, 6)).is_empty());
    script.lose(network(), 0.0);
    assert!(asked(&script.open()).is_empty());
}

#[test]
fn a_refusal_for_now_is_asked_again_after_its_wait_and_a_refusal_for_good_is_told() {
    let mut script = Script::new(None);
    script.open();
    script.machine.subscribe(request("a")).unwrap();
    script.take_actions();
    let away = r#"{"type":"error","id":"a","code":"unavailable","message":"m","retry":"backoff","retry_after_ms":300}"#;
    assert!(script.say(away).is_empty());
    assert_eq!(script.machine.deadline(), Some(script.now + Duration::from_millis(300)));
    assert_eq!(asked(&script.pass(Duration::from_millis(300))), [WireFrom::Now]);
    let never = r#"{"type":"error","id":"a","code":"bad_filter","message":"m","retry":"never"}"#;
    let actions = script.say(never);
    assert!(matches!(&actions[..], [Action::Deliver(_, Delivery::End(ClientError::Refused(error)))]
        if error.code == ErrorCode::BadFilter));
}

#[test]
fn a_subscription_that_was_dropped_hears_nothing_and_is_not_resumed() {
    let mut script = Script::live(5);
    script.machine.unsubscribe("a");
    assert!(matches!(script.take_actions()[..], [Action::Send(ClientMessage::Unsubscribe { .. })]));
    assert!(script.say(&events(5, 6)).is_empty());
    script.lose(network(), 0.0);
    assert!(asked(&script.open()).is_empty());
    assert!(script.machine.subscribe(request("a")).is_ok());
}

/// Found in review: a newer subscription was taken for the older one, or forgotten, and whoever waited for it waited for ever.
#[test]
fn an_id_is_free_again_only_when_its_farewell_has_come() {
    let mut script = Script::live(5);
    script.machine.unsubscribe("a");
    let resync =
        r#"{"type":"resync_required","id":"a","reason":"too_far_behind","oldest":null,"newest":null,"message":"m"}"#;
    assert!(!script.say(resync).iter().any(|action| matches!(action, Action::Deliver(..))));
    assert!(script.machine.subscribe(request("a")).is_err());
    script.say(r#"{"type":"unsubscribed","id":"a"}"#);
    script.machine.subscribe(request("a")).unwrap();
    script.take_actions();
    assert!(matches!(&script.say(&subscribed(9))[..], [Action::Deliver(_, Delivery::Started { .. })]));
}

/// Found in review: ten refusals of one node ended a subscription that the next would have served.
#[test]
fn refusals_are_counted_on_one_connection() {
    let away = r#"{"type":"error","id":"a","code":"unavailable","message":"m","retry":"backoff","retry_after_ms":300}"#;
    let mut script = Script::new(None);
    script.open();
    script.machine.subscribe(request("a")).unwrap();
    script.take_actions();
    for _ in 0..4 {
        for _ in 0..MAX_SUBSCRIBE_RETRIES - 1 {
            assert!(script.say(away).is_empty());
            script.pass(Duration::from_millis(300));
        }
        script.lose(network(), 0.0);
        script.open();
    }
}

#[test]
fn a_message_too_large_for_the_server_is_not_sent() {
    let mut script = Script::live(5);
    let large = Subscribe { filter: Some("x".repeat(70_000)), ..request("b") };
    script.machine.subscribe(large).unwrap();
    let actions = script.take_actions();
    assert!(matches!(&actions[..], [Action::Deliver(_, Delivery::End(ClientError::Refused(error)))]
        if error.code == ErrorCode::TooLarge));
}

#[test]
fn a_sync_is_asked_again_on_the_next_connection() {
    let mut script = Script::live(5);
    script.machine.sync(1, "70".into(), SECOND, script.now);
    assert!(matches!(script.take_actions()[..], [Action::Send(ClientMessage::Sync { .. })]));
    script.lose(network(), 0.0);
    let actions = script.open();
    assert!(matches!(
        actions[..],
        [Action::Send(ClientMessage::Subscribe(_)), Action::Send(ClientMessage::Sync { .. })]
    ));
    let answer = script.say(&format!(r#"{{"type":"synced","tx":"70","cursor":"{}"}}"#, cursor(8)));
    assert!(matches!(answer[..], [Action::Answer(1, Ok(at))] if at == cursor(8)));
}

#[test]
fn another_version_is_refused() {
    let mut script = Script::new(None);
    script.machine.connected(script.now);
    let actions = script.say(&welcome().replace(r#""version":1"#, r#""version":9"#));
    assert!(matches!(actions[..], [Action::GiveUp(ClientError::Version(9))]));
}

proptest! {
    /// Whatever a server says in whatever order: what is delivered is one chain of positions.
    #[test]
    fn what_is_delivered_is_one_unbroken_chain(script in proptest::collection::vec((0u8..7, 0u64..6, 0u64..6), 0..60)) {
        let mut run = Script::live(1);
        let mut at = cursor(1);
        for (what, a, b) in script {
            let actions = match what {
                0 | 1 => run.say(&events(a, b)),
                2 => run.say(&progress(a)),
                3 => run.say(&caught_up(a)),
                4 => run.say(&subscribed(a)),
                5 => { run.lose(network(), 0.0); run.machine.backoff.reset(); run.open() }
                _ => run.say(r#"{"type":"error","id":"a","code":"unavailable","message":"m","retry":"now"}"#),
            };
            for action in actions {
                match action {
                    Action::Deliver(_, Delivery::Frame(frame)) => {
                        prop_assert_eq!(frame.prev(), Some(at));
                        prop_assert!(frame.cursor() >= at);
                        at = frame.cursor();
                    }
                    Action::Deliver(_, Delivery::CaughtUp(cursor) | Delivery::Progress(cursor)) => {
                        prop_assert!(cursor >= at);
                        at = cursor;
                    }
                    Action::Deliver(_, Delivery::Resumed(resumed)) => prop_assert_eq!(resumed.from, at),
                    Action::Leave(_) => { run.lose(network(), 0.0); run.machine.backoff.reset(); run.open(); }
                    _ => {}
                }
            }
        }
    }
}
