//! A history turned into what the figures need: times of commits, of the relay and of deliveries.

use std::collections::{BTreeMap, HashMap};

use super::{Lag, bucket};
use crate::history::{FaultDone, FaultOn, Line, Micros, Record};

/// Subscriptions that see nearly everything: only their silences say something about the server.
const WIDE_SHARE: f64 = 0.5;

/// What happened to one subscription's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Lost,
    Resumed,
    CaughtUp,
    Ended,
}

#[derive(Debug, Default)]
pub(super) struct Timeline {
    pub(super) end: Micros,
    /// (when, seq), in the order of the handlers' calls.
    pub(super) deliveries: Vec<(Micros, u64)>,
    /// When each subscription's handler was called.
    pub(super) calls: HashMap<u32, Vec<Micros>>,
    events_of: HashMap<u32, u64>,
    pub(super) turns: BTreeMap<u32, Vec<(Micros, Turn)>>,
    commits: HashMap<u64, Vec<Micros>>,
    /// Of every commit that was sent: when, and its changes.
    pub(super) written: Vec<(Micros, u64)>,
    /// Of branch 0, by seq: (relayed, committed), on the run's clock.
    rows: Vec<(u64, i64, u64)>,
    pub(super) relayed: Vec<(Micros, Option<Micros>)>,
    pub(super) on: BTreeMap<u32, (Micros, FaultOn)>,
    pub(super) off: BTreeMap<u32, Micros>,
    pub(super) done: BTreeMap<u32, (Micros, FaultDone)>,
    pub(super) skipped: BTreeMap<u32, (Micros, String, String)>,
    committed_by_seq: HashMap<u64, Micros>,
}

impl Timeline {
    pub(super) fn take(&mut self, Line(t, record): Line) {
        match record {
            Record::Commit { xid, ops, .. } => {
                self.commits.entry(xid).or_default().push(t);
                self.written.push((t, ops.len() as u64));
            }
            Record::Deliver { s, e, .. } => {
                self.end = t;
                self.calls.entry(s).or_default().push(t);
                *self.events_of.entry(s).or_default() += e.len() as u64;
                self.deliveries.extend(e.iter().map(|event| (t, event.0)));
            }
            Record::Disconnected { s, .. } => self.turn(s, t, Turn::Lost),
            Record::Resumed { s, .. } => self.turn(s, t, Turn::Resumed),
            Record::CaughtUp { s, .. } => self.turn(s, t, Turn::CaughtUp),
            Record::Stop { s, .. } | Record::Resync { s, .. } | Record::Refused { s, .. } => {
                self.turn(s, t, Turn::Ended);
            }
            Record::FaultOn(on) => drop(self.on.insert(on.f, (t, on))),
            Record::FaultOff { f } => drop(self.off.insert(f, t)),
            Record::FaultDone(done) => drop(self.done.insert(done.f, (t, done))),
            Record::FaultSkipped { f, class, why } => drop(self.skipped.insert(f, (t, class, why))),
            Record::Log(row) if row.branch == 0 => self.rows.push((row.seq, row.relayed, row.xid)),
            _ => {}
        }
    }

    fn turn(&mut self, s: u32, t: Micros, turn: Turn) {
        self.turns.entry(s).or_default().push((t, turn));
    }

    pub(super) fn finish(&mut self) {
        for (seq, relayed, xid) in std::mem::take(&mut self.rows) {
            let relayed = Micros::try_from(relayed).unwrap_or(0);
            // After a lossy failover xids repeat: the row belongs to the last commit before it was relayed. A commit is
            // stamped before it is sent, so no tolerance is needed but that of reading two clocks of one machine.
            let committed =
                self.commits.get(&xid).and_then(|times| times.iter().copied().filter(|t| *t <= relayed + 1_000).max());
            if let Some(committed) = committed {
                self.committed_by_seq.insert(seq, committed);
            }
            self.relayed.push((relayed, committed));
        }
        self.relayed.sort_unstable();
    }

    /// Subscriptions whose handlers are called for most of what is written.
    pub(super) fn wide(&self) -> Vec<u32> {
        let most = self.events_of.values().copied().max().unwrap_or(0) as f64;
        let mut wide: Vec<u32> =
            self.events_of.iter().filter(|(_, n)| **n as f64 >= most * WIDE_SHARE).map(|(s, _)| *s).collect();
        wide.sort_unstable();
        wide
    }

    /// Second by second, and over the whole run.
    pub(super) fn lag(&self) -> (Vec<Lag>, Vec<u64>) {
        let mut seconds: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
        let mut buckets = Vec::new();
        for (t, seq) in &self.deliveries {
            let Some(committed) = self.committed_by_seq.get(seq) else { continue };
            let lag = t.saturating_sub(*committed);
            seconds.entry((t / 1_000_000) as u32).or_default().push(lag);
            let at = bucket(lag);
            if buckets.len() <= at {
                buckets.resize(at + 1, 0);
            }
            buckets[at] += 1;
        }
        let lag = seconds.into_iter().map(|(second, mut lags)| {
            lags.sort_unstable();
            let at = |share: f64| lags[((lags.len() - 1) as f64 * share) as usize];
            Lag { second, events: lags.len() as u32, p50: at(0.5), p99: at(0.99), max: at(1.0) }
        });
        (lag.collect(), buckets)
    }
}
