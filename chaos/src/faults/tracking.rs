//! A table untracked, or its capture triggers disabled, while somebody listens: F23.

use std::time::Duration;

use anyhow::{Context as _, bail};
use sqlx::{AssertSqlSafe, Executor as _, PgConnection};
use tidewire::client::{Client, ConnectOptions, Item, Resync, ResyncReason, SubscribeOptions, Subscription};

use super::act::Act;
use super::keys;

/// The leader's work is part of it, and another fault may have it.
const AT_WORST: Duration = Duration::from_secs(30);
/// Making the table, and a connection.
const SET_UP: Duration = Duration::from_secs(20);
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
/// Nobody's but this fault's: no row is ever written to it, so the log has only what tracking tells.
const TABLE: &str = "public.chaos_aside";

/// F23: whoever listens to the table is told that changes of it will be missing, by the reason that is documented.
pub(super) async fn missing(act: &mut Act<'_>) -> anyhow::Result<()> {
    let mut admin = act.cluster().admin().await?;
    let table = format!("CREATE TABLE IF NOT EXISTS {TABLE} (id bigint PRIMARY KEY); SELECT tidewire.track('{TABLE}')");
    sqlx::raw_sql(AssertSqlSafe(table)).execute(&mut admin).await?;
    let (_client, mut subscription) = connect(act).await?;
    act.on(TABLE);
    act.hold().await;
    let reason = match act.fault.variant.as_str() {
        "untrack" => {
            let sql = format!("BEGIN; SELECT tidewire.untrack('{TABLE}'); SELECT tidewire.track('{TABLE}'); COMMIT");
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut admin).await?;
            ResyncReason::NotTracked
        }
        _ => {
            disable_until_it_is_seen(&mut admin).await?;
            ResyncReason::CaptureGap
        }
    };
    act.took = true;
    match tokio::time::timeout(AT_WORST, resync(&mut subscription)).await {
        Ok(Ok(told)) if told.reason == reason => {}
        Ok(Ok(told)) => act.violation(format!("a subscriber of {TABLE} was told {}", told.reason.as_str())),
        Ok(Err(error)) => act.violation(format!("a subscription to {TABLE} ended otherwise: {error:#}")),
        Err(_) => {
            act.violation(format!("a subscriber of {TABLE} was not told that changes are missing, in {AT_WORST:?}"))
        }
    }
    act.off();
    Ok(())
}

/// The role that the schema belongs to may make no event triggers, so it is the leader's look that must find this; what is over
/// before a look is a stated limit.
async fn disable_until_it_is_seen(admin: &mut PgConnection) -> anyhow::Result<()> {
    admin.execute(AssertSqlSafe(format!("ALTER TABLE {TABLE} DISABLE TRIGGER ALL"))).await?;
    let seen = async {
        let sql = format!(
            "SELECT fingerprint -> 'faults' <> '[]' FROM tidewire.tracked_tables WHERE relid = '{TABLE}'::regclass"
        );
        while !sqlx::query_scalar::<_, bool>(AssertSqlSafe(sql.clone())).fetch_one(&mut *admin).await? {
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        anyhow::Ok(())
    };
    let seen = tokio::time::timeout(AT_WORST, seen).await.context("a look of the leader that finds disabled triggers");
    admin.execute(AssertSqlSafe(format!("ALTER TABLE {TABLE} ENABLE TRIGGER ALL"))).await?;
    seen?
}

async fn resync(subscription: &mut Subscription) -> anyhow::Result<Resync> {
    loop {
        match subscription.next().await {
            Some(Ok(Item::Resync(told))) => return Ok(told),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error.into()),
            None => bail!("it ended without a word"),
        }
    }
}

async fn connect(act: &Act<'_>) -> anyhow::Result<(Client, Subscription)> {
    let key = keys::create(act, "chaos-tracking").await?.key;
    let set_up = async {
        let client = Client::connect(ConnectOptions::new(act.cluster().url()).key(&key)).await?;
        let subscription = client.subscribe(SubscribeOptions::tables([TABLE])).await?;
        Ok((client, subscription))
    };
    tokio::time::timeout(SET_UP, set_up).await.context("a subscription to a table of its own")?
}
