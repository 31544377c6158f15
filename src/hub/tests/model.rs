//! The pull model against a naive one: whatever comes in, in whatever pieces, whoever joins where, each sees exactly what
//! is for it, once and in order, in frames that end with transactions unless they say otherwise, and is woken for it.

use std::sync::atomic::AtomicBool;
use std::task::{Wake, Waker};

use proptest::prelude::*;

use super::*;
use crate::hub::plan::Opened;

/// What a subscription sees of one kind: all of a table, what matches, what matches a dear condition (most, or nothing), or
/// both tables without a column.
fn plans_of(kind: usize) -> Plans {
    let plain =
        TablePlan { ops: OpSet::ALL, filter: None, condition: None, mask: ColumnMask::All, columns: None, basis: None };
    let plan = match kind {
        0 => plain,
        1 => {
            let filter = Filter::compile("a = 1", &[Column::new("a", ColumnType::Int4)]).unwrap();
            TablePlan { filter: Some(filter), ..plain }
        }
        // Dear: for a row of some kilobytes more than the follower looks at, for many more than a session's task does.
        2 | 3 => {
            let terms = "b LIKE '%_y_y_%' OR ".repeat(30);
            let wanted = if kind == 2 { "b LIKE '%x%'" } else { "b LIKE '%_z'" };
            let columns = [Column::new("a", ColumnType::Int4), Column::new("b", ColumnType::Text)];
            let filter = Filter::compile(&format!("a < 2 AND ({terms}{wanted})"), &columns).unwrap();
            TablePlan { filter: Some(filter), ..plain }
        }
        _ => {
            let hidden = ColumnMask::AllBut(Arc::new(["b".into()].into_iter().collect()));
            let both = Arc::new(TablePlan { mask: hidden, ..plain });
            return Plans::Exact(HashMap::from([("public.t".into(), Arc::clone(&both)), ("public.u".into(), both)]));
        }
    };
    Plans::Exact(HashMap::from([("public.t".into(), Arc::new(plan))]))
}

/// A row of the log.
fn row(seq: Seq, xid: u64, table: &str, a: u8, size: usize, tx_end: bool) -> Event {
    let body = format!(r#"{{"after":{{"a":{a},"b":"{}"}}}}"#, "x".repeat(size));
    let id = Uuid::from_u128(u128::from(seq));
    let operation = Operation::Insert;
    Event { seq, id, xid, operation, tx_end, omitted: false, table: table.into(), body: body.into() }
}

#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// One subscriber, and what it must still get.
struct Reader {
    tap: Tap,
    plans: Plans,
    passed: Seq,
    signal: Arc<Signal>,
    woken: Arc<Flag>,
    idle: bool,
    got: usize,
    looks: usize,
}

impl Reader {
    fn join(hub: &Arc<Hub>, kind: usize, after: Seq) -> Self {
        let (signal, woken) = (Arc::<Signal>::default(), Arc::<Flag>::default());
        let tap = hub.join(&format!("kind {kind}"), &signal, || plans_of(kind));
        Self { tap, plans: plans_of(kind), passed: after, signal, woken, idle: false, got: 0, looks: 0 }
    }

    /// What of the log after its position up to `through` it must be shown, each as it stands in a frame.
    fn wanted(&self, log: &[Event], through: Seq) -> Vec<Vec<u8>> {
        let events = log.iter().filter(|event| event.seq > self.passed && event.seq <= through);
        let shown = events.filter_map(|event| {
            let mut out = Vec::new();
            self.plans.of(&event.table)?.render(&Opened::new(event), &mut out).then_some(out)
        });
        shown.collect()
    }

    /// Pulls once, as a session does; false when there is nothing.
    fn pull(&mut self, hub: &Arc<Hub>, log: &[Event], frame_bytes: usize) -> Result<bool, TestCaseError> {
        self.signal.register(&Waker::from(Arc::clone(&self.woken)));
        let edge = hub.edge();
        let pull = match self.tap.pull(self.passed) {
            Pull::Log => {
                // The log is there; the ring is not.
                let rest = log.iter().filter(|event| event.seq > self.passed && event.seq <= edge.deliverable.seq);
                let whole = Whole::prefix(rest, 7, frame_bytes);
                let place = (edge.generation, self.passed);
                hub.frame_of(self.tap.group(), whole, place, Origin::Ring).unwrap_or(Pull::Idle(edge))
            }
            pull => pull,
        };
        let pull = match pull {
            Pull::Dear(look) => {
                self.looks += 1;
                // Now and then the answer comes too late, as when the connection has just been closed.
                if self.looks % 7 == 3 {
                    return Ok(true);
                }
                look.at_once()
            }
            pull => pull,
        };
        self.idle = matches!(pull, Pull::Idle(_));
        match pull {
            Pull::Frame(frame) => {
                let wanted = self.wanted(log, frame.through);
                prop_assert_eq!(
                    &frame.body[..],
                    &wanted.join(&b','),
                    "after {} through {}",
                    self.passed,
                    frame.through
                );
                prop_assert_eq!((frame.count, frame.cursor.seq), (wanted.len(), frame.through));
                prop_assert!(frame.first > self.passed && frame.count > 0);
                let last = &log[usize::try_from(frame.through).unwrap() - 1];
                prop_assert!(frame.cursor.matches(last.id));
                prop_assert!(frame.open || last.tx_end, "a frame ends at {} inside a transaction", last.seq);
                let size: usize = log.iter().filter(|event| event.xid == last.xid).map(|event| event.body.len()).sum();
                // Bodies; the events around them make a frame larger.
                prop_assert!(last.tx_end || size + 300 * 20 > frame_bytes, "only what is larger than a frame is cut");
                prop_assert!(frame.count == 1 || frame.body.len() <= frame_bytes, "a frame keeps to its limit");
                self.got += frame.count;
                self.passed = frame.through;
            }
            Pull::Nothing(cursor) => {
                prop_assert!(cursor.seq > self.passed);
                prop_assert_eq!(self.wanted(log, cursor.seq).len(), 0);
                self.passed = cursor.seq;
            }
            Pull::Idle(edge) => {
                prop_assert_eq!(self.wanted(log, edge.boundary.seq).len(), 0, "idle at {}: {:?}", self.passed, edge);
                self.passed = self.passed.max(edge.boundary.seq);
                return Ok(false);
            }
            other => prop_assert!(false, "unexpected: {:?}", other),
        }
        Ok(true)
    }

    /// Whoever found nothing has been woken if there is something by now.
    fn check_woken(&self, hub: &Hub, log: &[Event]) -> Result<(), TestCaseError> {
        let waits = self.idle && !self.woken.0.load(Ordering::SeqCst);
        let due = self.wanted(log, hub.edge().boundary.seq).len();
        prop_assert!(!waits || due == 0, "{due} events at {:?} for one who sleeps at {}", hub.edge(), self.passed);
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A transaction of rows (table, a, size), handed over in pieces of this many.
    Transaction {
        rows: Vec<(bool, u8, usize)>,
        piece: usize,
    },
    Join {
        kind: usize,
        back: u64,
    },
    Pull {
        reader: usize,
        times: usize,
    },
    Leave {
        reader: usize,
    },
    Wait {
        millis: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![8 => 0usize..100, 2 => 200usize..2_000, 1 => 20_000usize..40_000];
    prop_oneof![
        6 => (prop::collection::vec((any::<bool>(), 0u8..3, size), 1..20), 1usize..12)
            .prop_map(|(rows, piece)| Step::Transaction { rows, piece }),
        3 => (0usize..5, 0u64..80).prop_map(|(kind, back)| Step::Join { kind, back }),
        6 => (0usize..10, 1usize..5).prop_map(|(reader, times)| Step::Pull { reader, times }),
        1 => (0usize..10).prop_map(|reader| Step::Leave { reader }),
        1 => (0u64..400_000).prop_map(|millis| Step::Wait { millis }),
    ]
}

pub(super) fn hub_of(ring_bytes: usize, frame_bytes: usize, frames_bytes: usize) -> Arc<Hub> {
    let options = HubOptions { ring_window: Duration::from_secs(300), ring_bytes, frame_bytes, frames_bytes };
    let hub = Arc::new(Hub::new(options, Arc::new(Metrics::new().unwrap())));
    hub.restart(0, None, None, Epochs::new(vec![crate::cursor::EpochStart { epoch: 1, start_seq: 0 }]));
    hub.hold(false);
    hub
}

proptest! {
    // Each is long; PROPTEST_CASES makes them more.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 4))]

    #[test]
    fn each_sees_what_is_for_it_once_in_order_in_whole_transactions_and_is_woken(
        ring_bytes in prop_oneof![500usize..5_000, 50_000usize..500_000, Just(8usize << 20)],
        frame_bytes in prop_oneof![300usize..3_000, 10_000usize..100_000, Just(1usize << 20)],
        frames_bytes in prop_oneof![2_000usize..50_000, Just(64usize << 20)],
        script in prop::collection::vec(step(), 1..40),
    ) {
        let hub = hub_of(ring_bytes, frame_bytes, frames_bytes);
        let (mut log, mut readers): (Vec<Event>, Vec<Reader>) = (Vec::new(), Vec::new());
        let (mut now, mut xid) = (Instant::now(), 100);
        for step in script {
            match step {
                Step::Transaction { rows, piece } => {
                    xid += 1;
                    let count = rows.len();
                    let events: Vec<Event> = rows.into_iter().enumerate().map(|(index, (t, a, size))| {
                        let table = if t { "public.t" } else { "public.u" };
                        row(log.len() as u64 + 1 + index as u64, xid, table, a, size, index + 1 == count)
                    }).collect();
                    for piece in events.chunks(piece) {
                        log.extend_from_slice(piece);
                        hub.append(piece, now).unwrap();
                        for reader in &readers {
                            reader.check_woken(&hub, &log)?;
                        }
                        // Somebody looks also between the pieces.
                        if let Some(reader) = readers.first_mut() {
                            reader.pull(&hub, &log, frame_bytes)?;
                        }
                    }
                }
                Step::Join { kind, back } => {
                    let after = hub.edge().deliverable.seq.saturating_sub(back);
                    readers.push(Reader::join(&hub, kind, after));
                }
                Step::Pull { reader, times } if reader < readers.len() => for _ in 0..times {
                    readers[reader].pull(&hub, &log, frame_bytes)?;
                },
                Step::Leave { reader } if reader < readers.len() => drop(readers.swap_remove(reader)),
                Step::Wait { millis } => {
                    now += Duration::from_millis(millis);
                    hub.tick(now);
                }
                Step::Pull { .. } | Step::Leave { .. } => {}
            }
        }
        prop_assert_eq!(hub.edge().boundary.seq, log.len() as u64, "everything is whole, so everything is delivered");
        for reader in &mut readers {
            for _ in 0..=3 * log.len() + 3 {
                if !reader.pull(&hub, &log, frame_bytes)? {
                    break;
                }
            }
            prop_assert!(reader.idle && reader.passed == log.len() as u64);
        }
    }
}

#[test]
fn what_comes_at_once_may_be_larger_than_the_ring() {
    let hub = hub_of(1 << 20, FRAME_BYTES, 64 << 20);
    let log: Vec<Event> = (1..=300).map(|seq| row(seq, seq, "public.t", 1, 10_000, true)).collect();
    let mut reader = Reader::join(&hub, 0, 0);
    hub.append(&log[..200], Instant::now()).unwrap();
    hub.append(&log[200..], Instant::now()).unwrap();
    assert_eq!(hub.edge().boundary.seq, 300);
    while reader.pull(&hub, &log, FRAME_BYTES).unwrap() {}
    assert_eq!(reader.got, 300);
}
