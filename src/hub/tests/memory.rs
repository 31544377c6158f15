//! What looks hold in memory, and when they end.

use std::cell::Cell;
use std::future::Future as _;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Waker};

use super::*;
use crate::hub::look::{SEATS, Worked};

/// Rows that the ring of these tests is too small for.
const ROWS: Seq = 12;

/// Found in review: the events of a look were held until its turn came, one megabyte or a whole row for each connection.
#[tokio::test]
async fn looks_that_wait_hold_no_events_and_find_them_once_it_is_their_turn() {
    let hub = hub();
    let threads = Arc::clone(&hub.lookers).acquire_many_owned(u32::try_from(hub.lookers.available_permits()).unwrap());
    let threads = threads.await.unwrap();
    let taps: Vec<Tap> =
        (0..ROWS).map(|number| hub.join(&format!("dear {number}"), &Arc::default(), dear_plans)).collect();
    let (mut bodies, mut looks) = (Vec::new(), Vec::new());
    // Each is another row's, which leaves the ring before the next one comes: one row fits.
    for (seq, tap) in (1..).zip(&taps) {
        let row = large(seq);
        bodies.push(row.body.clone());
        hub.append(&[row], Instant::now()).unwrap();
        let Pull::Dear(look) = tap.pull(seq - 1) else { panic!("not dear") };
        let mut look = Box::pin(look.run(Arc::new(AtomicBool::new(false))));
        assert!(look.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending(), "the threads are taken");
        looks.push(look);
    }
    assert_eq!(hub.metrics.looks_waiting.get(), gauge(ROWS));
    hub.append(&[large(ROWS + 1)], Instant::now()).unwrap();
    assert_eq!(hub.ring_base(), ROWS);
    let held = bodies.iter().filter(|body| !body.is_unique()).count();
    assert_eq!(held, SEATS, "rows that are held for looks, of {ROWS}");

    drop(threads);
    for (look, number) in looks.into_iter().zip(0..) {
        let (worked, _) = look.await;
        match worked {
            Worked::Done(pull) => assert!(number < SEATS && frame(pull).0 == 1, "{number}"),
            // Theirs have left the ring meanwhile: the next pull says so.
            other => assert!(number >= SEATS && matches!(other, Worked::More), "{number}: {other:?}"),
        }
    }
    assert!(matches!(taps[SEATS].pull(Seq::try_from(SEATS).unwrap()), Pull::Log));
    assert_eq!(hub.metrics.looks_waiting.get(), 0);
    assert_eq!(bodies.iter().filter(|body| !body.is_unique()).count(), 0);
}

#[tokio::test]
async fn a_look_whose_events_are_still_in_the_ring_gets_them_again() {
    let hub = hub();
    let taps: Vec<Tap> = (0..3).map(|_| hub.join("dear", &Arc::default(), dear_plans)).collect();
    hub.append(&[large(1)], Instant::now()).unwrap();
    let turn = taps[0].group().turns.lock().await;
    let mut looks = Vec::new();
    for tap in &taps {
        let Pull::Dear(look) = tap.pull(0) else { panic!("not dear") };
        let mut look = Box::pin(look.run(Arc::new(AtomicBool::new(false))));
        assert!(look.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending(), "it is another's turn");
        looks.push(look);
    }
    drop(turn);
    for look in looks {
        let (Worked::Done(pull), _) = look.await else { panic!("no answer") };
        assert_eq!(frame(pull), (1, 1));
    }
}

/// The test of before had it cancelled beforehand, and did not see whether anybody asks while it works.
#[test]
fn a_look_that_nobody_waits_for_any_more_ends_between_two_terms() {
    let hub = hub();
    let tap = hub.join("dear", &Arc::default(), dear_plans);
    hub.append(&[large(1)], Instant::now()).unwrap();
    let questions = |cancelled_at: usize| {
        let asked = Cell::new(0);
        let Pull::Dear(mut look) = tap.pull(0) else { panic!("not dear") };
        look.step(Some(&|| {
            asked.set(asked.get() + 1);
            asked.get() >= cancelled_at
        }));
        asked.get()
    };
    assert!(questions(usize::MAX) > 100, "it asks before each term");
    let asked = questions(3);
    assert!((3..10).contains(&asked), "{asked} questions, though it was cancelled at the third");
    let Pull::Dear(mut look) = tap.pull(0) else { panic!("not dear") };
    assert!(matches!(look.work(&AtomicBool::new(true)), Worked::Cancelled));
}

/// Found in review: what a reader at its own pace had found counted among the kept frames, and could not be let go of:
/// everybody else's went.
#[test]
fn what_is_kept_of_looks_goes_with_the_oldest_frames() {
    let options = HubOptions {
        ring_window: Duration::from_secs(300),
        ring_bytes: 64 << 20,
        frame_bytes: FRAME_BYTES,
        frames_bytes: 2 << 20,
    };
    let hub = Arc::new(Hub::new(options, Arc::new(Metrics::new().unwrap())));
    hub.restart(0, None, None, Epochs::default());
    hub.hold(false);
    let groups: Vec<[Tap; 2]> =
        (0..8).map(|number| [0; 2].map(|_| hub.join(&format!("dear {number}"), &Arc::default(), dear_plans))).collect();
    hub.append(&[large(1)], Instant::now()).unwrap();
    for [tap, _] in &groups {
        assert_eq!(read(tap, 0), (1, 1));
        let bytes = hub.kept.bytes();
        assert!(bytes <= options.frames_bytes, "{bytes} bytes of frames");
    }
    let place = (hub.edge().generation, 0);
    let kept = groups.iter().filter(|[tap, _]| tap.group().found(place).is_some()).count();
    assert_eq!(kept, 2, "of 900 KB each");
    assert!(groups[7][0].group().found(place).is_some(), "the newest");
}

#[test]
fn what_a_reader_leaves_with_its_group_is_there_when_it_comes_back() {
    let hub = hub();
    let tap = hub.join("dear", &Arc::default(), dear_plans);
    hub.append(&[large(1)], Instant::now()).unwrap();
    let Pull::Dear(look) = tap.pull(0) else { panic!("not dear") };
    let Pull::Frame(found) = look.at_once() else { panic!("no frame") };
    let place = (hub.edge().generation, 0);
    assert!(tap.group().found(place).is_none(), "it is alone: nobody else comes for it");
    hub.leave(tap.group(), place, Found::Frame(Arc::clone(&found)));
    assert!(hub.kept.bytes() >= found.body.len());
    let Pull::Dear(look) = tap.pull(0) else { panic!("not dear") };
    let Pull::Frame(again) = look.at_once() else { panic!("no frame") };
    assert!(Arc::ptr_eq(&found, &again));
}
