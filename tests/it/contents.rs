//! No content stops the relay or takes its memory: what cannot be carried keeps its place, `omitted`, and is kept as it was in
//! `dead_letters`; what stands around it is relayed as ever.

use sqlx::Row as _;

use crate::capture::run;
use crate::support::client::key_of;
use crate::support::cluster::TestCluster;
use crate::support::postgres::{TestDatabase, database};
use crate::support::relay::{Term, Writer, emit, faults};

/// The bound of [`Term`], bytes.
const EVENT_BYTES: usize = 4 << 20;
/// What an event has at most that is sent without its rows: names and keys.
const SHELL_BYTES: usize = 32 << 10;

/// A text that does not compress: hexadecimal digits of hashes, `$1` megabytes of them.
const NOISE: &str = "CREATE FUNCTION noise(megabytes int) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(sha512(g::text::bytea)::text, '') FROM generate_series(1, megabytes * 1000000 / 130) g $$";

/// What was written, which column of the dead letter keeps it, and how long that is.
const TOO_LARGE: &[(&str, &str, usize)] = &[
    ("emit('t', '1', repeat('e', 20000000), '{}')", "event_type", 20_000_000),
    ("emit('t', '1', noise(6), '{}')", "event_type", 5_900_000),
    // Six bytes each in JSON.
    ("emit('t', '1', repeat(chr(1), 2000000), '{}')", "event_type", 2_000_000),
    ("emit(repeat('a', 20000000), '1', 'e', '{}')", "table_name", 20_000_000),
    ("emit(repeat('ä', 600), '1', 'e', '{}')", "table_name", 1_200),
    ("emit('t', repeat('i', 9000000), 'e', '{}')", "row_key", 9_000_000),
    ("emit('t', '1', 'e', to_json(repeat('p', 9000000)))", "after_data", 9_000_000),
    ("emit('t', '1', 'e', to_json(noise(5)))", "after_data", 4_900_000),
    ("emit('t', '1', 'e', '{}', json_build_object('h', repeat('h', 9000000)))", "headers", 9_000_000),
    // Neither alone is too large.
    ("emit('t', '1', repeat('e', 2500000), to_json(repeat('p', 2500000)))", "after_data", 2_500_000),
];

async fn letters(database: &TestDatabase, column: &str) -> Vec<(i64, String, i32)> {
    let asked = format!(
        "SELECT seq, error, coalesce(octet_length({column}::text), 0) AS bytes FROM tidewire.dead_letters ORDER BY id"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(asked)).fetch_all(&database.pool).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()
}

#[tokio::test]
async fn whatever_is_too_large_of_an_event_goes_without_its_rows() {
    let database = database().await;
    run(&database.pool, NOISE).await;
    let mut term = Term::begin(&database.url, 100).await.unwrap();
    let mut writer = Writer::connect(&database.url).await;
    for (index, (call, column, bytes)) in TOO_LARGE.iter().enumerate() {
        writer.run(&format!("BEGIN; {} SELECT tidewire.{call}; {} COMMIT", emit("before"), emit("after"))).await;
        assert_eq!(term.drain().await, 3, "{call}");
        let events = &term.appended[term.appended.len() - 3..];
        assert_eq!(events.iter().map(|event| event.omitted).collect::<Vec<_>>(), [false, true, false], "{call}");
        assert!(events[1].bytes() < SHELL_BYTES, "{call}: {} bytes", events[1].bytes());
        assert!(events[1].table.len() <= 1_000, "{call}");
        let letters = letters(&database, column).await;
        let (seq, error, kept) = &letters[index];
        assert_eq!(*seq, events[1].seq.cast_signed(), "{call}");
        assert!(usize::try_from(*kept).unwrap() >= *bytes, "{call}: {kept} bytes of {column}");
        assert!(error.contains("larger than") || error.contains("longer than"), "{call}: {error}");
    }
    // What every node reads of it is what the leader sent.
    let read =
        tidewire::log::read::events(&database.pool.clone().into(), 0, term.newest, 1_000, usize::MAX).await.unwrap();
    assert_eq!(read, term.appended);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test]
async fn an_event_just_under_the_bound_goes_whole() {
    let database = database().await;
    let mut term = Term::begin(&database.url, 100).await.unwrap();
    let mut writer = Writer::connect(&database.url).await;
    let length = EVENT_BYTES - 200;
    writer.run(&format!("SELECT tidewire.emit('t', '1', 'e', to_json(repeat('p', {length})))")).await;
    writer.run(&format!("SELECT tidewire.emit('t', '1', repeat('e', {length}), '{{}}')")).await;
    assert_eq!(term.drain().await, 2);
    assert!(term.appended.iter().all(|event| !event.omitted));
    assert!(letters(&database, "after_data").await.is_empty());
}

/// The leader keeps a part of such a claim only; what it does not announce is read from the log.
#[tokio::test]
async fn a_claim_larger_than_the_leader_keeps_arrives_whole() {
    let cluster = TestCluster::start(2).await;
    let mut clients = [cluster.node(0).client("orders").await, cluster.node(1).client("orders").await];
    let large = "INSERT INTO orders (id, note) SELECT g, CASE WHEN g % 4 > 0 THEN repeat(md5(g::text), 90000) END";
    cluster.run(&format!("{large} FROM generate_series(1, 16) g")).await;
    cluster.insert("orders", 17..=18).await;
    for client in &mut clients {
        let events = client.events(18).await;
        let notes = events.iter().filter(|event| event.after.text().unwrap().len() > 2_800_000).count();
        assert_eq!((notes, events.iter().filter(|event| event.omitted).count()), (12, 0));
        assert_eq!(events.iter().map(key_of).collect::<Vec<_>>(), (1..=18).collect::<Vec<_>>());
    }
}

/// How capture marks a row that it could not render.
#[tokio::test]
async fn a_row_that_capture_could_not_render_keeps_its_place_and_its_reason() {
    let database = database().await;
    let mut term = Term::begin(&database.url, 100).await.unwrap();
    run(
        &database.pool,
        r#"INSERT INTO tidewire.outbox (table_name, operation, row_key, omitted)
           VALUES ('public.t', 'DELETE', '{"id":7}', 'the row is larger than 1 GB as JSON')"#,
    )
    .await;
    assert_eq!(term.drain().await, 1);
    let event = &term.appended[0];
    let body: serde_json::Value = serde_json::from_slice(&event.body).unwrap();
    assert!(event.omitted && body["omitted"] == true && body["key"]["id"] == 7 && body["op"] == "DELETE", "{body}");
    assert_eq!(letters(&database, "row_key").await[0].1, "the row is larger than 1 GB as JSON");
}

/// A stand-in for whatever Postgres cannot process.
const UNPROCESSABLE: &str = "
    CREATE FUNCTION fails() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.after_data::text LIKE TG_ARGV[0] THEN
            RAISE EXCEPTION 'this value cannot be processed' USING ERRCODE = TG_ARGV[1];
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER fails BEFORE INSERT ON tidewire.event_log FOR EACH ROW EXECUTE FUNCTION fails('%bad%', '54000');
    CREATE TRIGGER fails BEFORE INSERT ON tidewire.dead_letters FOR EACH ROW EXECUTE FUNCTION fails('%worse bad%', '22021');";

#[tokio::test]
async fn rows_that_postgres_cannot_process_are_passed_and_nothing_else_is_held_up() {
    let cluster = TestCluster::start(2).await;
    let mut client = cluster.node(1).client("orders").await;
    cluster.run(UNPROCESSABLE).await;
    let terms = cluster.terms().await;
    // In one transaction, at its ends and in the middle; then in transactions of their own.
    let note = "CASE WHEN g IN (1, 77, 300) THEN 'bad' WHEN g = 78 THEN 'worse bad' END";
    cluster.run(&format!("INSERT INTO orders (id, note) SELECT g, {note} FROM generate_series(1, 300) g")).await;
    for id in 301..=310 {
        let note = if id % 4 == 0 { "'bad'" } else { "NULL" };
        cluster.run(&format!("INSERT INTO orders (id, note) VALUES ({id}, {note})")).await;
    }
    let mut events = client.events(310).await;
    assert!(events.windows(2).all(|pair| pair[0].seq + 1 == pair[1].seq));
    let ends: Vec<_> = events.iter().filter(|event| event.tx_end).map(|event| event.seq - events[0].seq + 1).collect();
    assert_eq!(ends, (300..=310).collect::<Vec<_>>(), "transactions stay whole");
    let omitted: Vec<_> = events.iter().zip(1..).filter(|(event, _)| event.omitted).map(|(_, id)| id).collect();
    assert_eq!(omitted, [1, 77, 78, 300, 304, 308]);
    events.retain(|event| !event.omitted);
    assert_eq!(events.len(), 304);
    let kept = "SELECT string_agg(coalesce(after_data ->> 'id', '?'), ',' ORDER BY id) FROM tidewire.dead_letters";
    assert_eq!(cluster.text(kept).await, "1,77,?,300,304,308");
    assert_eq!(cluster.terms().await, terms, "nobody stopped leading");
}

/// The log takes no row while there is trouble: of this code, until this time, and for rows with this note.
const TROUBLE: &str = "
    CREATE TABLE trouble (code text, until timestamptz, pattern text);
    CREATE FUNCTION troubled() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE now_on public.trouble;
    BEGIN
        SELECT * INTO now_on FROM public.trouble
        WHERE until > clock_timestamp() AND COALESCE(NEW.after_data::text, '') LIKE pattern;
        IF FOUND THEN
            RAISE EXCEPTION 'trouble' USING ERRCODE = now_on.code;
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER troubled BEFORE INSERT ON tidewire.event_log FOR EACH ROW EXECUTE FUNCTION troubled();";

/// A full lock table, a relation that cannot be opened at the moment, somebody who cancels: all of them also what a damaged or
/// enormous value comes to.
const AMBIGUOUS: &[&str] = &["53200", "XX000", "57014"];
/// Whether it befalls every row of the log, or only those that have content.
const PATTERNS: &[&str] = &["%", "%id%"];

/// Found in review: five failures within milliseconds, and a healthy row went out without its content.
#[tokio::test]
async fn trouble_that_passes_costs_no_row_its_content() {
    let cluster = TestCluster::start(1).await;
    let node = cluster.node(0);
    let mut client = node.client("orders").await;
    cluster.run(TROUBLE).await;
    let terms = cluster.terms().await;
    let troubles = AMBIGUOUS.iter().flat_map(|code| PATTERNS.iter().map(move |pattern| (code, pattern)));
    for (number, (code, pattern)) in troubles.enumerate() {
        let trouble = format!("('{code}', clock_timestamp() + interval '1 second', '{pattern}')");
        let first = 10 * i64::try_from(number).unwrap() + 1;
        cluster
            .run(&format!(
                "INSERT INTO trouble VALUES {trouble};
                 INSERT INTO orders (id) SELECT generate_series({first}, {first} + 9)"
            ))
            .await;
        let events = client.events(10).await;
        assert_eq!(events.iter().map(key_of).collect::<Vec<_>>(), (first..first + 10).collect::<Vec<_>>(), "{code}");
        assert!(events.iter().all(|event| !event.omitted), "{code}: a healthy row lost its content");
    }
    assert!(node.metrics().relay_row_retries_total.get() > 0);
    assert_eq!(cluster.text("SELECT count(*)::text FROM tidewire.dead_letters").await, "0");
    assert_eq!(cluster.terms().await, terms, "nobody stopped leading");
}

/// What does not pass is the row.
#[tokio::test]
async fn a_row_that_fails_for_long_is_passed_and_kept() {
    let cluster = TestCluster::start(1).await;
    let mut client = cluster.node(0).client("orders").await;
    cluster.run(TROUBLE).await;
    let terms = cluster.terms().await;
    cluster.run("INSERT INTO trouble VALUES ('XX001', 'infinity', '%damaged%')").await;
    let note = "CASE g WHEN 2 THEN 'damaged' END";
    cluster.run(&format!("INSERT INTO orders (id, note) SELECT g, {note} FROM generate_series(1, 3) g")).await;
    let events = client.events(3).await;
    assert_eq!(events.iter().map(|event| event.omitted).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(cluster.text("SELECT after_data ->> 'id' FROM tidewire.dead_letters").await, "2");
    assert_eq!(cluster.terms().await, terms, "nobody stopped leading");
}
