//! A row of the log as an [`Event`]; the same for the claim's result and for every reading.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use crate::event::{Event, NewEvent, Operation};

/// The columns that [`event`] reads, in its order.
macro_rules! event_columns {
    () => {
        "seq, xid::text::bigint, tx_end, omitted, event_id, table_name, operation, row_key, old_key, before_data, after_data, event_type, headers, created_at"
    };
}
pub(super) use event_columns;

/// The event of a row that selected [`event_columns`], beginning at column 0.
pub(super) fn event(row: &PgRow, intern: &mut Interner) -> Result<Event, sqlx::Error> {
    // `json` is its text on the wire; sqlx would check the type and refuse &str.
    let json = |index: usize| row.try_get_unchecked::<Option<&str>, _>(index);
    let operation = Operation::parse(row.try_get(6)?);
    let (seq, xid): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let omitted = row.try_get::<bool, _>(3)? || operation.is_none();
    let new = NewEvent {
        event_id: row.try_get::<Uuid, _>(4)?,
        table: row.try_get(5)?,
        // Only an owner can have written another text; its place is kept, without its rows.
        operation: operation.unwrap_or(Operation::Update),
        key: json(7)?,
        old_key: json(8)?,
        before: json(9)?,
        after: json(10)?,
        event_type: row.try_get(11)?,
        headers: json(12)?,
        xid: xid.cast_unsigned(),
        created_at: row.try_get::<DateTime<Utc>, _>(13)?,
        omitted,
    };
    let images = [new.key, new.old_key, new.before, new.after, new.headers];
    let mut body = String::with_capacity(160 + images.iter().flatten().map(|text| text.len()).sum::<usize>());
    new.compose(&mut body);
    Ok(Event {
        seq: seq.cast_unsigned(),
        id: new.event_id,
        xid: new.xid,
        operation: new.operation,
        tx_end: row.try_get(2)?,
        omitted,
        table: intern.share(new.table),
        body: body.into(),
    })
}

/// Shares the names of tables: events of one table hold one allocation.
#[derive(Debug, Default)]
pub struct Interner(hashbrown::HashMap<Arc<str>, ()>);

/// Names kept; beyond, the set is begun anew (domain events may have any number of types).
const MAX_NAMES: usize = 10_000;

impl Interner {
    /// The shared form of a name.
    pub fn share(&mut self, name: &str) -> Arc<str> {
        if let Some((shared, ())) = self.0.get_key_value(name) {
            return Arc::clone(shared);
        }
        if self.0.len() >= MAX_NAMES {
            self.0.clear();
        }
        let shared: Arc<str> = name.into();
        self.0.insert(Arc::clone(&shared), ());
        shared
    }
}
