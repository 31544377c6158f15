//! Conditions against Postgres itself: whatever a filter answers, Postgres answers.

mod conditions;
mod neighbours;

use std::collections::HashMap;

use serde_json::value::RawValue;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, Row};
use tidewire::filter::{Column, ColumnType, Filter, Outcome, RowImage, Server, index_key_of};

use conditions::Dice;

/// Rows that every condition is tried on.
const ROWS: usize = 120;
/// Conditions to a query.
const BATCH: usize = 250;

/// What the protocol promises of JSON values.
const SETTINGS: &str =
    "SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET IntervalStyle = 'iso_8601'; SET bytea_output = 'hex';
    SET extra_float_digits = 1; SET jit = off;";

/// Answers each condition for each row with a letter: t, f, n (NULL), e (an error in this row); or `refused: ` and the
/// reason if it is not valid SQL. Errors of class 22 are about data, the others about the text.
const ORACLE: &str = "CREATE FUNCTION filter_oracle(conditions text[]) RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    condition text;
    answer text;
    letter text;
    query text;
    row_number int;
BEGIN
    FOREACH condition IN ARRAY conditions LOOP
        query := 'SELECT CASE WHEN (' || condition || ') IS TRUE THEN ''t'' WHEN (' || condition || ') IS FALSE THEN ''f''
            ELSE ''n'' END AS letter, n FROM filter_rows';
        BEGIN
            EXECUTE 'SELECT string_agg(letter, '''' ORDER BY n) FROM (' || query || ') AS letters' INTO answer;
        EXCEPTION WHEN data_exception THEN
            answer := '';
            FOR row_number IN SELECT n FROM filter_rows ORDER BY n LOOP
                BEGIN
                    EXECUTE query || ' WHERE n = ' || row_number INTO letter;
                EXCEPTION WHEN data_exception THEN
                    letter := 'e';
                END;
                answer := answer || letter;
            END LOOP;
        WHEN OTHERS THEN
            answer := 'refused: ' || SQLERRM;
        END;
        RETURN NEXT answer;
    END LOOP;
END $$";

struct Image(HashMap<String, Box<RawValue>>);

impl RowImage for Image {
    fn column(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|raw| raw.get())
    }
}

/// An image that lacks the columns with a set bit.
struct Partial<'a> {
    whole: &'a Image,
    columns: &'a [Column],
    missing: u64,
}

impl RowImage for Partial<'_> {
    fn column(&self, name: &str) -> Option<&str> {
        let place = self.columns.iter().position(|column| column.name == name)?;
        if self.missing >> place & 1 == 1 { None } else { self.whole.column(name) }
    }
}

/// How often which case came up; a test of nothing but refusals would prove nothing.
#[derive(Debug, Default)]
struct Tally {
    answered: usize,
    both_refused: usize,
    only_we_refused: Vec<String>,
    truths: usize,
    undetermined: usize,
    /// Answers by canonical text.
    answers: HashMap<String, String>,
}

/// Compares `cases` random conditions with Postgres on random rows. Panics at the first that differs.
///
/// Makes a database of its own beside the pool's, with the collation of the language.
pub(crate) async fn check_against(pool: &PgPool, cases: usize, seed: u64) {
    in_c(pool, async |connection| check_in(connection, cases, seed).await).await;
}

/// A database with the collation of the language, with the settings of what rows carry and the oracle.
async fn in_c(pool: &PgPool, check: impl AsyncFnOnce(&mut PgConnection)) {
    let name: String = sqlx::query_scalar("SELECT current_database() || '_in_c'").fetch_one(pool).await.unwrap();
    let mut owner = pool.acquire().await.unwrap().detach();
    run(&mut owner, &format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)")).await;
    run(&mut owner, &format!("CREATE DATABASE \"{name}\" TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C'")).await;
    let options = pool.connect_options().as_ref().clone().database(&name);
    let mut connection = PgConnection::connect_with(&options).await.unwrap();
    run(&mut connection, SETTINGS).await;
    run(&mut connection, ORACLE).await;
    check(&mut connection).await;
    connection.close().await.unwrap();
    run(&mut owner, &format!("DROP DATABASE \"{name}\" WITH (FORCE)")).await;
}

/// What the server that answers reads.
async fn server(connection: &mut PgConnection) -> Server {
    let number: i32 =
        sqlx::query_scalar("SELECT current_setting('server_version_num')::int").fetch_one(connection).await.unwrap();
    Server::from_version_num(number)
}

async fn check_in(connection: &mut PgConnection, cases: usize, seed: u64) {
    run(connection, "CREATE TYPE filter_status AS ENUM ('new', 'paid', 'on hold', 'Ünïcode \"q\"')").await;
    let mut dice = Dice::new(seed);
    run(connection, &conditions::table(&mut dice, ROWS)).await;
    let server = server(connection).await;
    let columns = columns(connection).await;
    let images = images(connection).await;
    let mut tally = Tally::default();
    let mut left = cases;
    while left > 0 {
        let batch: Vec<String> = (0..BATCH.min(left)).map(|_| conditions::condition(&mut dice, 2)).collect();
        left -= batch.len();
        let answers: Vec<String> = sqlx::query_scalar("SELECT * FROM filter_oracle($1)")
            .bind(&batch)
            .fetch_all(&mut *connection)
            .await
            .unwrap();
        for (condition, answer) in batch.iter().zip(&answers) {
            compare(condition, answer, &columns, &images, server, &mut dice, &mut tally);
        }
    }
    assert!(tally.answered * 2 > cases && tally.truths > cases && tally.undetermined > cases, "{tally:?}");
    assert!(tally.only_we_refused.len() * 20 < cases, "{tally:?}");
}

async fn run(connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(connection)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

async fn columns(connection: &mut PgConnection) -> Vec<Column> {
    sqlx::query(
        "SELECT attname::text, base.typname::text, base.typtype::text
         FROM pg_attribute
         JOIN pg_type AS declared ON declared.oid = atttypid
         JOIN pg_type AS base ON base.oid = CASE declared.typtype WHEN 'd' THEN declared.typbasetype ELSE declared.oid END
         WHERE attrelid = 'filter_rows'::regclass AND attnum > 0
         ORDER BY attnum",
    )
    .fetch_all(connection)
    .await
    .unwrap()
    .iter()
    .map(|row| {
        let (name, typname, typtype): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        Column::new(name, ColumnType::from_postgres(&typname, typtype.chars().next().unwrap()))
    })
    .collect()
}

async fn images(connection: &mut PgConnection) -> Vec<Image> {
    let rows: Vec<String> = sqlx::query_scalar("SELECT to_json(r)::text FROM filter_rows AS r ORDER BY n")
        .fetch_all(connection)
        .await
        .unwrap();
    rows.iter().map(|row| Image(serde_json::from_str(row).unwrap())).collect()
}

fn compare(
    condition: &str,
    answer: &str,
    columns: &[Column],
    images: &[Image],
    server: Server,
    dice: &mut Dice,
    tally: &mut Tally,
) {
    let refused = answer.starts_with("refused: ");
    let filter = match Filter::compile_for(condition, columns, server) {
        Ok(filter) => filter,
        Err(_) if refused || !answer.contains(['t', 'f', 'n']) => {
            tally.both_refused += 1;
            return;
        }
        Err(error) => {
            tally.only_we_refused.push(format!("{condition}: {error}"));
            return;
        }
    };
    assert!(!refused, "we take what Postgres refuses: {condition}\n{answer}");
    tally.answered += 1;
    if let Some(twin) = tally.answers.insert(filter.canonical().to_owned(), answer.to_owned()) {
        let differ = twin.chars().zip(answer.chars()).any(|(one, other)| one != other && one != 'e' && other != 'e');
        assert!(!differ, "{condition} is not the same as another with the canonical text {}", filter.canonical());
    }
    let conjunct = filter.index_conjunct();
    for (image, letter) in images.iter().zip(answer.chars()) {
        let expected = match letter {
            't' => Some(true),
            'f' => Some(false),
            'n' => None,
            // Where Postgres raises an error, the filter's answer is free.
            _ => continue,
        };
        let row = || serde_json::to_string(&image.0).unwrap();
        assert_eq!(filter.eval(image), expected, "{condition}\n{}\n{filter:?}", row());
        let missing = u64::from_le_bytes(std::array::from_fn(|_| u8::try_from(dice.below(256)).unwrap()));
        let partial = Partial { whole: image, columns, missing };
        match filter.eval_checked(&partial) {
            Outcome::Matches => assert_eq!(expected, Some(true), "{condition} without {missing:b}\n{}", row()),
            Outcome::Differs => assert_ne!(expected, Some(true), "{condition} without {missing:b}\n{}", row()),
            Outcome::Undetermined => tally.undetermined += 1,
        }
        if expected != Some(true) {
            continue;
        }
        tally.truths += 1;
        if let Some(conjunct) = &conjunct {
            let column = columns.iter().find(|column| column.name == conjunct.column).unwrap();
            let key = image.column(&column.name).and_then(|raw| index_key_of(column.kind, raw));
            assert!(
                key.is_some_and(|key| conjunct.keys.contains(&key)),
                "{condition} is not found by its key\n{}",
                row()
            );
        }
    }
}

#[tokio::test]
async fn a_filter_answers_what_postgres_answers() {
    let database = crate::support::postgres::database().await;
    check_against(&database.pool, 3_000, 20_261_120).await;
}
