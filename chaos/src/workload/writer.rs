//! A writer: one connection, transactions one after the other, each recorded before its COMMIT is sent.
//!
//! Every value is unique over the run and every UPDATE carries the value that it replaced, so the log can be checked
//! against what really happened row by row. Rows are contended; within a transaction they are taken in one order.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, bail};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sqlx::{Connection, Executor, PgConnection, Row};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::schema::{EVENTS, TABLES, WEIGHTS, as_owner, connect};
use super::{Shared, WorkloadPlan};
use crate::history::{Record, Write};

/// For a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// After a failed connection.
const AGAIN: Duration = Duration::from_millis(100);
/// For one statement, COMMIT included; Postgres gives up a little earlier by itself.
const STATEMENT: Duration = Duration::from_secs(10);
/// A writer that was held up makes up for at most so much.
const BACKLOG: Duration = Duration::from_secs(1);
/// Rows of a large transaction are written by this writer, which no task has.
const BIG_WRITER: u32 = 1_000;
/// Keys of large transactions begin here.
const BIG_KEYS: i64 = 1_000_000;
/// For a large transaction, 100,000 rows on a busy machine.
const BIG: Duration = Duration::from_secs(60);
/// No filter of the workload knows this weight.
const BIG_WEIGHT: u32 = 200;

/// What a transaction is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One change.
    One,
    /// So many changes.
    Several(u32),
    /// Several changes, then ROLLBACK.
    Rollback,
    /// One change is kept, another is undone by ROLLBACK TO a savepoint.
    Savepoint,
    /// Open for so many milliseconds between its changes.
    Long(u64),
    /// A domain event beside a change.
    Event,
}

impl Kind {
    fn draw(rng: &mut StdRng) -> Self {
        match rng.random_range(0..1_000) {
            0..550 => Self::One,
            550..750 => Self::Several(rng.random_range(2..6)),
            750..790 => Self::Several(rng.random_range(6..20)),
            790..792 => Self::Several(300),
            792..842 => Self::Rollback,
            842..882 => Self::Savepoint,
            882..885 => Self::Long(rng.random_range(500..3_000)),
            _ => Self::Event,
        }
    }
}

/// Why a transaction has no COMMIT.
enum End {
    RolledBack,
    Failed(String),
}

pub(super) async fn write(w: u32, plan: WorkloadPlan, shared: Arc<Shared>) {
    let end = shared.writers_end.clone();
    let mut writer = Writer {
        w,
        n: 0,
        values: 0,
        rng: StdRng::seed_from_u64(plan.seed ^ (u64::from(w) << 32) ^ 0x0077_7269_7465),
        plan,
        primary: shared.primary.clone(),
        shared,
        connection: None,
    };
    let period =
        Duration::from_secs_f64(f64::from(writer.plan.writers) / f64::from(writer.plan.transactions_per_second.max(1)));
    let mut due = Instant::now();
    let mut paused = writer.shared.paused.subscribe();
    // A transaction in progress is never cut off: its end must be known.
    while !end.is_cancelled() {
        if paused.wait_for(|paused| !paused).await.is_err() {
            break;
        }
        due = (due + period).max(Instant::now().checked_sub(BACKLOG).unwrap_or(due));
        tokio::select! {
            () = sleep_until(due) => writer.transaction().await,
            () = end.cancelled() => {}
        }
    }
}

struct Writer {
    w: u32,
    n: u64,
    /// Values so far: none comes twice, not even one that was undone.
    values: u64,
    rng: StdRng,
    plan: WorkloadPlan,
    primary: watch::Receiver<String>,
    shared: Arc<Shared>,
    connection: Option<PgConnection>,
}

impl Writer {
    async fn transaction(&mut self) {
        let Some(mut connection) = self.connected().await else {
            sleep(AGAIN).await;
            return;
        };
        self.n += 1;
        let (w, n) = (self.w, self.n);
        let kind = Kind::draw(&mut self.rng);
        self.shared.recorder.record(Record::Begin { w, n });
        let mut ops = Vec::new();
        let mut xid = 0;
        let changes = async {
            connection.execute("BEGIN").await?;
            self.changes(&mut connection, kind, &mut ops, &mut xid).await
        };
        let result = match timeout(STATEMENT * 2, changes).await {
            Ok(Ok(())) if kind == Kind::Rollback => Err(End::RolledBack),
            // Every row that it drew was somebody else's in the meantime.
            Ok(Ok(())) if ops.is_empty() => Err(End::RolledBack),
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(End::Failed(error.to_string())),
            Err(_) => Err(End::Failed("no answer".into())),
        };
        match result {
            Ok(()) => self.commit(connection, xid, ops).await,
            Err(end) => {
                let rolled_back = matches!(timeout(STATEMENT, connection.execute("ROLLBACK")).await, Ok(Ok(_)));
                if rolled_back {
                    self.connection = Some(connection);
                }
                let error = match end {
                    End::RolledBack => "rollback".to_owned(),
                    End::Failed(error) => error,
                };
                self.shared.recorder.record(Record::Fail { w, n, error });
            }
        }
    }

    async fn commit(&mut self, mut connection: PgConnection, xid: u64, ops: Vec<Write>) {
        let (w, n) = (self.w, self.n);
        self.shared.recorder.record(Record::Commit { w, n, xid, ops });
        let record = match timeout(STATEMENT, connection.execute("COMMIT")).await {
            Ok(Ok(_)) => {
                self.connection = Some(connection);
                self.shared.committed.fetch_add(1, Ordering::Relaxed);
                Record::Ok { w, n }
            }
            Ok(Err(error)) if refused(&error) => Record::Fail { w, n, error: error.to_string() },
            Ok(Err(error)) => Record::Unknown { w, n, error: error.to_string() },
            Err(_) => Record::Unknown { w, n, error: "no answer to COMMIT".into() },
        };
        self.shared.recorder.record(record);
    }

    /// The connection, anew if the primary is another one or the old one broke.
    async fn connected(&mut self) -> Option<PgConnection> {
        let changed = self.primary.has_changed().unwrap_or(false);
        if let Some(connection) = self.connection.take()
            && !changed
        {
            return Some(connection);
        }
        let url = as_owner(&self.primary.borrow_and_update());
        let mut connection = timeout(CONNECT, connect(&url)).await.ok()?.ok()?;
        let limits = "SET statement_timeout = '8s'; SET lock_timeout = '6s'";
        timeout(CONNECT, connection.execute(limits)).await.ok()?.ok()?;
        Some(connection)
    }

    async fn changes(
        &mut self,
        connection: &mut PgConnection,
        kind: Kind,
        ops: &mut Vec<Write>,
        xid: &mut u64,
    ) -> Result<(), sqlx::Error> {
        let count = match kind {
            Kind::Several(count) => count,
            Kind::Rollback => 3,
            Kind::One | Kind::Savepoint | Kind::Long(_) | Kind::Event => 1,
        };
        let own = matches!(kind, Kind::Long(_));
        for (table, key) in self.keys(count, own) {
            self.change(connection, table, key, ops, xid).await?;
        }
        match kind {
            Kind::Savepoint => {
                connection.execute("SAVEPOINT undone").await?;
                let mut undone = Vec::new();
                let (table, key) = (TABLES[TABLES.len() - 1], self.key_beyond());
                self.change(connection, table, key, &mut undone, xid).await?;
                connection.execute("ROLLBACK TO SAVEPOINT undone").await?;
            }
            Kind::Long(millis) => {
                sleep(Duration::from_millis(millis)).await;
                let (table, key) = (TABLES[1], self.key_beyond());
                self.change(connection, table, key, ops, xid).await?;
            }
            Kind::Event => self.event(connection, ops, xid).await?,
            Kind::One | Kind::Several(_) | Kind::Rollback => {}
        }
        Ok(())
    }

    /// Distinct rows in the one order in which everybody takes them.
    fn keys(&mut self, count: u32, own: bool) -> BTreeSet<(&'static str, i64)> {
        if own {
            return BTreeSet::from([(TABLES[0], self.key_beyond())]);
        }
        let per_table = i64::from(self.plan.keys) / TABLES.len() as i64;
        (0..count)
            .map(|_| (TABLES[self.rng.random_range(0..TABLES.len())], self.rng.random_range(0..per_table.max(1))))
            .collect()
    }

    /// A row that only this writer touches: whoever holds a lock for seconds must not hold up the others.
    fn key_beyond(&self) -> i64 {
        i64::from(self.plan.keys) + i64::from(self.w)
    }

    /// A new one.
    fn value(&mut self) -> String {
        self.values += 1;
        format!("{}-{}-{}", self.w, self.n, self.values)
    }

    async fn change(
        &mut self,
        connection: &mut PgConnection,
        table: &str,
        key: i64,
        ops: &mut Vec<Write>,
        xid: &mut u64,
    ) -> Result<(), sqlx::Error> {
        let val = self.value();
        let weight = i32::try_from(self.rng.random_range(0..WEIGHTS)).unwrap_or(0);
        let delete = self.rng.random_range(0..100) < 8;
        let mut write = Write { table: table.to_owned(), op: String::new(), key, val, prev: None };
        if delete {
            let statement =
                format!("DELETE FROM {table} WHERE id = $1 RETURNING val, pg_current_xact_id()::text::bigint");
            let row = sqlx::query(sqlx::AssertSqlSafe(statement)).bind(key).fetch_optional(&mut *connection).await?;
            let Some(row) = row else { return Ok(()) };
            write.op = "DELETE".into();
            write.val = row.try_get(0)?;
            *xid = row.try_get::<i64, _>(1)?.cast_unsigned();
            ops.push(write);
            return Ok(());
        }
        let statement = format!(
            "UPDATE {table} SET prev = val, val = $2, w = $3 WHERE id = $1
             RETURNING prev, pg_current_xact_id()::text::bigint"
        );
        let row = sqlx::query(sqlx::AssertSqlSafe(statement))
            .bind(key)
            .bind(&write.val)
            .bind(weight)
            .fetch_optional(&mut *connection)
            .await?;
        let row = if let Some(row) = row {
            write.op = "UPDATE".into();
            write.prev = row.try_get(0)?;
            Some(row)
        } else {
            write.op = "INSERT".into();
            let statement = format!(
                "INSERT INTO {table} (id, val, w) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING
                 RETURNING val, pg_current_xact_id()::text::bigint"
            );
            sqlx::query(sqlx::AssertSqlSafe(statement))
                .bind(key)
                .bind(&write.val)
                .bind(weight)
                .fetch_optional(&mut *connection)
                .await?
        };
        if let Some(row) = row {
            *xid = row.try_get::<i64, _>(1)?.cast_unsigned();
            ops.push(write);
        }
        Ok(())
    }

    async fn event(
        &mut self,
        connection: &mut PgConnection,
        ops: &mut Vec<Write>,
        xid: &mut u64,
    ) -> Result<(), sqlx::Error> {
        let key = i64::from(self.rng.random_range(0..self.plan.keys.max(1)));
        let val = self.value();
        let payload = serde_json::json!({ "val": val, "w": self.rng.random_range(0..WEIGHTS) });
        let row =
            sqlx::query("SELECT pg_current_xact_id()::text::bigint, tidewire.emit('bid', $1, 'placed', $2::json)")
                .bind(key.to_string())
                .bind(payload.to_string())
                .fetch_one(&mut *connection)
                .await?;
        *xid = row.try_get::<i64, _>(0)?.cast_unsigned();
        ops.push(Write { table: EVENTS.into(), op: "EVENT".into(), key, val, prev: None });
        Ok(())
    }
}

/// Postgres says that it did not commit. Whatever else comes instead of an answer leaves that open: a backend that is
/// terminated while it waits for the standby has committed.
fn refused(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(error) = error else { return false };
    error.code().is_some_and(|code| code.starts_with("40") || code.starts_with("23") || code == "25P02")
}

pub(super) async fn big(shared: &Shared, rows: u32) -> anyhow::Result<u64> {
    let n = shared.next_big.fetch_add(1, Ordering::Relaxed);
    let (w, table) = (BIG_WRITER, TABLES[2]);
    let url = as_owner(&shared.primary.borrow().clone());
    let mut connection = timeout(CONNECT, connect(&url)).await??;
    shared.recorder.record(Record::Begin { w, n });
    let base = BIG_KEYS + i64::try_from(n)? * 1_000_000;
    let insert = async {
        let mut transaction = connection.begin().await?;
        let statement = format!(
            "INSERT INTO {table} (id, val, w)
             SELECT $1 + i, '{w}-{n}-' || i, {BIG_WEIGHT} FROM generate_series(0, $2 - 1) i"
        );
        sqlx::query(sqlx::AssertSqlSafe(statement)).bind(base).bind(i64::from(rows)).execute(&mut *transaction).await?;
        let xid: i64 =
            sqlx::query_scalar("SELECT pg_current_xact_id()::text::bigint").fetch_one(&mut *transaction).await?;
        Ok::<_, sqlx::Error>((transaction, xid.cast_unsigned()))
    };
    let (transaction, xid) = match timeout(BIG, insert).await.context("no answer").and_then(|done| Ok(done?)) {
        Ok(done) => done,
        Err(error) => {
            shared.recorder.record(Record::Fail { w, n, error: error.to_string() });
            bail!(error);
        }
    };
    let ops = (0..i64::from(rows)).map(|i| Write {
        table: table.into(),
        op: "INSERT".into(),
        key: base + i,
        val: format!("{w}-{n}-{i}"),
        prev: None,
    });
    shared.recorder.record(Record::Commit { w, n, xid, ops: ops.collect() });
    match timeout(BIG, transaction.commit()).await {
        Ok(Ok(())) => {
            shared.recorder.record(Record::Ok { w, n });
            Ok(xid)
        }
        failed => {
            let error = format!("{failed:?}");
            shared.recorder.record(Record::Unknown { w, n, error: error.clone() });
            bail!("the large transaction has no answer: {error}")
        }
    }
}
