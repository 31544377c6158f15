//! Tracked tables as the catalog describes them: the statements that ask, and a row of their answers as a [`TableInfo`].

use std::collections::HashMap;

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::TableInfo;
use crate::filter::{Column, ColumnType, Server};
use crate::postgres::Pool;
use crate::table_name::TableName;

// The triggers are the truth about how a table is captured; tidewire.tracked_tables speaks where they are gone.
macro_rules! described {
    ($from:literal) => {
        concat!(
            "SELECT current_setting('server_version_num')::int AS server_version, c.oid AS relid, tidewire.table_text(c.oid) AS name, t.relid IS NOT NULL OR o.options IS NOT NULL AS tracked,
                    tidewire.table_fingerprint(c.oid)::text AS fingerprint,
                    CASE WHEN o.options IS NULL THEN t.key_columns ELSE tidewire.column_names(c.oid, o.options, 'key') END AS key_columns,
                    CASE WHEN o.options IS NULL THEN t.columns ELSE tidewire.column_names(c.oid, o.options, 'columns') END AS columns,
                    CASE WHEN o.options IS NULL THEN t.except_columns ELSE tidewire.column_names(c.oid, o.options, 'except_columns') END
                        AS except_columns,
                    coalesce((o.options ->> 'before_image')::boolean, t.before_image, true) AS before_image,
                    CASE WHEN coalesce((o.options ->> 'notify')::boolean, t.notify) THEN tidewire.notify_channel(c.oid) END AS notify_channel,
                    coalesce(t.fingerprint -> 'faults', '[]') AS faults, ",
            $from,
            " LEFT JOIN LATERAL (SELECT CASE WHEN c.relispartition AND t.relid IS NULL THEN NULL
                                         ELSE tidewire.tracked_options(c.oid) END AS options) AS o ON true"
        )
    };
}

// Without those whose names cannot leave the server (bytes that are not UTF-8 in a database of SQL_ASCII): nobody can ask for
// them, and the others must not be lost for them.
const ALL_TRACKED: &str = described!(
    "0::bigint AS position
     FROM tidewire.tracked_tables t
     JOIN pg_catalog.pg_class c ON c.oid = t.relid
         AND (getdatabaseencoding() = 'UTF8'
              OR tidewire.utf8_bytes(concat_ws(' ', tidewire.table_text(c.oid), tidewire.table_fingerprint(c.oid))) IS NOT NULL)"
);

// $1 schemas, $2 tables. The partitions of a tracked table carry its triggers, but are not tracked themselves.
const NAMED: &str = described!(
    "asked.position, c.relkind::text AS relkind,
                    CASE WHEN c.relispartition THEN tidewire.table_text(pg_catalog.pg_partition_root(c.oid)) END AS root
     FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS asked (schema, name, position)
     JOIN pg_catalog.pg_namespace n ON n.nspname = asked.schema
     JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = asked.name AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
     LEFT JOIN tidewire.tracked_tables t ON t.relid = c.oid"
);

/// A table, tracked or not.
#[derive(Clone, Debug)]
pub struct Described {
    /// How it looks, and how it is tracked if it is.
    pub info: TableInfo,
    /// Its changes are captured.
    pub tracked: bool,
    /// `pg_class.relkind`.
    pub kind: String,
    /// Of a partition, the table at the top.
    pub root: Option<String>,
}

/// Asks for these tables; those that do not exist are not in the answer.
///
/// # Errors
/// Postgres could not be asked.
pub async fn describe(pool: &Pool, names: &[TableName]) -> Result<HashMap<TableName, Described>, sqlx::Error> {
    let (mut asked, mut schemas, mut tables) = (Vec::new(), Vec::new(), Vec::new());
    for name in names {
        if let Some((schema, table)) = name.schema_and_table() {
            schemas.push(schema.into_owned());
            tables.push(table.into_owned());
            asked.push(name);
        }
    }
    let rows = sqlx::query(NAMED).bind(&schemas).bind(&tables).fetch_all(pool).await?;
    let mut found = HashMap::with_capacity(rows.len());
    for row in &rows {
        let position: i64 = row.try_get("position")?;
        let Some(name) = usize::try_from(position - 1).ok().and_then(|index| asked.get(index)) else { continue };
        let described = Described {
            info: table_info(row)?,
            tracked: row.try_get("tracked")?,
            kind: row.try_get("relkind")?,
            root: row.try_get("root")?,
        };
        found.insert((*name).clone(), described);
    }
    Ok(found)
}

/// Every tracked table.
///
/// # Errors
/// Postgres could not be asked.
pub async fn tracked(pool: &Pool) -> Result<Vec<TableInfo>, sqlx::Error> {
    let rows = sqlx::query(ALL_TRACKED).fetch_all(pool).await?;
    rows.iter().map(table_info).collect()
}

/// The server that answers.
///
/// # Errors
/// Postgres could not be asked.
pub async fn server_of(pool: &Pool) -> Result<Server, sqlx::Error> {
    server(&sqlx::query("SELECT current_setting('server_version_num')::int AS server_version").fetch_one(pool).await?)
}

/// The server that answered.
fn server(row: &PgRow) -> Result<Server, sqlx::Error> {
    Ok(Server::from_version_num(row.try_get("server_version")?))
}

/// What is needed of `tidewire.table_fingerprint()`.
#[derive(serde::Deserialize)]
struct Shape {
    row_security: bool,
    columns: Vec<ShapeColumn>,
}

#[derive(serde::Deserialize)]
struct ShapeColumn {
    name: String,
    #[serde(rename = "type")]
    declared_type: String,
    type_name: String,
    type_kind: String,
}

fn table_info(row: &PgRow) -> Result<TableInfo, sqlx::Error> {
    let fingerprint: String = row.try_get("fingerprint")?;
    let shape: Shape = serde_json::from_str(&fingerprint).map_err(|error| sqlx::Error::Decode(error.into()))?;
    let (columns, declared_types): (Vec<Column>, Vec<String>) = shape
        .columns
        .into_iter()
        .map(|column| {
            let kind = column.type_kind.chars().next().unwrap_or('b');
            let of_type = ColumnType::from_postgres(&column.type_name, kind);
            (Column::new(column.name, of_type), column.declared_type)
        })
        .unzip();
    let key_columns: Option<Vec<String>> = row.try_get("key_columns")?;
    let listed: Option<Vec<String>> = row.try_get("columns")?;
    let excepted: Option<Vec<String>> = row.try_get("except_columns")?;
    let captured = match (listed, excepted) {
        // The key is always carried.
        (Some(listed), _) => {
            Some(listed.into_iter().chain(key_columns.iter().flatten().cloned()).map(String::into_boxed_str).collect())
        }
        (None, Some(excepted)) => Some(
            columns
                .iter()
                .filter(|column| !excepted.contains(&column.name))
                .map(|column| column.name.as_str().into())
                .collect(),
        ),
        (None, None) => None,
    };
    Ok(TableInfo {
        name: TableName::from_canonical(&row.try_get::<String, _>("name")?),
        server: server(row)?,
        relid: row.try_get::<sqlx::postgres::types::Oid, _>("relid")?.0,
        columns,
        declared_types,
        captured,
        before_image: row.try_get("before_image")?,
        key_columns,
        row_security: shape.row_security,
        faults: row.try_get::<sqlx::types::Json<Vec<String>>, _>("faults")?.0,
        notify_channel: row.try_get("notify_channel")?,
    })
}
