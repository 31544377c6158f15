//! `cargo bench`: the pure rooms on the hot path. Each figure is for one event unless its name says otherwise.
//!
//! These machines are noisy: compare runs made side by side, and ratios rather than times.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tidewire::auth::scope::{ColumnMask, OpSet};
use tidewire::cursor::{EpochStart, Epochs};
use tidewire::event::row::Row;
use tidewire::event::{Event, NewEvent, Operation};
use tidewire::feed::chunk::{Header, decode_events};
use tidewire::feed::seal::{FeedKey, Sealer};
use tidewire::filter::{Column, ColumnType, Filter};
use tidewire::hub::group::{Plans, Signal};
use tidewire::hub::plan::TablePlan;
use tidewire::hub::{Hub, HubOptions, Pull};
use tidewire::telemetry::metrics::Metrics;
use uuid::Uuid;

const BATCH: u64 = 1_000;

fn new_event<'a>(after: &'a str, key: &'a str) -> NewEvent<'a> {
    NewEvent {
        event_id: Uuid::from_u128(7),
        table: "public.orders",
        operation: Operation::Insert,
        key: Some(key),
        old_key: None,
        before: None,
        after: Some(after),
        event_type: None,
        headers: None,
        xid: 7_482,
        created_at: chrono::DateTime::UNIX_EPOCH,
        omitted: false,
    }
}

fn events(first: u64) -> Vec<Event> {
    (first..first + BATCH)
        .map(|seq| {
            let after = format!(
                r#"{{"id":{seq},"customer":"Ada Lovelace","status":"{}","amount":{}.42,"note":"leave at the door, please","at":"2026-11-20T10:00:00.123456+00:00"}}"#,
                if seq % 2 == 0 { "paid" } else { "new" },
                seq % 977
            );
            let key = format!(r#"{{"id":{seq}}}"#);
            let mut body = String::new();
            new_event(&after, &key).compose(&mut body);
            Event {
                seq,
                id: Uuid::from_u128(u128::from(seq).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_0c94)),
                xid: 7_000 + seq,
                operation: Operation::Insert,
                tx_end: true,
                omitted: false,
                table: "public.orders".into(),
                body: body.into(),
            }
        })
        .collect()
}

fn feed(criterion: &mut Criterion) {
    let key = FeedKey::draw();
    let batch = events(1);
    let mut group = criterion.benchmark_group("feed");
    group.throughput(Throughput::Elements(BATCH));
    let mut sealer = Sealer::new(&key, 1, 1).expect("32 bytes");
    group.bench_function("seal a batch", |bencher| bencher.iter(|| sealer.events(black_box(&batch)).expect("seals")));
    let chunks = sealer.events(&batch).expect("seals");
    let opener = FeedKey::new(&key).expect("32 bytes");
    let name: Arc<str> = "public.orders".into();
    group.bench_function("open a batch", |bencher| {
        bencher.iter(|| {
            for chunk in &chunks {
                let (header, text, body) = Header::parse(chunk).expect("a chunk");
                let body = opener.open(&header, text, body).expect("opens");
                black_box(decode_events(&header, &body, |_| Arc::clone(&name)).expect("decodes"));
            }
        });
    });
    group.finish();
}

fn filters(criterion: &mut Criterion) {
    let columns = [
        Column::new("id", ColumnType::Int8),
        Column::new("status", ColumnType::Text),
        Column::new("amount", ColumnType::Numeric),
    ];
    let row = Row::parse(r#"{"id":42,"customer":"Ada","status":"paid","amount":12.34}"#).expect("a row");
    let mut group = criterion.benchmark_group("filter");
    for text in ["id = 42", "status = 'paid'", "amount > 10 AND status IN ('paid', 'shipped')"] {
        let filter = Filter::compile(text, &columns).expect("compiles");
        group.bench_function(text, |bencher| bencher.iter(|| black_box(filter.eval(black_box(&row)))));
    }
    group.finish();
}

fn fan_out(criterion: &mut Criterion) {
    const SUBSCRIBERS: u64 = 500;
    let mut group = criterion.benchmark_group("hub");
    group.throughput(Throughput::Elements(BATCH * SUBSCRIBERS));
    group.bench_function("append a batch and pull it 500 times", |bencher| {
        let options = HubOptions {
            ring_window: Duration::from_secs(300),
            ring_bytes: 64 << 20,
            frame_bytes: 1 << 20,
            frames_bytes: 64 << 20,
        };
        let hub = Arc::new(Hub::new(options, Arc::new(Metrics::new().expect("metrics"))));
        hub.restart(0, None, None, Epochs::new(vec![EpochStart { epoch: 1, start_seq: 0 }]));
        hub.hold(false);
        let plan = TablePlan {
            ops: OpSet::ALL,
            filter: None,
            condition: None,
            mask: ColumnMask::All,
            columns: None,
            basis: None,
        };
        let taps: Vec<_> = (0..SUBSCRIBERS)
            .map(|_| {
                let plans = || Plans::Exact([("public.orders".into(), Arc::new(plan.clone()))].into());
                hub.join("all", &Arc::new(Signal::default()), plans)
            })
            .collect();
        let (mut next, mut passed) = (1, 0);
        bencher.iter_batched(
            || {
                let batch = events(next);
                next += BATCH;
                batch
            },
            |batch| {
                hub.append(&batch, Instant::now()).expect("contiguous");
                let end = passed + BATCH;
                for tap in &taps {
                    let mut at = passed;
                    while at < end {
                        match tap.pull(at) {
                            Pull::Frame(frame) => {
                                at = frame.through;
                                black_box(frame.message("all", &frame.cursor));
                            }
                            other => panic!("not a frame: {other:?}"),
                        }
                    }
                }
                passed = end;
            },
            criterion::BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(rooms, feed, filters, fan_out);
criterion_main!(rooms);
