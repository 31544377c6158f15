//! The window: the newest events, in memory, shared by every session of the node.
//!
//! Dense: the event after `base` is the first, and there is no gap. Pure; instants are passed in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::cursor::Seq;
use crate::event::Event;

/// What the ring keeps whatever its age, as long as the bytes allow: resumes after a quiet night are served from memory.
pub const MIN_EVENTS: usize = 10_000;

/// Of what goes out together, bytes: enough for a hundred frames, little enough to be held by every reader.
const WHOLE_BYTES: usize = 8 << 20;

/// The newest events.
#[derive(Debug)]
pub struct Ring {
    events: VecDeque<Event>,
    base: Seq,
    base_id: Option<Uuid>,
    bytes: usize,
    // When events came in: (instant, last seq that was in by then), for trimming by age.
    marks: VecDeque<(Instant, Seq)>,
    window: Duration,
    max_bytes: usize,
}

/// Consecutive events that may go out together.
#[derive(Debug, Default)]
pub struct Whole {
    /// They end with a transaction, unless `open`.
    pub events: Vec<Event>,
    /// They are the inside of one transaction that is larger than a frame.
    pub open: bool,
}

impl Whole {
    /// The longest beginning of `events` that ends with a transaction, of about `limit` events and 8 MiB; or, where the first
    /// transaction has no end among them, its part if that is larger than `frame_bytes`; else nothing.
    pub fn prefix<'a>(events: impl Iterator<Item = &'a Event>, limit: usize, frame_bytes: usize) -> Self {
        let mut taken: Vec<Event> = Vec::new();
        let (mut ended, mut bytes) = (0, 0);
        for event in events {
            if ended > 0 && (taken.len() >= limit || bytes >= WHOLE_BYTES) {
                break;
            }
            taken.push(event.clone());
            bytes += event.body.len();
            if event.tx_end {
                ended = taken.len();
            } else if ended == 0 && bytes > frame_bytes {
                return Self { events: taken, open: true };
            }
        }
        taken.truncate(ended);
        Self { events: taken, open: false }
    }

    /// Keeps the first transactions, of about `bytes`.
    pub fn shorten(&mut self, bytes: usize) {
        let mut sum = 0;
        let enough = self.events.iter().position(|event| {
            sum += event.body.len();
            sum >= bytes && event.tx_end
        });
        if let Some(last) = enough.filter(|_| !self.open) {
            self.events.truncate(last + 1);
        }
    }
}

/// What was asked for is older than the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// The event does not follow the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("event {got} does not follow {after}")]
pub struct NotContiguous {
    /// The newest seq of the ring.
    pub after: Seq,
    /// The seq that came.
    pub got: Seq,
}

impl Ring {
    /// An empty ring that the event after `base` will begin. `base_id` is the id of the event at `base`, if known.
    /// Keeps `window` of events, at most `max_bytes`.
    #[must_use]
    pub fn new(base: Seq, base_id: Option<Uuid>, window: Duration, max_bytes: usize) -> Self {
        let (events, marks) = (VecDeque::new(), VecDeque::new());
        Self { events, base, base_id, bytes: 0, marks, window, max_bytes }
    }

    /// The newest seq; that of the base while empty.
    #[must_use]
    pub fn newest(&self) -> Seq {
        self.base + self.events.len() as u64
    }

    /// The position before the first event.
    #[must_use]
    pub const fn base(&self) -> Seq {
        self.base
    }

    /// Events held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Memory held by events.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// How far back it reaches.
    #[must_use]
    pub fn age(&self, now: Instant) -> Duration {
        self.marks.front().map_or(Duration::ZERO, |(at, _)| now.saturating_duration_since(*at))
    }

    /// Takes the next events; lets go of none ([`Ring::trim`]).
    ///
    /// # Errors
    /// [`NotContiguous`]; those before the gap are in.
    pub fn append(&mut self, events: &[Event], now: Instant) -> Result<(), NotContiguous> {
        let mut verdict = Ok(());
        for event in events {
            if event.seq != self.newest() + 1 {
                verdict = Err(NotContiguous { after: self.newest(), got: event.seq });
                break;
            }
            self.bytes += event.bytes();
            self.events.push_back(event.clone());
        }
        let newest = self.newest();
        match self.marks.back_mut() {
            // One mark for each tenth of a second bounds their number by the window.
            Some((at, seq)) if now.saturating_duration_since(*at) < Duration::from_millis(100) => *seq = newest,
            _ if !events.is_empty() => self.marks.push_back((now, newest)),
            _ => {}
        }
        verdict
    }

    /// Lets go of what is too old or too much, but of nothing after `delivered`: what has not been handed on yet may be more
    /// than fits, when much comes at once.
    pub fn trim(&mut self, now: Instant, delivered: Seq) {
        while self.bytes > self.max_bytes && self.events.len() > 1 && self.base < delivered {
            self.pop();
        }
        while let Some((at, seq)) = self.marks.front().copied() {
            let old = now.saturating_duration_since(at) > self.window;
            if seq > self.base && (!old || self.events.len() <= MIN_EVENTS) {
                break;
            }
            if seq <= self.base {
                self.marks.pop_front();
                continue;
            }
            let before = self.base;
            while self.base < seq.min(delivered) && self.events.len() > MIN_EVENTS {
                self.pop();
            }
            if self.base == before {
                break;
            }
        }
    }

    fn pop(&mut self) {
        if let Some(event) = self.events.pop_front() {
            self.bytes -= event.bytes();
            self.base = event.seq;
            self.base_id = Some(event.id);
        }
    }

    /// Forgets everything after `seq`; true when anything was forgotten. What lies before the base cannot be cut.
    pub fn cut_after(&mut self, seq: Seq) -> bool {
        let keep = usize::try_from(seq.saturating_sub(self.base)).unwrap_or(usize::MAX);
        let cut = self.events.len() > keep;
        for event in self.events.drain(keep.min(self.events.len())..) {
            self.bytes -= event.bytes();
        }
        let newest = self.newest();
        for (_, mark) in &mut self.marks {
            *mark = newest.min(*mark);
        }
        cut
    }

    /// The id of the event at `seq`, also at the base.
    #[must_use]
    pub fn id_at(&self, seq: Seq) -> Option<Uuid> {
        if seq == self.base {
            return self.base_id;
        }
        self.get(seq).map(|event| event.id)
    }

    fn get(&self, seq: Seq) -> Option<&Event> {
        let index = usize::try_from(seq.checked_sub(self.base + 1)?).ok()?;
        self.events.get(index)
    }

    /// Whole transactions after `after` through `through`: about `limit` events, more where one transaction has more. A
    /// transaction without an end in that range is given, `open`, only when it is larger than `frame_bytes`.
    ///
    /// # Errors
    /// [`Gone`] when the first of them is no longer here.
    pub fn whole_after(&self, after: Seq, through: Seq, limit: usize, frame_bytes: usize) -> Result<Whole, Gone> {
        let from = usize::try_from(after.checked_sub(self.base).ok_or(Gone)?).map_err(|_| Gone)?;
        let to = usize::try_from(through.saturating_sub(self.base)).unwrap_or(usize::MAX).min(self.events.len());
        if from >= to {
            return Ok(Whole::default());
        }
        Ok(Whole::prefix(self.events.range(from..to), limit, frame_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Operation;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn event(seq: Seq, size: usize) -> Event {
        Event {
            seq,
            id: Uuid::from_u128(u128::from(seq)),
            xid: seq,
            operation: Operation::Insert,
            tx_end: true,
            omitted: false,
            table: "public.t".into(),
            body: Bytes::from(vec![b'x'; size]),
        }
    }

    proptest! {
        #[test]
        fn the_ring_agrees_with_a_naive_model(
            base in 0u64..50,
            script in prop::collection::vec((1usize..40, 0usize..200, 0u64..40_000), 1..60),
            held in 0u64..2,
            asks in prop::collection::vec((0u64..3000, 0u64..3000, 0usize..50), 1..20),
        ) {
            let start = Instant::now();
            let mut ring = Ring::new(base, None, Duration::from_secs(300), 20_000);
            let mut model: Vec<Event> = Vec::new();
            let (mut next, mut now) = (base + 1, start);
            for (count, size, millis) in script {
                now += Duration::from_millis(millis);
                let events: Vec<Event> = (0..count as u64).map(|i| event(next + i, size)).collect();
                next += count as u64;
                ring.append(&events, now).unwrap();
                ring.trim(now, next - 1 - held);
                model.extend(events);
                prop_assert!(ring.base() <= next - 1 - held);
                prop_assert!(ring.bytes() <= 20_000 || ring.len() == 1 || ring.base() == next - 1 - held);
                prop_assert_eq!(ring.newest(), next - 1);
            }
            prop_assert_eq!(ring.bytes(), model.iter().filter(|e| e.seq > ring.base()).map(Event::bytes).sum::<usize>());
            for (after, more, limit) in asks {
                let want: Vec<Event> = model.iter().filter(|e| e.seq > after && e.seq <= after + more).take(limit.max(1)).cloned().collect();
                match ring.whole_after(after, after + more, limit, usize::MAX) {
                    Ok(got) => prop_assert_eq!(got.events, want),
                    Err(Gone) => prop_assert!(after < ring.base()),
                }
            }
        }
    }

    #[test]
    fn what_does_not_follow_is_refused() {
        let mut ring = Ring::new(10, None, Duration::from_secs(300), 1 << 20);
        assert_eq!(ring.append(&[event(12, 1)], Instant::now()), Err(NotContiguous { after: 10, got: 12 }));
        assert_eq!(
            ring.append(&[event(11, 1), event(13, 1)], Instant::now()),
            Err(NotContiguous { after: 11, got: 13 })
        );
        assert_eq!(ring.newest(), 11);
    }

    #[test]
    fn a_quiet_night_keeps_the_newest_ten_thousand() {
        let start = Instant::now();
        let mut ring = Ring::new(0, None, Duration::from_secs(300), 64 << 20);
        let events: Vec<Event> = (1..=12_000).map(|seq| event(seq, 10)).collect();
        ring.append(&events, start).unwrap();
        ring.trim(start + Duration::from_secs(10_000), 12_000);
        assert_eq!((ring.len(), ring.base()), (MIN_EVENTS, 2_000));
        assert_eq!(ring.id_at(2_000), Some(Uuid::from_u128(2_000)));
        assert_eq!(ring.whole_after(1_999, 12_000, 1, usize::MAX).unwrap_err(), Gone);
    }

    #[test]
    fn a_new_epoch_cuts_the_lost_tail() {
        let mut ring = Ring::new(0, None, Duration::from_secs(300), 1 << 20);
        ring.append(&[event(1, 5), event(2, 5), event(3, 5)], Instant::now()).unwrap();
        assert!(ring.cut_after(2));
        assert!(!ring.cut_after(2));
        assert_eq!((ring.newest(), ring.bytes()), (2, event(1, 5).bytes() * 2));
        ring.append(&[event(3, 9)], Instant::now()).unwrap();
        assert_eq!(ring.whole_after(2, 9, 9, usize::MAX).unwrap().events, [event(3, 9)]);
    }
}
