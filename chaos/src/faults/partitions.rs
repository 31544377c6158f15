//! Networks cut, one-way and slow: F5 to F8.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::act::{Act, Mend, Role, until};
use crate::cluster::Node;
use crate::cluster::link::{Cut, Direction, Link, Shape};

/// 1 Mbit/s.
const THROTTLED_BYTES_PER_SECOND: u64 = 125_000;
const DELAY: Duration = Duration::from_millis(100);
const JITTER: Duration = Duration::from_millis(50);

/// F5, F6: a node's way to Postgres, both ways or one.
pub(super) async fn node_and_postgres(act: &mut Act<'_>) -> anyhow::Result<()> {
    let leads = act.says("leader");
    let node = act.claim(if leads { Role::Leader } else { Role::Follower }).await?;
    let cut = if act.says("reset") { Cut::Reset } else { Cut::Blackhole };
    let direction = match (act.says("to"), act.says("from")) {
        (true, _) => Direction::ToServer,
        (_, true) => Direction::ToClient,
        _ => Direction::Both,
    };
    let links = node.database_links();
    let busy = links.iter().any(|link| link.connections() > 0);
    act.on(node.name());
    for link in links {
        link.cut(cut, direction);
    }
    act.took = act.role_held() && busy && node.running();
    if leads {
        let cluster = act.cluster();
        let replaced = until(act.until(), || async {
            cluster.leader().await.is_ok_and(|leader| leader.is_some_and(|leader| leader != node.index()))
        });
        if let Some(after) = replaced.await {
            act.micros("replaced_us", after);
        }
    }
    // Not ready is promised of whoever is cut off, the old leader too.
    if let Some(after) = until(act.until(), || async { !node.ready().await }).await
        && !leads
    {
        act.micros("not_ready_us", after);
    }
    act.hold().await;
    for link in node.database_links() {
        link.heal();
    }
    act.off();
    Ok(())
}

/// F7: clients and the balancer, the balancer and a node.
pub(super) async fn clients_and_nodes(act: &mut Act<'_>) -> anyhow::Result<()> {
    if act.says("balancer") {
        let node = act.claim_any().await?;
        return cut(act, node.name(), node.front_link()).await;
    }
    act.mends(Mend::Clients);
    let link = act.cluster().client_link();
    if !act.says("stall") {
        return cut(act, "client", link).await;
    }
    // Some of the connections stand still: the clients must notice by themselves.
    let some = (link.connections() / 4).max(1);
    act.on("client");
    let stalled = link.stall_some(some, Direction::ToClient);
    act.figure("stalled_connections", stalled as f64);
    act.took = stalled > 0;
    act.hold().await;
    link.heal();
    act.off();
    Ok(())
}

async fn cut(act: &mut Act<'_>, target: &str, link: &Link) -> anyhow::Result<()> {
    let connections = link.connections();
    act.on(target);
    link.cut(if act.says("reset") { Cut::Reset } else { Cut::Blackhole }, Direction::Both);
    act.figure("cut_connections", connections as f64);
    act.took = connections > 0;
    act.hold().await;
    link.heal();
    act.off();
    Ok(())
}

/// F8: latency, loss, a thin line; on a node's way to Postgres or on the balancer's way to a node.
pub(super) async fn slow_network(act: &mut Act<'_>) -> anyhow::Result<()> {
    let node = act.claim_any().await?;
    let links = links(act, node);
    let busy = links.iter().any(|link| link.connections() > 0);
    let percent = act.fault.variant.rsplit(' ').next().and_then(|word| word.strip_suffix('%'));
    if let Some(percent) = percent {
        let percent: u8 = percent.parse().context("percent of a loss")?;
        let filter = act.scene().filter.as_ref().context("there is no packet filter")?;
        let ports: Vec<u16> = links.iter().map(|link| link.address().port()).collect();
        act.mends(Mend::Filter);
        act.on(node.name());
        filter.lose(&ports, percent)?;
        act.took = busy;
        act.hold().await;
        filter.clear()?;
    } else {
        let shape = shape(act)?;
        act.on(node.name());
        for link in &links {
            link.shape(shape);
        }
        act.took = busy;
        act.hold().await;
        for link in &links {
            link.heal();
        }
    }
    act.off();
    Ok(())
}

fn links<'a>(act: &Act<'_>, node: &'a Node) -> Vec<&'a Link> {
    if act.says("database") { node.database_links().to_vec() } else { vec![node.front_link()] }
}

fn shape(act: &Act<'_>) -> anyhow::Result<Shape> {
    let latency = act.says("latency");
    ensure!(latency || act.says("Mbit/s"), "no such line: {}", act.fault.variant);
    Ok(if latency {
        Shape { delay: DELAY, jitter: JITTER, bytes_per_second: None }
    } else {
        Shape { bytes_per_second: Some(THROTTLED_BYTES_PER_SECOND), ..Shape::default() }
    })
}
