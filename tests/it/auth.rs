//! Who is let in, and for how long: keys and tickets against a real Postgres.

use std::sync::Arc;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use clap::Parser;
use sqlx::postgres::PgListener;
use tidewire::auth::key::{ApiKey, KeyId};
use tidewire::auth::scope::Scopes;
use tidewire::auth::store::{self, Access, AuthError, KeyStore, Revocation};
use tidewire::auth::ticket::{MAX_PENDING_TICKETS, TicketError, Tickets};
use tidewire::cli::keys::{self, KeysArgs};
use tidewire::postgres::Database;
use tidewire::protocol::close::CloseCode;
use tokio_util::sync::CancellationToken;

use crate::support::DEADLINE;
use crate::support::postgres::{TestDatabase, database};

/// A node's connections to the test's database.
fn connect(db: &TestDatabase) -> Arc<Database> {
    Arc::new(Database::new(&db.url, None, "test", 5).unwrap())
}

fn key_store(db: &TestDatabase) -> Arc<KeyStore> {
    Arc::new(KeyStore::new(connect(db)))
}

async fn new_key(db: &TestDatabase) -> ApiKey {
    store::create_key(&db.pool.clone().into(), "test", &Scopes::all(10), None).await.unwrap()
}

async fn enter(store: &KeyStore, key: &ApiKey) -> Result<Access, AuthError> {
    store.authenticate(key.expose(), Utc::now()).await
}

async fn ended(access: &Access) -> CloseCode {
    tokio::time::timeout(DEADLINE, access.ended()).await.expect("the access ends")
}

/// Runs a change of one key by hand.
async fn change(db: &TestDatabase, key: &ApiKey, sql: &'static str) {
    let done = sqlx::query(sql).bind(key.id().as_str()).execute(&db.pool).await.unwrap();
    assert_eq!(done.rows_affected(), 1, "{sql}");
}

#[tokio::test]
async fn a_new_key_is_let_in_with_its_scopes() {
    let db = database().await;
    let scopes: Scopes = serde_json::from_value(serde_json::json!({"tables": [{"table": "orders"}]})).unwrap();
    let key = store::create_key(&db.pool.clone().into(), "web", &scopes, None).await.unwrap();
    let access = enter(&key_store(&db), &key).await.unwrap();
    assert_eq!((&access.key_id, &*access.name, &*access.scopes), (key.id(), "web", &scopes));
    assert_eq!(access.ended_now(), None);

    let listed = store::list(&db.pool.clone().into()).await.unwrap();
    assert_eq!((listed.len(), listed[0].name.as_str(), listed[0].is_active), (1, "web", true));
    let stored: Vec<u8> =
        sqlx::query_scalar("SELECT key_hash FROM tidewire.api_keys").fetch_one(&db.pool).await.unwrap();
    assert_eq!(stored, key.hash().as_bytes());
}

#[tokio::test]
async fn who_does_not_hold_the_secret_learns_nothing() {
    let db = database().await;
    let store = key_store(&db);
    let (active, revoked, expired) = (new_key(&db).await, new_key(&db).await, new_key(&db).await);
    store::revoke(&db.pool.clone().into(), revoked.id()).await.unwrap();
    change(&db, &expired, "UPDATE tidewire.api_keys SET expires_at = now() - interval '1 s' WHERE key_id = $1").await;
    assert_eq!(enter(&store, &revoked).await.unwrap_err(), AuthError::Revoked);
    assert_eq!(enter(&store, &expired).await.unwrap_err(), AuthError::Expired);

    // The same rows, but with another's hash: whoever presents such a key has the id and not the secret.
    sqlx::query("UPDATE tidewire.api_keys SET key_hash = decode(repeat('ab', 32), 'hex')")
        .execute(&db.pool)
        .await
        .unwrap();
    let store = key_store(&db);
    let mut answers = vec![store.authenticate("cdc_mistyped", Utc::now()).await.unwrap_err()];
    for key in [&active, &revoked, &expired, &ApiKey::generate(&mut rand::rng())] {
        answers.push(enter(&store, key).await.unwrap_err());
    }
    let first = (answers[0].to_string(), answers[0].close_code());
    assert!(answers.iter().all(|answer| (answer.to_string(), answer.close_code()) == first), "{answers:?}");
}

/// The time of a refusal is made of its work: the same for an id that does not exist and for another's secret, whatever is
/// cached of the key, and again for the same token.
#[tokio::test]
async fn a_wrong_secret_costs_what_an_unknown_id_costs() {
    let db = database().await;
    let (cached, uncached) = (new_key(&db).await, new_key(&db).await);
    // Keys with these ids and other secrets.
    let mut forged = Vec::new();
    for key in [&cached, &uncached] {
        let other = ApiKey::generate(&mut rand::rng());
        let sql = "UPDATE tidewire.api_keys SET key_id = $2 WHERE key_id = $1";
        sqlx::query(sql).bind(key.id().as_str()).bind(other.id().as_str()).execute(&db.pool).await.unwrap();
        forged.push(other);
    }
    let store = key_store(&db);
    // By its ticket a key is cached whatever its secret is.
    store.admit(forged[0].id(), Utc::now()).await.unwrap();
    for token in [&forged[0], &forged[1], &ApiKey::generate(&mut rand::rng())] {
        let before = store.counts().lookups;
        assert_eq!(enter(&store, token).await.unwrap_err(), AuthError::Unknown);
        assert_eq!(store.counts().lookups, before + 1, "one query, whatever is cached");
        assert_eq!(enter(&store, token).await.unwrap_err(), AuthError::Unknown);
        assert_eq!(store.counts().lookups, before + 1, "and none for the same token again");
    }
}

#[tokio::test]
async fn a_storm_of_one_key_asks_postgres_once() {
    let db = database().await;
    let (store, key) = (key_store(&db), new_key(&db).await);
    let unknown = ApiKey::generate(&mut rand::rng());
    let storm = |key: ApiKey| {
        let store = Arc::clone(&store);
        futures_util::future::join_all((0..300).map(move |_| {
            let (store, key) = (Arc::clone(&store), key.clone());
            tokio::spawn(async move { enter(&store, &key).await.is_ok() })
        }))
    };
    assert!(storm(key).await.into_iter().all(Result::unwrap));
    assert_eq!(store.counts().lookups, 1);
    assert!(!storm(unknown.clone()).await.into_iter().any(Result::unwrap));
    assert_eq!(enter(&store, &unknown).await.unwrap_err(), AuthError::Unknown);
    let counts = store.counts();
    assert_eq!((counts.lookups, counts.judged, counts.refused), (2, 601, 301));
}

#[tokio::test]
async fn a_key_that_was_unknown_is_let_in_as_soon_as_it_exists() {
    let db = database().await;
    let (store, key) = (key_store(&db), new_key(&db).await);
    change(&db, &key, "UPDATE tidewire.api_keys SET key_id = 'x' WHERE key_id = $1").await;
    assert_eq!(enter(&store, &key).await.unwrap_err(), AuthError::Unknown);
    sqlx::query("UPDATE tidewire.api_keys SET key_id = $1").bind(key.id().as_str()).execute(&db.pool).await.unwrap();
    store.invalidate(key.id().as_str()).await.unwrap();
    enter(&store, &key).await.unwrap();
}

#[tokio::test]
async fn a_revocation_ends_every_access_on_every_node_by_its_notification() {
    let db = database().await;
    let (key, other) = (new_key(&db).await, new_key(&db).await);
    let mut accesses = Vec::new();
    let mut kept = Vec::new();
    for _ in 0..2 {
        let store = key_store(&db);
        let mut listener = PgListener::connect(&db.url).await.unwrap();
        listener.listen("tidewire_keys").await.unwrap();
        accesses.extend([enter(&store, &key).await.unwrap(), enter(&store, &key).await.unwrap()]);
        kept.push(enter(&store, &other).await.unwrap());
        tokio::spawn(async move {
            while let Ok(heard) = listener.recv().await {
                store.invalidate(heard.payload()).await.unwrap();
            }
        });
    }
    assert_eq!(store::revoke(&db.pool.clone().into(), key.id()).await.unwrap(), Revocation::Revoked);
    for access in &accesses {
        assert_eq!(ended(access).await, CloseCode::KeyRevoked);
    }
    assert!(kept.iter().all(|access| access.ended_now().is_none()));
    assert_eq!(store::revoke(&db.pool.clone().into(), key.id()).await.unwrap(), Revocation::AlreadyRevoked);
    assert_eq!(
        store::revoke(&db.pool.clone().into(), &KeyId::from_stored("none")).await.unwrap(),
        Revocation::UnknownKey
    );
}

#[tokio::test]
async fn a_lost_notification_is_made_good_by_the_recheck() {
    let db = database().await;
    let store = key_store(&db);
    let changes: [(&str, Option<CloseCode>); 6] = [
        ("UPDATE tidewire.api_keys SET is_active = false WHERE key_id = $1", Some(CloseCode::KeyRevoked)),
        ("DELETE FROM tidewire.api_keys WHERE key_id = $1", Some(CloseCode::KeyRevoked)),
        ("UPDATE tidewire.api_keys SET scopes = '{\"admin\":true}' WHERE key_id = $1", Some(CloseCode::TokenExpired)),
        ("UPDATE tidewire.api_keys SET key_hash = '\\x00' WHERE key_id = $1", Some(CloseCode::TokenExpired)),
        ("UPDATE tidewire.api_keys SET expires_at = now() WHERE key_id = $1", Some(CloseCode::KeyExpired)),
        ("UPDATE tidewire.api_keys SET name = 'other' WHERE key_id = $1", None),
    ];
    let mut accesses = Vec::new();
    for (sql, code) in changes {
        let key = new_key(&db).await;
        accesses.push((enter(&store, &key).await.unwrap(), code));
        change(&db, &key, sql).await;
    }
    assert!(accesses.iter().all(|(access, _)| access.ended_now().is_none()));
    store.recheck().await.unwrap();
    for (access, code) in &accesses {
        assert_eq!(access.ended_now(), *code);
    }
    store.recheck().await.unwrap();
    assert_eq!(accesses[5].0.ended_now(), None, "a change that grants nothing else is taken in once");
}

#[tokio::test]
async fn an_access_that_ended_does_not_shut_out_who_comes_back() {
    let db = database().await;
    let (store, key) = (key_store(&db), new_key(&db).await);
    let before = enter(&store, &key).await.unwrap();
    change(&db, &key, "UPDATE tidewire.api_keys SET scopes = '{\"admin\":true}' WHERE key_id = $1").await;
    store.invalidate(key.id().as_str()).await.unwrap();
    assert_eq!(ended(&before).await, CloseCode::TokenExpired);
    let after = enter(&store, &key).await.unwrap();
    assert!(after.scopes.admin() && after.scopes.tables().is_empty());
    assert_eq!(after.ended_now(), None);
}

#[tokio::test]
async fn emptying_the_table_revokes_every_key() {
    let db = database().await;
    let (store, key) = (key_store(&db), new_key(&db).await);
    let access = enter(&store, &key).await.unwrap();
    let mut listener = PgListener::connect(&db.url).await.unwrap();
    listener.listen("tidewire_keys").await.unwrap();
    sqlx::query("TRUNCATE tidewire.api_keys").execute(&db.pool).await.unwrap();
    let heard = tokio::time::timeout(DEADLINE, listener.recv()).await.unwrap().unwrap();
    store.invalidate(heard.payload()).await.unwrap();
    assert_eq!(ended(&access).await, CloseCode::KeyRevoked);
    assert_eq!(enter(&store, &key).await.unwrap_err(), AuthError::Unknown);
}

#[tokio::test]
async fn an_access_ends_with_its_keys_last_second() {
    let db = database().await;
    let store = key_store(&db);
    let expires_at = Utc::now() + TimeDelta::hours(1);
    let key = store::create_key(&db.pool.clone().into(), "short", &Scopes::all(1), Some(expires_at)).await.unwrap();
    let expires_at = store::list(&db.pool.clone().into()).await.unwrap()[0].expires_at.unwrap();
    let access = store.authenticate(key.expose(), expires_at - TimeDelta::milliseconds(50)).await.unwrap();
    assert_eq!(ended(&access).await, CloseCode::KeyExpired);
    assert_eq!(store.authenticate(key.expose(), expires_at).await.unwrap_err(), AuthError::Expired);
}

#[tokio::test]
async fn expiries_that_no_clock_can_hold_are_judged_by_the_database() {
    let db = database().await;
    let store = key_store(&db);
    for (expiry, entered) in [("infinity", true), ("200000-01-01", true), ("-infinity", false)] {
        let key = new_key(&db).await;
        sqlx::query("UPDATE tidewire.api_keys SET expires_at = $2::timestamptz WHERE key_id = $1")
            .bind(key.id().as_str())
            .bind(expiry)
            .execute(&db.pool)
            .await
            .unwrap_or_else(|error| panic!("{expiry}: {error}"));
        assert_eq!(enter(&store, &key).await.is_ok(), entered, "{expiry}");
    }
    store::list(&db.pool.clone().into()).await.unwrap();
}

/// Puts a gate before the keys: a read takes its snapshot, then waits while someone holds the advisory lock.
const GATE: &str = "
    ALTER TABLE tidewire.api_keys RENAME TO gated_keys;
    CREATE VIEW tidewire.api_keys AS
    SELECT * FROM tidewire.gated_keys WHERE (SELECT pg_advisory_xact_lock_shared(77)::text) IS NOT NULL";

/// What someone hears whose lookup read the key before `sql` changed it, and ends after the change was announced.
async fn overtaken(prepare: Option<&'static str>, sql: &'static str) -> Result<Access, AuthError> {
    let db = database().await;
    let (store, key) = (key_store(&db), new_key(&db).await);
    if let Some(prepare) = prepare {
        change(&db, &key, prepare).await;
    }
    sqlx::raw_sql(GATE).execute(&db.pool).await.unwrap();
    let mut holder = db.pool.acquire().await.unwrap();
    sqlx::query("SELECT pg_advisory_lock(77)").execute(&mut *holder).await.unwrap();
    let coming = tokio::spawn({
        let (store, key) = (Arc::clone(&store), key.clone());
        async move { enter(&store, &key).await }
    });
    let waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 77 AND NOT granted
                                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
    tokio::time::timeout(DEADLINE, async {
        while !sqlx::query_scalar::<_, bool>(waiting).fetch_one(&db.pool).await.unwrap() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    change(&db, &key, sql).await;
    store.invalidate(key.id().as_str()).await.unwrap();
    sqlx::query("SELECT pg_advisory_unlock(77)").execute(&mut *holder).await.unwrap();
    coming.await.unwrap()
}

#[tokio::test]
async fn nobody_comes_in_on_what_was_read_before_a_revocation() {
    let heard = overtaken(None, "UPDATE tidewire.gated_keys SET is_active = false WHERE key_id = $1").await;
    assert_eq!(heard.unwrap_err(), AuthError::Revoked);
}

#[tokio::test]
async fn nobody_is_refused_on_what_was_read_before_the_key_existed() {
    let heard = overtaken(
        Some("UPDATE tidewire.api_keys SET key_id = 'not ' || key_id WHERE key_id = $1"),
        "UPDATE tidewire.gated_keys SET key_id = $1 WHERE key_id = 'not ' || $1",
    )
    .await;
    heard.unwrap();
}

#[tokio::test]
async fn while_postgres_is_away_cached_keys_go_on_and_others_hear_so() {
    let db = database().await;
    let (store, cached, other) = (key_store(&db), new_key(&db).await, new_key(&db).await);
    let access = enter(&store, &cached).await.unwrap();
    let mut holder = db.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE tidewire.api_keys IN ACCESS EXCLUSIVE MODE").execute(&mut *holder).await.unwrap();
    let (again, refused, rechecked) = tokio::join!(enter(&store, &cached), enter(&store, &other), store.recheck());
    assert!(again.is_ok());
    assert_eq!(refused.unwrap_err(), AuthError::Unavailable);
    assert_eq!(rechecked, Err(AuthError::Unavailable));
    assert_eq!(access.ended_now(), None);
    holder.rollback().await.unwrap();
    enter(&store, &other).await.unwrap();
    store.recheck().await.unwrap();
}

#[tokio::test]
async fn a_key_whose_scopes_cannot_be_read_is_refused_with_the_reason() {
    let db = database().await;
    let (store, key) = (key_store(&db), new_key(&db).await);
    change(&db, &key, "UPDATE tidewire.api_keys SET scopes = '{\"tabels\":[]}' WHERE key_id = $1").await;
    assert_eq!(enter(&store, &key).await.unwrap_err(), AuthError::Unusable);
    assert_eq!(store::list(&db.pool.clone().into()).await.unwrap().len(), 1);
}

#[tokio::test]
async fn last_use_is_stored_in_one_go_and_disturbs_nobody() {
    let db = database().await;
    let (store, key, unused) = (key_store(&db), new_key(&db).await, new_key(&db).await);
    let access = enter(&store, &key).await.unwrap();
    let at = Utc::now() + TimeDelta::seconds(5);
    store.authenticate(key.expose(), at).await.unwrap();
    let version = "SELECT sum(version)::bigint FROM tidewire.api_keys";
    let before: i64 = sqlx::query_scalar(version).fetch_one(&db.pool).await.unwrap();
    let mut listener = PgListener::connect(&db.url).await.unwrap();
    listener.listen("tidewire_keys").await.unwrap();

    store.flush_last_used().await.unwrap();

    let listed = store::list(&db.pool.clone().into()).await.unwrap();
    let used = |id: &KeyId| listed.iter().find(|info| info.key_id == id.as_str()).unwrap().last_used_at;
    assert_eq!(used(key.id()).map(|at| at.timestamp_micros()), Some(at.timestamp_micros()));
    assert_eq!(used(unused.id()), None);
    assert_eq!(sqlx::query_scalar::<_, i64>(version).fetch_one(&db.pool).await.unwrap(), before);
    store.recheck().await.unwrap();
    assert_eq!(access.ended_now(), None);
    // Had the flush notified, its word would come before this one.
    sqlx::query("SELECT pg_notify('tidewire_keys', 'after')").execute(&db.pool).await.unwrap();
    let heard = tokio::time::timeout(DEADLINE, listener.recv()).await.unwrap().unwrap();
    assert_eq!(heard.payload(), "after");
}

#[tokio::test]
async fn what_could_not_be_stored_is_stored_later_also_at_the_end() {
    let db = database().await;
    let (store, key) = (key_store(&db), new_key(&db).await);
    enter(&store, &key).await.unwrap();
    let rename = |sql: &'static str| sqlx::query(sql).execute(&db.pool);
    rename("ALTER TABLE tidewire.api_keys RENAME TO away").await.unwrap();
    store.flush_last_used().await.unwrap_err();
    rename("ALTER TABLE tidewire.away RENAME TO api_keys").await.unwrap();
    let shutdown = CancellationToken::new();
    shutdown.cancel();
    tokio::time::timeout(DEADLINE, Arc::clone(&store).run(shutdown)).await.unwrap();
    assert!(store::list(&db.pool.clone().into()).await.unwrap()[0].last_used_at.is_some());
}

#[derive(clap::Parser)]
struct Program {
    #[command(flatten)]
    keys: KeysArgs,
}

#[tokio::test]
async fn the_command_line_makes_and_revokes_keys() {
    let db = database().await;
    let run = async |line: &[&str]| {
        let program = Program::try_parse_from(["keys"].iter().chain(line)).unwrap();
        keys::run(program.keys, &db.pool.clone().into()).await.map_err(|error| error.to_string())
    };
    run(&["create", "--name", "web", "--table", "orders", "--column", "id", "--expires-in", "30d", "--json"])
        .await
        .unwrap();
    let listed = store::list(&db.pool.clone().into()).await.unwrap();
    let scopes: Scopes = serde_json::from_value(listed[0].scopes.clone()).unwrap();
    let access = scopes.table("public.orders").unwrap();
    assert!(access.columns.allows("id") && !access.columns.allows("total"));
    let life = listed[0].expires_at.unwrap() - listed[0].created_at;
    assert!((life - TimeDelta::days(30)).abs() < TimeDelta::minutes(5), "{life}");

    run(&["list"]).await.unwrap();
    run(&["revoke", &listed[0].key_id]).await.unwrap();
    assert!(!store::list(&db.pool.clone().into()).await.unwrap()[0].is_active);
    assert!(run(&["revoke", "abcdefghijkl"]).await.unwrap_err().contains("there is no key"));
}

#[tokio::test]
async fn a_ticket_works_once_in_the_whole_cluster_and_stands_for_its_key() {
    let db = database().await;
    let (key, store) = (new_key(&db).await, key_store(&db));
    let nodes = [Tickets::new(connect(&db)), Tickets::new(connect(&db))];
    let ticket = nodes[0].issue(key.id()).await.unwrap();
    let redeemed = futures_util::future::join_all((0..10).map(|n| {
        let (node, ticket) = (&nodes[n % 2], &ticket);
        async move { node.redeem(ticket.expose()).await }
    }))
    .await;
    let won: Vec<_> = redeemed.iter().flatten().collect();
    assert_eq!(won, [key.id()]);
    assert!(redeemed.iter().filter(|answer| **answer == Err(TicketError::Invalid)).count() == 9);

    let access = store.admit(won[0], Utc::now()).await.unwrap();
    assert_eq!(&access.key_id, key.id());
    store::revoke(&db.pool.clone().into(), key.id()).await.unwrap();
    store.invalidate(key.id().as_str()).await.unwrap();
    assert_eq!(store.admit(won[0], Utc::now()).await.unwrap_err(), AuthError::Revoked);
}

#[tokio::test]
async fn old_and_made_up_tickets_are_refused_and_swept() {
    let db = database().await;
    let (key, tickets) = (new_key(&db).await, Tickets::new(connect(&db)));
    let (old, older) = (tickets.issue(key.id()).await.unwrap(), tickets.issue(key.id()).await.unwrap());
    sqlx::query("UPDATE tidewire.tickets SET expires_at = now()").execute(&db.pool).await.unwrap();
    assert_eq!(tickets.redeem(old.expose()).await, Err(TicketError::Invalid));
    for text in ["", "tkt_", key.expose(), &format!("tkt_{}", "a".repeat(43))] {
        assert_eq!(tickets.redeem(text).await, Err(TicketError::Invalid));
    }
    let new = tickets.issue(key.id()).await.unwrap();
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM tidewire.tickets").fetch_one(&db.pool).await.unwrap();
    assert_eq!(left, 1, "a new ticket takes the expired ones away");
    assert_eq!(tickets.redeem(older.expose()).await, Err(TicketError::Invalid));
    assert_eq!(tickets.redeem(new.expose()).await.as_ref(), Ok(key.id()));
}

#[tokio::test]
async fn a_key_has_a_bounded_number_of_pending_tickets() {
    let db = database().await;
    let (key, other, tickets) = (new_key(&db).await, new_key(&db).await, Tickets::new(connect(&db)));
    sqlx::query(
        "INSERT INTO tidewire.tickets (ticket_hash, key_id, expires_at)
         SELECT int4send(n), $1, now() + interval '30 s' FROM generate_series(1, $2::integer) AS n",
    )
    .bind(key.id().as_str())
    .bind(i32::try_from(MAX_PENDING_TICKETS).unwrap())
    .execute(&db.pool)
    .await
    .unwrap();
    assert_eq!(tickets.issue(key.id()).await.unwrap_err(), TicketError::TooMany);
    tickets.issue(other.id()).await.unwrap();
}
