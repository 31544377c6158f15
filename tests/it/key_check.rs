//! A key's scopes are held against the database when it is made: what can never work is refused, what does not work yet is
//! a warning.

use clap::Parser;
use serde_json::{Value, json};
use tidewire::auth::scope::Scopes;
use tidewire::auth::store;
use tidewire::cli::keys::{self, KeysArgs, check};

use crate::support::postgres::{TestDatabase, database};

const TABLES: &str = r#"CREATE TYPE mood AS ENUM ('good');
    CREATE TABLE whole (id int PRIMARY KEY, "Note" text, feeling mood, day date); SELECT tidewire.track('whole');
    CREATE TABLE listed (id int PRIMARY KEY, a int, b text); SELECT tidewire.track('listed', columns => '{a}');
    CREATE TABLE lean (id int PRIMARY KEY, a int); SELECT tidewire.track('lean', before_image => false);
    CREATE TABLE guarded (id int PRIMARY KEY); ALTER TABLE guarded ENABLE ROW LEVEL SECURITY; SELECT tidewire.track('guarded');
    CREATE TABLE untracked (id int PRIMARY KEY);
    CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id);
    CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (10); SELECT tidewire.track('parted');
    CREATE VIEW seen AS SELECT 1 AS id; CREATE MATERIALIZED VIEW kept AS SELECT 1 AS id;
    CREATE SCHEMA sales; CREATE TABLE sales.lines (id int PRIMARY KEY, tenant int); SELECT tidewire.track('sales.lines');
    CREATE TABLE sales.notes (id int PRIMARY KEY); SELECT tidewire.track('sales.notes')"#;

/// Entries, and words of what is said of them: `!` before an error, nothing before a warning, none for what fits.
fn cases() -> Vec<(Value, &'static [&'static str])> {
    vec![
        (json!({"table": "whole"}), &[]),
        (json!({"table": "whole", "columns": ["id", "Note"], "condition": "\"Note\" = 'x' AND day > '20260101'"}), &[]),
        (json!({"table": "whole", "columns": ["id"], "condition": "feeling = 'good'"}), &[]),
        (json!({"table": "whole", "ops": ["INSERT", "EVENT"]}), &[]),
        (json!({"table": "event:x", "ops": ["INSERT", "EVENT"], "condition": "payload ->> 'a' = 'b'"}), &[]),
        (json!({"table": "nowhere", "ops": []}), &[]),
        (json!({"table": "parted"}), &[]),
        (json!({"table": "sales.*", "condition": "id > 5"}), &[]),
        (json!({"table": "*"}), &[]),
        // Tables.
        (json!({"table": "nowhere"}), &["no such table yet"]),
        (json!({"table": "Whole"}), &["no such table yet"]),
        (json!({"table": "nowhere", "condition": "any_column = 1"}), &["no such table yet"]),
        (json!({"table": "nowhere", "condition": "a = "}), &["!condition", "no such table yet"]),
        (json!({"table": "untracked"}), &["not tracked yet"]),
        (json!({"table": "untracked", "columns": ["nothing"]}), &["!no column \"nothing\"", "not tracked yet"]),
        (json!({"table": "parted_1"}), &["!events are those of public.parted"]),
        (json!({"table": "seen"}), &["!a view"]),
        (json!({"table": "kept"}), &["!a materialized view"]),
        (json!({"table": "pg_catalog.pg_class"}), &["!a system table"]),
        (json!({"table": "tidewire.outbox"}), &["!a system table"]),
        (json!({"table": "tidewire.nothing"}), &["!cannot be tracked"]),
        (json!({"table": "nowhere.*"}), &["no tracked table has such a name"]),
        (json!({"table": "guarded"}), &["row level security"]),
        (json!({"table": "guarded", "condition": "id > 5"}), &[]),
        // Operations.
        (json!({"table": "whole", "ops": ["EVENT"]}), &["!EVENT never happens"]),
        (json!({"table": "*", "ops": ["EVENT"]}), &["!EVENT never happens"]),
        (json!({"table": "event:*", "ops": ["INSERT", "DELETE"]}), &["!INSERT, DELETE never happens"]),
        // Columns.
        (json!({"table": "whole", "columns": ["id", "note"]}), &["!no column \"note\"; there is \"Note\""]),
        (json!({"table": "whole", "hidden_columns": ["secret"]}), &["!no column \"secret\""]),
        (json!({"table": "whole", "columns": ["id"], "hidden_columns": ["id"]}), &["no column can be read"]),
        (json!({"table": "listed", "columns": ["b"]}), &["without any of these columns"]),
        (json!({"table": "*", "hidden_columns": ["secret"]}), &["no tracked table has a column \"secret\""]),
        (json!({"table": "lean", "hidden_columns": ["a"]}), &["an UPDATE of hidden columns alone is sent"]),
        (json!({"table": "lean", "hidden_columns": ["a"], "ops": ["INSERT"]}), &[]),
        // Conditions.
        (json!({"table": "whole", "condition": "id ~ 'x'"}), &["!at character 4"]),
        (json!({"table": "whole", "condition": "nothing = 1"}), &["!no column \"nothing\""]),
        (json!({"table": "whole", "condition": "Note = 'x'"}), &["!double quotes"]),
        (json!({"table": "whole", "condition": "day = 'tomorrow'"}), &["!not a value of type date"]),
        (json!({"table": "whole", "condition": "id = 'x'"}), &["!not a value of type integer"]),
        (json!({"table": "whole", "condition": "id"}), &["!must be boolean"]),
        (json!({"table": "whole", "condition": "id = NULL"}), &["no row satisfies"]),
        (json!({"table": "whole", "condition": "false"}), &["no row satisfies"]),
        (json!({"table": "listed", "condition": "b = 'x'"}), &["tracked without \"b\""]),
        (json!({"table": "lean", "condition": "a = 1"}), &["without before images"]),
        (json!({"table": "event:x", "condition": "tenant = 1"}), &["!no column \"tenant\""]),
        (json!({"table": "sales.*", "condition": "tenant = 7"}), &["does not fit sales.notes"]),
        (
            json!({"table": "sales.*", "condition": "tenant ="}),
            &["!condition", "does not fit sales.lines, sales.notes"],
        ),
    ]
}

#[tokio::test]
async fn what_can_never_work_is_refused_and_what_does_not_work_yet_is_told() {
    let db = database().await;
    sqlx::raw_sql(TABLES).execute(&db.pool).await.unwrap();
    for (entry, expected) in cases() {
        let scopes: Scopes = serde_json::from_value(json!({"tables": [entry]})).unwrap();
        let found = check(&db.pool.clone().into(), &scopes).await.unwrap();
        let said: Vec<String> = found.errors.iter().map(|error| format!("!{error}")).chain(found.warnings).collect();
        let fits = |(said, expected): (&String, &&str)| {
            let words = expected.trim_start_matches('!');
            said.starts_with('!') == expected.starts_with('!') && said.contains(words)
        };
        assert!(said.len() == expected.len() && said.iter().zip(expected).all(fits), "{entry}: {said:#?}");
    }
}

async fn create(db: &TestDatabase, line: &[&str]) -> anyhow::Result<()> {
    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        keys: KeysArgs,
    }
    let words = ["tidewire", "create", "--name", "test", "--json"].iter().chain(line);
    keys::run(Program::try_parse_from(words)?.keys, &db.pool.clone().into()).await
}

#[tokio::test]
async fn a_key_that_could_never_work_is_not_made() {
    let db = database().await;
    sqlx::raw_sql(TABLES).execute(&db.pool).await.unwrap();
    let refused = create(&db, &["--table", "whole", "--column", "nothing"]).await.unwrap_err().to_string();
    assert!(refused.contains("no key was made") && refused.contains("public.whole"), "{refused}");
    assert!(create(&db, &["--table", "whole", "--condition", "id ="]).await.is_err());
    assert_eq!(store::list(&db.pool.clone().into()).await.unwrap().len(), 0);
    create(&db, &["--table", "later", "--column", "any"]).await.unwrap();
    create(&db, &["--table", "whole", "--table", "event:x", "--op", "insert", "--op", "event"]).await.unwrap();
    create(&db, &["--all"]).await.unwrap();
    assert_eq!(store::list(&db.pool.clone().into()).await.unwrap().len(), 3);
}
