//! A node whose clock is an hour off: F21.

use anyhow::Context as _;
use tokio::time::Instant;

use super::act::{Act, NODE_READY, Role};
use super::{connections, processes};
use crate::cluster::Node;

/// Times that the leader's session is ended, for the node to win one of the elections.
const ELECTIONS: u32 = 20;
/// The library, as `/proc/<pid>/maps` shows it.
const LIBRARY: &str = "libfaketime";

/// F21: the node is restarted with the clock moved, and later restarted without. (The monotonic clock stays: that one
/// cannot jump.)
pub(super) async fn jump(act: &mut Act<'_>) -> anyhow::Result<()> {
    let node = act.claim(if act.says("leader") { Role::Leader } else { Role::Follower }).await?;
    let library = act.scene().abilities.faketime().context("libfaketime was not found")?.display().to_string();
    let offset = act.fault.variant.split(' ').nth(1).context("how far the clock jumps")?;
    act.on(node.name());
    processes::stop(act, node).await?;
    let settings =
        [("LD_PRELOAD", library), ("FAKETIME", offset.to_owned()), ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned())];
    node.set_env(settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect());
    node.start()?;
    node.wait_ready(NODE_READY).await?;
    act.took = preloaded(node);
    if act.says("leader") {
        // To come back it had to go, and another leads since.
        let cluster = act.cluster();
        let leads = || async {
            let leader = cluster.leader().await.ok().flatten().and_then(|index| cluster.nodes().get(index));
            leader.is_some_and(|leader| leader.name() == node.name())
        };
        act.took &= connections::elect_until(act, ELECTIONS, leads).await?;
    }
    act.hold().await;
    processes::stop(act, node).await?;
    node.set_env(Vec::new());
    node.start()?;
    act.off();
    let began = Instant::now();
    node.wait_ready(NODE_READY).await?;
    act.micros("ready_us", began.elapsed());
    Ok(())
}

fn preloaded(node: &Node) -> bool {
    let maps = node.pid().and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/maps")).ok());
    maps.is_some_and(|maps| maps.contains(LIBRARY))
}
