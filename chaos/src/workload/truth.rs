//! What Postgres holds in the end: the log, the terms and epochs, the users' tables, and for every subscription the rows
//! of the log that Postgres itself lets through its condition.

use std::collections::BTreeSet;

use anyhow::Context;
use futures_util::TryStreamExt;
use sqlx::{Executor, PgConnection, Row};

use super::schema::{TABLES, connect};
use crate::history::{Content, LogRow, Record, Recorder, Want, fingerprint};

/// Columns of the log as this file reads them.
const COLUMNS: &str =
    "seq, xid::text::bigint AS xid, tx_end, event_id, table_name, operation, row_key::text AS row_key,
    before_data::text AS before_data, after_data::text AS after_data,
    (extract(epoch FROM relayed_at) * 1000000)::bigint AS relayed,
    coalesce(row_key->>'id', row_key->>'aggregate_id')::bigint AS key,
    coalesce(after_data->>'val', CASE WHEN operation = 'DELETE' THEN before_data->>'val' END) AS val,
    after_data->>'prev' AS prev, before_data->>'val' AS before_val";

/// Rows left in the outbox, and the newest seq.
///
/// # Errors
/// The primary does not answer.
pub async fn head(primary_url: &str) -> anyhow::Result<(i64, u64)> {
    let mut connection = connect(primary_url).await?;
    let row = sqlx::query(
        "SELECT (SELECT count(*) FROM tidewire.outbox), (SELECT coalesce(max(seq), 0) FROM tidewire.event_log)",
    )
    .fetch_one(&mut connection)
    .await?;
    Ok((row.try_get(0)?, row.try_get::<i64, _>(1)?.cast_unsigned()))
}

/// Reads everything and records it.
///
/// # Errors
/// The primary does not answer.
pub async fn record(primary_url: &str, recorder: &Recorder, wants: &BTreeSet<Want>) -> anyhow::Result<()> {
    let mut connection = connect(primary_url).await?;
    log(&mut connection, recorder, 0, 0).await.context("the log")?;
    leaderships(&mut connection, recorder).await.context("terms and epochs")?;
    for table in TABLES {
        let statement = format!("SELECT id, val FROM {table} ORDER BY id");
        let mut rows = sqlx::query(sqlx::AssertSqlSafe(statement)).fetch(&mut connection);
        while let Some(row) = rows.try_next().await? {
            recorder.record(Record::Row { table: table.into(), key: row.try_get(0)?, val: row.try_get(1)? });
        }
    }
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM tidewire.outbox").fetch_one(&mut connection).await?;
    recorder.record(Record::Outbox { rows: rows.cast_unsigned() });
    matches(&mut connection, recorder, wants).await
}

/// Records what the old primary's log has after `after_seq` as branch `branch`; returns how many rows.
///
/// # Errors
/// The old primary does not answer.
pub async fn lost_tail(old_primary_url: &str, recorder: &Recorder, branch: u32, after_seq: u64) -> anyhow::Result<u64> {
    let mut connection = connect(old_primary_url).await?;
    log(&mut connection, recorder, branch, after_seq).await
}

async fn log(connection: &mut PgConnection, recorder: &Recorder, branch: u32, after_seq: u64) -> anyhow::Result<u64> {
    let began = recorder.wall();
    let statement = format!("SELECT {COLUMNS} FROM tidewire.event_log WHERE seq > $1 ORDER BY seq");
    let mut rows = sqlx::query(sqlx::AssertSqlSafe(statement)).bind(after_seq.cast_signed()).fetch(&mut *connection);
    let mut count = 0;
    while let Some(row) = rows.try_next().await? {
        let xid = row.try_get::<i64, _>("xid")?.cast_unsigned();
        let (event_id, table, op) = (row.try_get("event_id")?, row.try_get("table_name")?, row.try_get("operation")?);
        let tx_end = row.try_get("tx_end")?;
        let tx = xid.to_string();
        let content = Content {
            event_id,
            table,
            op,
            tx: &tx,
            tx_end,
            key: row.try_get("row_key")?,
            before: row.try_get("before_data")?,
            after: row.try_get("after_data")?,
        };
        recorder.record(Record::Log(LogRow {
            branch,
            seq: row.try_get::<i64, _>("seq")?.cast_unsigned(),
            xid,
            tx_end,
            event_id,
            table: table.to_owned(),
            op: op.to_owned(),
            key: row.try_get("key")?,
            val: row.try_get("val")?,
            prev: row.try_get("prev")?,
            before: row.try_get("before_val")?,
            relayed: row.try_get::<i64, _>("relayed")? - began,
            fingerprint: fingerprint(&content),
        }));
        count += 1;
    }
    Ok(count)
}

async fn leaderships(connection: &mut PgConnection, recorder: &Recorder) -> anyhow::Result<()> {
    let began = recorder.wall();
    let terms = sqlx::query(
        "SELECT term, epoch, node, (extract(epoch FROM acquired_at) * 1000000)::bigint,
                (extract(epoch FROM released_at) * 1000000)::bigint
         FROM tidewire.terms ORDER BY term",
    )
    .fetch_all(&mut *connection)
    .await?;
    for row in terms {
        recorder.record(Record::Term {
            term: row.try_get::<i64, _>(0)?.cast_unsigned(),
            epoch: row.try_get::<i32, _>(1)?.cast_unsigned(),
            node: row.try_get(2)?,
            acquired: row.try_get::<i64, _>(3)? - began,
            released: row.try_get::<Option<i64>, _>(4)?.map(|at| at - began),
        });
    }
    let epochs = sqlx::query("SELECT epoch, start_seq, reason FROM tidewire.epochs ORDER BY epoch")
        .fetch_all(&mut *connection)
        .await?;
    for row in epochs {
        recorder.record(Record::Epoch {
            epoch: row.try_get::<i32, _>(0)?.cast_unsigned(),
            start_seq: row.try_get::<i64, _>(1)?.cast_unsigned(),
            reason: row.try_get(2)?,
        });
    }
    Ok(())
}

/// The conditions are evaluated by Postgres's own parser and operators on the images of the log: nothing of the
/// server's code takes part.
async fn matches(connection: &mut PgConnection, recorder: &Recorder, wants: &BTreeSet<Want>) -> anyhow::Result<()> {
    // Taken apart once, not once for each condition.
    connection
        .execute(
            "SET work_mem = '64MB';
             CREATE TEMPORARY TABLE images AS
             SELECT seq, table_name, operation, omitted, before_data IS NOT NULL AS has_before, row_key->>'aggregate_id' AS aggregate_id, event_type,
                    CASE WHEN operation = 'EVENT' THEN after_data END AS payload,
                    b.id AS b_id, b.val AS b_val, b.prev AS b_prev, b.w AS b_w,
                    a.id AS a_id, a.val AS a_val, a.prev AS a_prev, a.w AS a_w
             FROM tidewire.event_log
                  LEFT JOIN LATERAL json_to_record(CASE WHEN operation IN ('UPDATE', 'DELETE') THEN before_data END)
                      AS b(id bigint, val text, prev text, w integer) ON true
                  LEFT JOIN LATERAL json_to_record(CASE WHEN operation IN ('UPDATE', 'INSERT') THEN after_data END)
                      AS a(id bigint, val text, prev text, w integer) ON true;
             ANALYZE images",
        )
        .await
        .context("the images of the log")?;
    for want in wants {
        let statement =
            format!("SELECT seq, {} AS moved FROM images WHERE {} ORDER BY seq", moved(want), condition(want));
        let rows: Vec<(i64, i32)> = sqlx::query_as(sqlx::AssertSqlSafe(statement))
            .fetch_all(&mut *connection)
            .await
            .with_context(|| format!("Postgres refuses the condition of {want:?}"))?;
        let all = |wanted: fn(i32) -> bool| {
            runs(rows.iter().filter(|(_, moved)| wanted(*moved)).map(|(seq, _)| seq.cast_unsigned()))
        };
        recorder.record(Record::Matches {
            want: want.clone(),
            seqs: all(|_| true),
            enter: all(|moved| moved == 1),
            leave: all(|moved| moved == 2),
        });
    }
    Ok(())
}

fn condition(want: &Want) -> String {
    let tables: Vec<String> = want
        .tables
        .iter()
        .map(|table| match table.as_str() {
            "*" => "table_name NOT LIKE 'event:%'".into(),
            "event:*" => "table_name LIKE 'event:%'".into(),
            glob if glob.ends_with(".*") => format!("table_name LIKE '{}%'", &glob[..glob.len() - 1]),
            name => format!("table_name = '{name}'"),
        })
        .collect();
    let ops = want.ops.as_ref().map_or_else(
        || "true".to_owned(),
        |ops| {
            let list: Vec<String> = ops.iter().map(|op| format!("'{op}'")).collect();
            format!("operation IN ({})", list.join(", "))
        },
    );
    let filter = want.filter.as_ref().map_or_else(
        || "true".to_owned(),
        |filter| {
            format!(
                "(omitted OR operation = 'TRUNCATE'
                  OR operation IN ('INSERT', 'UPDATE', 'EVENT') AND {}
                  OR operation IN ('UPDATE', 'DELETE') AND {})",
                holds(filter, "a"),
                holds(filter, "b")
            )
        },
    );
    format!("({}) AND (operation = 'SCHEMA' OR ({ops}) AND {filter})", tables.join(" OR "))
}

/// Whether the filter holds for the row before (`b`) or after (`a`); never null.
fn holds(filter: &str, side: &str) -> String {
    format!(
        "(SELECT ({filter}) IS TRUE FROM (SELECT {side}_id AS id, {side}_val AS val, {side}_prev AS prev,
          {side}_w AS w, images.payload, images.aggregate_id, images.event_type) AS image)"
    )
}

/// How a row moved over the filter: 1 it entered, 2 it left, 0 neither. By protocol only an UPDATE with both images moves
/// a row, and only a subscription with a filter hears of it.
fn moved(want: &Want) -> String {
    want.filter.as_ref().map_or_else(
        || "0".to_owned(),
        |filter| {
            let (before, after) = (holds(filter, "b"), holds(filter, "a"));
            format!(
                "CASE WHEN operation <> 'UPDATE' OR omitted OR NOT has_before OR {before} = {after} THEN 0
                      WHEN {after} THEN 1 ELSE 2 END"
            )
        },
    )
}

/// Ascending numbers as runs of consecutive ones.
fn runs(seqs: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for seq in seqs {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == seq => *last = seq,
            _ => runs.push((seq, seq)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_hold_exactly_the_numbers() {
        assert_eq!(runs([1, 2, 3, 7, 9, 10].into_iter()), [(1, 3), (7, 7), (9, 10)]);
        assert_eq!(runs(std::iter::empty()), []);
    }
}
