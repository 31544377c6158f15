//! Random attacks on the claim. The first drives every step itself: claims of tiny batches between any two steps of the
//! writers, so that a wrong decision has nowhere to hide; the same seed does the same. The second lets writers, foreign
//! lockers and whoever kills relays run freely.
//!
//! `TIDEWIRE_ATTACK_STEPS` and `TIDEWIRE_ATTACK_SEED` make them longer or other ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};

use super::rows;
use crate::capture::run;
use crate::support::postgres::{TestDatabase, database};
use crate::support::relay::{Term, Writer, faults};

/// Rows that are fought over.
const KEYS: u32 = 6;

fn asked(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Tracked tables whose rows count their versions.
async fn arena() -> TestDatabase {
    let database = database().await;
    let sql = "
        CREATE TABLE prompt (id int PRIMARY KEY, version int NOT NULL);
        CREATE TABLE late (id int PRIMARY KEY, version int NOT NULL);
        CREATE TABLE item (id bigint GENERATED ALWAYS AS IDENTITY, n text, version int DEFAULT 1, PRIMARY KEY (id));
        INSERT INTO prompt SELECT g, 0 FROM generate_series(1, 6) g;
        INSERT INTO late SELECT g, 0 FROM generate_series(1, 6) g;
        SELECT tidewire.track('prompt'); SELECT tidewire.track('late', deferred => true); SELECT tidewire.track('item');
        SELECT tidewire.set_wake('poll');";
    run(&database.pool, sql).await;
    database
}

/// What the log says otherwise than the tables: a version that does not follow the one before it, a row that is missing.
async fn untruths(pool: &PgPool) -> Vec<String> {
    let mut all = faults(pool).await;
    let sql = "
        WITH e AS (
            SELECT seq, table_name, operation, row_key ->> 'id' AS id, (after_data ->> 'version')::int AS version
            FROM tidewire.event_log WHERE table_name LIKE 'public.%'),
        chain AS (SELECT *, coalesce(lag(version) OVER (PARTITION BY table_name, id ORDER BY seq), 0) AS before FROM e),
        final AS (SELECT 'public.prompt' AS t, id::text, version FROM prompt
                  UNION ALL SELECT 'public.late', id::text, version FROM late
                  UNION ALL SELECT 'public.item', id::text, version FROM item)
        SELECT format('%s %s: version %s after %s at %s', table_name, id, version, before, seq) FROM chain
        WHERE version <> before + 1
        UNION ALL
        SELECT format('%s %s: the table has %s, the log %s', coalesce(t, l.table_name), coalesce(f.id, l.id), f.version, l.version)
        FROM final f
        FULL JOIN (SELECT table_name, id, max(version) AS version FROM e GROUP BY 1, 2) l ON l.table_name = t AND l.id = f.id
        WHERE coalesce(f.version, 0) <> coalesce(l.version, 0)
        LIMIT 20";
    let more: Vec<String> = sqlx::query_scalar(sql).fetch_all(pool).await.unwrap();
    all.extend(more);
    all
}

/// One writer of the stepwise attack.
struct Actor {
    writer: Writer,
    open: bool,
    savepoint: bool,
    prepared: Option<String>,
}

impl Actor {
    /// One step; `name` is unique.
    async fn act(&mut self, random: &mut SmallRng, url: &str, name: &str) {
        if let Some(prepared) = self.prepared.take() {
            let end = if random.random_bool(0.7) { "COMMIT" } else { "ROLLBACK" };
            return self.writer.run(&format!("{end} PREPARED '{prepared}'")).await;
        }
        if !self.open {
            match random.random_range(0..10) {
                0..3 => return self.statement(random, false).await,
                3..5 => self.writer.run("BEGIN ISOLATION LEVEL REPEATABLE READ").await,
                _ => self.writer.run("BEGIN").await,
            }
            self.open = true;
        }
        match random.random_range(0..20) {
            0..11 => self.statement(random, true).await,
            11 if !self.savepoint => {
                self.writer.run("SAVEPOINT s").await;
                self.savepoint = true;
            }
            12 if self.savepoint => self.writer.run("ROLLBACK TO s").await,
            13 => self.end("ROLLBACK").await,
            14 => {
                self.writer = Writer::connect(url).await;
                (self.open, self.savepoint) = (false, false);
            }
            15 => {
                self.end(&format!("PREPARE TRANSACTION '{name}'")).await;
                self.prepared = Some(name.to_owned());
            }
            _ => self.end("COMMIT").await,
        }
    }

    async fn end(&mut self, how: &str) {
        self.writer.run(how).await;
        (self.open, self.savepoint) = (false, false);
    }

    /// Changes something; what another writer holds is left alone, so that no step ever waits.
    async fn statement(&mut self, random: &mut SmallRng, inside: bool) {
        let key = random.random_range(1..=KEYS);
        let table = if random.random_bool(0.3) { "late" } else { "prompt" };
        let sql = match random.random_range(0..10) {
            0..6 => format!(
                "UPDATE {table} SET version = version + 1
                 WHERE id IN (SELECT id FROM {table} WHERE id = {key} FOR UPDATE SKIP LOCKED)"
            ),
            6..8 => {
                format!("INSERT INTO item (n) SELECT g::text FROM generate_series(1, {}) g", random.random_range(1..6))
            }
            8 => rows("x", random.random_range(1..40)),
            _ => {
                format!("INSERT INTO item (n) SELECT g::text FROM generate_series(1, {}) g", random.random_range(1..60))
            }
        };
        if let Err(error) = self.writer.attempt(&sql).await {
            // REPEATABLE READ: the row has changed since.
            assert!(error.to_string().contains("serialize"), "{sql}: {error}");
            if inside {
                self.end("ROLLBACK").await;
            }
        }
    }
}

/// One step of the relay, the lockers or a writer at a time. Gives the seq reached.
async fn stepwise(seed: u64, steps: usize) -> u64 {
    let arena = arena().await;
    let mut random = SmallRng::seed_from_u64(seed);
    let mut actors = Vec::new();
    for _ in 0..random.random_range(2..7) {
        actors.push(Actor { writer: Writer::connect(&arena.url).await, open: false, savepoint: false, prepared: None });
    }
    let mut locker = Writer::connect(&arena.url).await;
    let mut locked = false;
    let mut term = Term::begin(&arena.url, random.random_range(1..12)).await.unwrap();
    let eager = random.random_range(0.2..0.8);
    for step in 0..steps {
        if random.random_bool(eager) {
            let _ = term.step().await.unwrap_or_else(|error| panic!("seed {seed}, step {step}: {error}"));
            continue;
        }
        match random.random_range(0..100) {
            0..3 => term.sweep(),
            3..5 => {
                drop(term);
                term = Term::begin(&arena.url, random.random_range(1..12)).await.unwrap();
            }
            5..10 if locked => {
                locker.run("COMMIT").await;
                locked = false;
            }
            5..8 => {
                let strength = ["SHARE", "KEY SHARE", "UPDATE"][random.random_range(0..3)];
                let offset = random.random_range(0..10);
                locker
                    .run(&format!(
                        "BEGIN; SELECT FROM tidewire.outbox OFFSET {offset} LIMIT 1 FOR {strength} SKIP LOCKED"
                    ))
                    .await;
                locked = true;
            }
            _ => {
                let index = random.random_range(0..actors.len());
                let name = format!("{}-{step}", arena.name);
                actors[index].act(&mut random, &arena.url, &name).await;
            }
        }
    }
    locker.run("ROLLBACK").await;
    for actor in &mut actors {
        if let Some(prepared) = actor.prepared.take() {
            actor.writer.run(&format!("COMMIT PREPARED '{prepared}'")).await;
        } else {
            actor.writer.run("COMMIT").await;
        }
    }
    // Without a sweep: nothing may depend on it.
    term.drain().await;
    assert_eq!(untruths(&arena.pool).await, [""; 0], "seed {seed}");
    term.newest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_interleaving_of_writers_claims_terms_and_locks_loses_doubles_or_reorders() {
    let first = asked("TIDEWIRE_ATTACK_SEED", 1) as u64;
    let mut reached = 0;
    for seed in first..first + asked("TIDEWIRE_ATTACK_SEEDS", 4) as u64 {
        reached += stepwise(seed, asked("TIDEWIRE_ATTACK_STEPS", 400)).await;
    }
    println!("{reached} events");
}

/// Operations of one free writer; what fails (serialization, deadlock, termination) has happened or not, as a whole.
async fn rampage(url: &str, seed: u64, operations: usize) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut connection = PgConnection::connect(url).await.unwrap();
    for _ in 0..operations {
        if operation(&mut connection, &mut random).await.is_err() {
            let healed = sqlx::raw_sql("ROLLBACK").execute(&mut connection).await;
            if healed.is_err() {
                connection = PgConnection::connect(url).await.unwrap();
            }
        }
    }
}

async fn operation(connection: &mut PgConnection, random: &mut SmallRng) -> Result<(), sqlx::Error> {
    let update = |random: &mut SmallRng| {
        let table = if random.random_bool(0.3) { "late" } else { "prompt" };
        format!("UPDATE {table} SET version = version + 1 WHERE id = {};", random.random_range(1..=KEYS))
    };
    let sql = match random.random_range(0..20) {
        0..6 => update(random),
        6..8 => {
            let mut copy = connection.copy_in_raw("COPY item (n) FROM STDIN").await?;
            let text = "row\n".repeat(random.random_range(1..300));
            copy.send(text.as_bytes()).await?;
            copy.finish().await?;
            return Ok(());
        }
        8 => {
            format!("INSERT INTO item (n) SELECT g::text FROM generate_series(1, {}) g;", random.random_range(1..1500))
        }
        9 => format!("BEGIN; {} SELECT pg_terminate_backend(pg_backend_pid()); COMMIT", update(random)),
        kind => {
            let isolation = if kind < 13 { "REPEATABLE READ" } else { "READ COMMITTED" };
            let mut sql = format!("BEGIN ISOLATION LEVEL {isolation}; ");
            for _ in 0..random.random_range(1..5) {
                match random.random_range(0..6) {
                    0 => sql += &format!("SAVEPOINT s; {} ROLLBACK TO s;", update(random)),
                    1 => sql += &format!("SAVEPOINT s; {} RELEASE s;", update(random)),
                    2 => sql += "INSERT INTO item (n) VALUES ('a'), ('b'), ('c');",
                    3 => sql += &rows("x", random.random_range(1..20)),
                    4 => sql += &format!("SELECT pg_sleep({});", random.random_range(0.0..0.02)),
                    _ => sql += &update(random),
                }
            }
            sql + if random.random_bool(0.85) { "COMMIT" } else { "ROLLBACK" }
        }
    };
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(|_| ())
}

/// A relay that goes on until told, through as many terms as it takes; gives how many.
async fn relay(url: String, seed: u64, done: Arc<AtomicBool>, claims: Arc<AtomicUsize>) -> usize {
    let mut random = SmallRng::seed_from_u64(seed);
    let (mut terms, mut quiet) = (0, 0);
    // Done and several claims in a row without anything: dry.
    while quiet < 20 {
        let batch = [7, 20, 100, 500][random.random_range(0..4)];
        let Ok(Ok(mut term)) = tokio::time::timeout(Duration::from_secs(1), Term::begin(&url, batch)).await else {
            if done.load(Ordering::Acquire) && drained(&url).await {
                return terms;
            }
            continue;
        };
        terms += 1;
        while quiet < 20 {
            let newest = term.newest;
            let Ok(claim) = term.step().await else { break };
            claims.fetch_add(1, Ordering::Relaxed);
            let moved = term.newest > newest || claim.more || claim.torn;
            quiet = if moved || !done.load(Ordering::Acquire) { 0 } else { quiet + 1 };
            if !moved {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            if random.random_bool(0.01) {
                term.sweep();
            }
        }
    }
    terms
}

async fn drained(url: &str) -> bool {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar("SELECT NOT EXISTS (SELECT FROM tidewire.outbox)").fetch_one(&mut connection).await.unwrap()
}

/// Kills whoever holds the leader's lock, again and again; gives how often.
async fn assassin(pool: PgPool, done: Arc<AtomicBool>) -> usize {
    let mut random = SmallRng::seed_from_u64(1);
    let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_locks
               WHERE locktype = 'advisory' AND granted AND objsubid = 1
                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                   AND (classid::bigint << 32 | objid::bigint) = $1";
    let mut killed = 0;
    while !done.load(Ordering::Acquire) {
        tokio::time::sleep(Duration::from_millis(random.random_range(1..120))).await;
        let count: i64 = sqlx::query_scalar(sql).bind(tidewire::relay::LEADER_LOCK).fetch_one(&pool).await.unwrap();
        killed += usize::try_from(count).unwrap();
    }
    killed
}

/// Locks outbox rows for a moment.
async fn vandal(url: String, done: Arc<AtomicBool>) {
    let mut locker = Writer::connect(&url).await;
    while !done.load(Ordering::Acquire) {
        locker
            .run("BEGIN; SELECT FROM tidewire.outbox ORDER BY random() LIMIT 2 FOR SHARE SKIP LOCKED; SELECT pg_sleep(random() * 0.02); COMMIT")
            .await;
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twelve_wild_writers_and_relays_killed_in_the_middle_leave_a_perfect_log() {
    let arena = arena().await;
    let (done, dry) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let claims = Arc::new(AtomicUsize::new(0));
    let seed = asked("TIDEWIRE_ATTACK_SEED", 1) as u64;
    let operations = asked("TIDEWIRE_ATTACK_OPERATIONS", 40);
    let relays: Vec<_> = (0..2)
        .map(|index| tokio::spawn(relay(arena.url.clone(), seed + index, Arc::clone(&dry), Arc::clone(&claims))))
        .collect();
    let killer = tokio::spawn(assassin(arena.pool.clone(), Arc::clone(&done)));
    let locker = tokio::spawn(vandal(arena.url.clone(), Arc::clone(&done)));
    let writers: Vec<_> = (0..12)
        .map(|index| {
            let url = arena.url.clone();
            tokio::spawn(async move { rampage(&url, seed * 1000 + index, operations).await })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    done.store(true, Ordering::Release);
    let killed = killer.await.unwrap();
    locker.await.unwrap();
    dry.store(true, Ordering::Release);
    let mut terms = 0;
    for relay in relays {
        terms += relay.await.unwrap();
    }
    let events: i64 =
        sqlx::query_scalar("SELECT count(*) FROM tidewire.event_log").fetch_one(&arena.pool).await.unwrap();
    println!("{events} events, {terms} terms, {killed} killed, {} claims", claims.load(Ordering::Relaxed));
    assert_eq!(untruths(&arena.pool).await, [""; 0]);
}
