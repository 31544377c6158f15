//! What a leader does beside relaying: dropping old partitions, on a connection of its own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Connection as _;

use crate::log::retention;
use crate::mutant::{self, Mutant};
use crate::postgres::Database;
use crate::telemetry::metrics::Metrics;

/// Between two looks at the log's old end.
const TRIM_INTERVAL: Duration = Duration::from_secs(60);
/// Before the first: a new leader has better things to do.
const FIRST_TRIM: Duration = Duration::from_secs(10);

/// Events that a mutant keeps.
const MUTANT_KEEPS: u32 = 1_000;

/// Drops what is past its retention, for ever; failures are logged and tried again at the next turn.
pub(super) async fn trim_log(database: Arc<Database>, retention: Duration, metrics: Arc<Metrics>) {
    tokio::time::sleep(FIRST_TRIM).await;
    loop {
        match trim_once(&database, retention).await {
            Ok(dropped) => metrics.log_trimmed_partitions_total.inc_by(dropped as u64),
            Err(error) => tracing::warn!(%error, "old partitions could not be dropped; trying again in a minute"),
        }
        tokio::time::sleep(TRIM_INTERVAL).await;
    }
}

async fn trim_once(database: &Database, retention: Duration) -> anyhow::Result<usize> {
    crate::failpoint::hit("log.trim").await?;
    let (mut connection, _) = database.connect().await?;
    // A lock that is not free soon is left for the next turn: waiting for it would hold others up behind us.
    sqlx::query("SELECT set_config('lock_timeout', '2s', false), set_config('statement_timeout', '30s', false)")
        .execute(&mut connection)
        .await?;
    let dropped = retention::trim(&mut connection, retention, None).await?;
    if mutant::is(Mutant::TrimTooMuch) {
        let newest = "SELECT max(seq) FROM tidewire.event_log";
        let trimmed = format!("DELETE FROM tidewire.event_log WHERE seq < ({newest}) - {MUTANT_KEEPS}");
        sqlx::query(sqlx::AssertSqlSafe(trimmed)).execute(&mut connection).await?;
    }
    connection.close().await?;
    Ok(dropped)
}

/// Events a second over the last minutes, to size partitions by.
#[derive(Debug)]
pub(super) struct Pace {
    began: Instant,
    marks: VecDeque<(Instant, u64)>,
    total: u64,
}

/// Marks kept, one a second at most.
const MAX_MARKS: usize = 300;

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { began: now, marks: VecDeque::new(), total: 0 }
    }

    pub(super) fn appended(&mut self, events: usize, now: Instant) {
        self.total += events as u64;
        if self.marks.back().is_none_or(|(at, _)| now.duration_since(*at) >= Duration::from_secs(1)) {
            self.marks.push_back((now, self.total));
            if self.marks.len() > MAX_MARKS {
                self.marks.pop_front();
            }
        }
    }

    pub(super) fn events_per_s(&self) -> f64 {
        let (from, base) = self.marks.front().copied().unwrap_or((self.began, 0));
        let Some((to, _)) = self.marks.back() else { return 0.0 };
        (self.total - base) as f64 / to.duration_since(from).as_secs_f64().max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_that_of_the_last_minutes() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert!(pace.events_per_s() < 1.0);
        for second in 0..600 {
            let events = if second < 300 { 10 } else { 1000 };
            pace.appended(events, start + Duration::from_secs(second));
        }
        let measured = pace.events_per_s();
        assert!((900.0..1100.0).contains(&measured), "{measured}");
    }
}
