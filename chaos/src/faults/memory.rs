//! A node under a limit of memory that it nears: F27.

use anyhow::Context as _;
use tokio::time::Instant;

use super::act::{Act, NODE_READY, POLL, Role};
use super::clients::SlowCrowd;
use super::processes;

/// Address space beyond what the node has when it is idle.
const HEADROOM_BYTES: u64 = 192 << 20;
/// Clients that read nothing.
const CROWD: usize = 24;

/// F27: restarted with a limit of its address space, and slow consumers attach. It may close them; it may not die.
pub(super) async fn cap(act: &mut Act<'_>) -> anyhow::Result<()> {
    let node = act.claim(Role::Follower).await?;
    let idle = node.virtual_bytes().context("the node's size")?;
    act.on(node.name());
    processes::stop(act, node).await?;
    let limit = idle + HEADROOM_BYTES;
    node.set_address_space(Some(limit));
    node.start()?;
    node.wait_ready(NODE_READY).await?;
    let pid = node.pid();
    let crowd = SlowCrowd::attach(act.scene(), node.front_link(), CROWD).await?;
    let mut largest = 0;
    while Instant::now() < act.until() && node.running() {
        largest = largest.max(node.virtual_bytes().unwrap_or_default());
        tokio::time::sleep(POLL * 5).await;
    }
    act.figure("address_space_bytes", largest as f64);
    act.figure("limit_bytes", limit as f64);
    act.took = crowd.attached() > 0;
    if !node.running() || node.pid() != pid {
        act.violation(format!("{} died under a limit of {limit} bytes of address space", node.name()));
    } else {
        processes::stop(act, node).await?;
    }
    drop(crowd);
    node.set_address_space(None);
    node.start()?;
    act.off();
    node.wait_ready(NODE_READY).await
}
