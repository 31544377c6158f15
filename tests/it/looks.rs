//! What the leader's look finds: keys that lose a column, types that change inside of others.

use crate::capture::{database_with, run, strings};
use crate::support::postgres::TestDatabase;

/// Looks as the leader does, and takes what it wrote: the changes, and the keys of what was captured.
async fn seen(database: &TestDatabase) -> Vec<String> {
    let mut connection = database.pool.acquire().await.unwrap();
    tidewire::schema::watch::look(&mut connection).await.unwrap();
    let sql = "WITH taken AS (DELETE FROM tidewire.outbox RETURNING *)
        SELECT concat_ws(' ', operation, row_key::text, (
            SELECT string_agg(concat_ws(' ', change ->> 'kind', change ->> 'column', change ->> 'from', 'to ' || coalesce(change ->> 'to', 'null')), ', ')
            FROM json_array_elements(CASE operation WHEN 'SCHEMA' THEN after_data -> 'changes' END) change))
        FROM taken ORDER BY id";
    strings(&database.pool, sql).await
}

/// Found in review: two rows got one key, and the event said that the key was as before.
#[tokio::test]
async fn a_key_that_loses_a_column_is_no_key_any_more() {
    for event_triggers in [true, false] {
        for options in ["", ", bulk => true"] {
            let database = database_with(&format!(
                "CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL, b int NOT NULL, c int, UNIQUE (a, b));
                 SELECT tidewire.track('t', key => '{{a,b}}'{options})"
            ))
            .await;
            if !event_triggers {
                run(&database.pool, "DROP EVENT TRIGGER tidewire_attach; DROP EVENT TRIGGER tidewire_ddl; DROP EVENT TRIGGER tidewire_drop").await;
            }
            run(&database.pool, "ALTER TABLE t DROP COLUMN b; INSERT INTO t (id, a) VALUES (1, 1), (2, 1)").await;
            let told = seen(&database).await;
            assert_eq!(told[..2], ["INSERT", "INSERT"], "{options}");
            assert!(told[2].contains(r#"key ["a","b"] to null"#), "{options} {told:?}");
            run(&database.pool, "ALTER TABLE t ADD COLUMN b int; INSERT INTO t (id, a) VALUES (3, 1)").await;
            assert_eq!(seen(&database).await[0], "INSERT", "{options}: a column of that name is another");
            let key = "SELECT coalesce(key_columns::text, 'none') FROM tidewire.tracked_tables";
            assert_eq!(strings(&database.pool, key).await, ["none"], "{options}");
            run(&database.pool, "SELECT tidewire.track('t', key => '{id}'); INSERT INTO t (id, a) VALUES (4, 1)").await;
            assert_eq!(seen(&database).await[0], r#"INSERT {"id":4}"#, "{options}");
        }
    }
}

/// Found in review: what a column's type has inside of itself changed without a word.
#[tokio::test]
async fn a_change_inside_of_a_columns_type_is_told_however_deep() {
    for (column, change) in [
        ("mood", "ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'"),
        ("mood[]", "ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'"),
        ("mood_domain", "ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'"),
        ("mood_domain[]", "ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'"),
        ("mood_range", "ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'"),
        ("inner_row", "ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'"),
        ("outer_row", "ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'"),
        ("outer_row", "ALTER TYPE inner_row RENAME ATTRIBUTE n TO m"),
        ("outer_row[]", "ALTER TYPE inner_row RENAME ATTRIBUTE n TO m"),
        ("row_domain", "ALTER TYPE inner_row RENAME ATTRIBUTE n TO m"),
        ("other", "ALTER TABLE other RENAME n TO m"),
    ] {
        let database = database_with(&format!(
            "CREATE TYPE mood AS ENUM ('good', 'bad'); CREATE DOMAIN mood_domain AS mood; CREATE TYPE mood_range AS RANGE (subtype = mood);
             CREATE TYPE inner_row AS (x mood, n int); CREATE TYPE outer_row AS (y inner_row[], z int); CREATE DOMAIN row_domain AS outer_row;
             CREATE TABLE other (n int); CREATE TABLE t (id int PRIMARY KEY, c {column}); SELECT tidewire.track('t')"
        ))
        .await;
        assert!(seen(&database).await.is_empty(), "{column}: nothing happened");
        run(&database.pool, change).await;
        let told = seen(&database).await;
        assert!(told.len() == 1 && told[0].starts_with("SCHEMA alter_type c "), "{column} {change}: {told:?}");
        assert!(seen(&database).await.is_empty(), "{column}: told once");
    }
}
