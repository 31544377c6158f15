//! A noisy neighbour: F28. A client that asks for what is dear, or for much that it does not read, or again and again.

use std::time::Duration;

use tokio::time::Instant;

use super::act::{Act, POLL};
use super::clients::{memory, metric_sum};
use super::raw::{PING, Raw};

/// Connections of the neighbour.
const CONNECTIONS: usize = 10;
/// Subscriptions of each: what a connection's messages are enough for within seconds.
const SUBSCRIPTIONS: usize = 64;
/// Terms of a dear condition: as many as its 4,096 bytes hold.
const TERMS: usize = 120;
/// Messages and pings of a flood at once, and the pause after them: ten times what is allowed.
const VOLLEY: usize = 20;
const VOLLEY_EVERY: Duration = Duration::from_millis(100);
/// What is read of a connection at once.
const READ_BYTES: usize = 64 << 10;
/// A node answers `/readyz` within this, or it counts as not ready.
const READY_WITHIN: Duration = Duration::from_secs(2);
/// What three nodes may take for it: the limits of their rings and frames.
const GROWTH_BYTES: f64 = 3.0 * 128.0 * 1_048_576.0;

/// F28. The others' silence is a figure of every fault; alone, the nodes must stay ready and their memory bounded.
pub(super) async fn noisy(act: &mut Act<'_>) -> anyhow::Result<()> {
    let before = memory(act);
    act.on("client");
    let (mut neighbours, mut attached) = (Vec::new(), 0_u32);
    let (mut not_ready, mut largest) = (0_u32, before);
    while Instant::now() < act.until() {
        if neighbours.len() < CONNECTIONS {
            // The server closes who floods it, and another fault of the group may be in the way.
            if let Ok(raw) = attach(act, neighbours.len()).await {
                neighbours.push(raw);
                attached += 1;
            }
        }
        let mut standing = Vec::new();
        for mut raw in neighbours.drain(..) {
            if goes_on(act, &mut raw).await {
                standing.push(raw);
            }
        }
        neighbours = standing;
        largest = largest.max(memory(act));
        if act.fault.alone {
            not_ready += unready(act).await;
        }
        tokio::time::sleep(VOLLEY_EVERY).await;
    }
    let passed_over = metric_sum(act, "tidewire_filters_passed_over_total").await;
    drop(neighbours);
    act.took = attached > 0;
    let growth = largest as f64 - before as f64;
    act.figure("neighbours", f64::from(attached));
    act.figure("rss_growth_bytes", growth);
    act.figure("not_ready_n", f64::from(not_ready));
    act.figure("passed_over_n", passed_over);
    if not_ready > 0 {
        act.violation(format!("beside a noisy neighbour a node was not ready {not_ready} times"));
    }
    if act.fault.alone && growth > GROWTH_BYTES {
        act.violation(format!("for a noisy neighbour the nodes grew by {growth} bytes"));
    }
    act.off();
    Ok(())
}

/// One connection of the neighbour, with all its subscriptions.
async fn attach(act: &Act<'_>, nth: usize) -> anyhow::Result<Raw> {
    let cluster = act.cluster();
    let mut raw = Raw::upgrade(cluster.client_link().address(), cluster.api_key()).await?;
    if act.says("syncs") {
        return Ok(raw);
    }
    for id in 0..SUBSCRIPTIONS {
        // No two alike, or they would be served as one.
        let name = format!("{nth}-{id}");
        let rest = if act.says("dear") {
            let terms: Vec<String> = (0..TERMS).map(|term| format!("val LIKE '%_q{term}_0%'")).collect();
            format!(r#""tables":["public.accounts"],"where":"w < 0 OR {} OR val = '{name}'""#, terms.join(" OR "))
        } else {
            String::from(r#""tables":["*"]"#)
        };
        raw.text(&format!(r#"{{"type":"subscribe","id":"{name}",{rest}}}"#)).await?;
    }
    Ok(raw)
}

/// What the neighbour does again and again; false when its connection is over.
async fn goes_on(act: &Act<'_>, raw: &mut Raw) -> bool {
    if act.says("unread") {
        return true;
    }
    if act.says("syncs") {
        for _ in 0..VOLLEY {
            let sent =
                raw.text(r#"{"type":"sync","tx":"1000"}"#).await.is_ok() && raw.frame(PING, b"", true).await.is_ok();
            if !sent {
                return false;
            }
        }
    }
    // What came is thrown away: nothing, within the time, is no end.
    tokio::time::timeout(POLL, raw.drip(READ_BYTES)).await.unwrap_or(true)
}

/// Nodes that do not say in time that they are ready.
async fn unready(act: &Act<'_>) -> u32 {
    let mut count = 0;
    for node in act.cluster().nodes() {
        let ready = tokio::time::timeout(READY_WITHIN, node.ready()).await;
        count += u32::from(!ready.unwrap_or(false));
    }
    count
}
