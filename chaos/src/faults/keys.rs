//! API keys taken back and exchanged while sockets stand: F23.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use tidewire::client::{Client, ClientError, ConnectOptions, SubscribeOptions, Subscription};
use tokio::time::Instant;

use super::act::Act;

/// The documented close code.
const KEY_REVOKED: u16 = 4440;
/// What a revoked key's socket is closed within at worst, even with LISTEN broken.
const AT_WORST: Duration = Duration::from_secs(30);
/// Making a key, and a connection with it.
const SET_UP: Duration = Duration::from_secs(20);
/// Sockets of the key: through the balancer they are spread over the nodes.
const SOCKETS: usize = 6;

/// A key, as `tidewire keys create --json` prints it.
#[derive(Deserialize)]
pub(super) struct Created {
    pub(super) key: String,
    key_id: String,
}

/// F23: sockets of a key that is revoked close with its code; those of the key that replaces it stay.
pub(super) async fn revoke(act: &mut Act<'_>) -> anyhow::Result<()> {
    let old = create(act, "chaos-old").await?;
    let mut sockets = Vec::new();
    for _ in 0..SOCKETS {
        sockets.push(connect(act, &old.key).await?);
    }
    act.on("a key");
    let rotated = if act.says("rotate") {
        let new = create(act, "chaos-new").await?;
        Some(connect(act, &new.key).await?)
    } else {
        None
    };
    act.hold().await;
    take_back(act, &old.key_id).await?;
    let revoked = Instant::now();
    act.took = true;
    let mut longest = Duration::ZERO;
    for (_client, subscription) in &mut sockets {
        match tokio::time::timeout_at(revoked + AT_WORST, closed(subscription)).await {
            Ok(Ok(after)) => longest = longest.max(after.saturating_duration_since(revoked)),
            Ok(Err(error)) => act.violation(format!("a socket of a revoked key ended otherwise: {error:#}")),
            Err(_) => act.violation(format!("a socket of a revoked key was open after {AT_WORST:?}")),
        }
    }
    act.micros("revoked_us", longest);
    act.off();
    if let Some((client, _subscription)) = rotated
        && let Err(error) = client.ping().await
    {
        // Another fault may have cut it; only a refusal is wrong.
        if matches!(error, ClientError::Closed { .. } | ClientError::Rejected { .. }) {
            act.violation(format!("the socket of the new key was closed: {error}"));
        }
    }
    Ok(())
}

/// Reads on until the server ends it for good.
async fn closed(subscription: &mut Subscription) -> anyhow::Result<Instant> {
    loop {
        match subscription.next().await {
            Some(Ok(_)) => {}
            Some(Err(ClientError::Closed { code: KEY_REVOKED, .. })) => return Ok(Instant::now()),
            // It was between two connections when the key went: the next one is refused at the door.
            Some(Err(ClientError::Rejected { status: 401, .. })) => return Ok(Instant::now()),
            Some(Err(error)) => return Err(error.into()),
            None => bail!("the subscription ended without a word"),
        }
    }
}

async fn connect(act: &Act<'_>, key: &str) -> anyhow::Result<(Client, Subscription)> {
    let set_up = async {
        let client = Client::connect(ConnectOptions::new(act.cluster().url()).key(key)).await?;
        let subscription = client.subscribe(SubscribeOptions::tables(["*"]).ops(["TRUNCATE"])).await?;
        Ok((client, subscription))
    };
    tokio::time::timeout(SET_UP, set_up).await.context("a connection with the new key")?
}

/// Through the command line, as an operator does it.
pub(super) async fn create(act: &Act<'_>, name: &str) -> anyhow::Result<Created> {
    let text = act.cluster().tidewire(&["keys", "create", "--all", "--json", "--name", name]).await?;
    serde_json::from_str(&text).context("what tidewire keys create printed")
}

/// The row, not the command: from its commit the time counts.
async fn take_back(act: &Act<'_>, key_id: &str) -> anyhow::Result<()> {
    let mut connection = act.cluster().admin().await?;
    let done = sqlx::query("UPDATE tidewire.api_keys SET is_active = false WHERE key_id = $1 AND is_active")
        .bind(key_id)
        .execute(&mut connection)
        .await?;
    ensure!(done.rows_affected() == 1, "the key was not there to revoke");
    Ok(())
}
