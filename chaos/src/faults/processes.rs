//! Nodes killed, paused and restarted: F1 to F4, F20.

use std::time::Duration;

use anyhow::Context as _;
use sqlx::Row as _;
use tokio::time::Instant;

use super::act::{Act, NODE_READY, Role, until};
use super::recovery;
use crate::cluster::Node;

/// A process is gone after a signal within this.
pub(super) const EXIT: Duration = Duration::from_secs(5);
/// Longest drain of a node that was asked to stop, and the process's end after it.
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// A promise of the drain: `drain_deadline_ms`, and the time to exit.
const DRAIN_PROMISE: Duration = Duration::from_secs(8);
/// A paused leader's last session is ended long before this.
const OLD_SESSION: Duration = Duration::from_secs(3);
/// A node that was woken is ready again within this.
const AWAKE: Duration = Duration::from_secs(30);

/// F1, F2: SIGKILL.
pub(super) async fn kill(act: &mut Act<'_>) -> anyhow::Result<()> {
    let role = if act.fault.class == "F2" { Role::Leader } else { Role::Follower };
    let node = act.claim(role).await?;
    act.on(node.name());
    let killed = node.kill();
    node.wait_exit(EXIT).await?;
    act.took = killed && act.role_held() && !node.running();
    act.hold().await;
    node.start()?;
    act.off();
    let began = Instant::now();
    node.wait_ready(NODE_READY).await?;
    act.micros("ready_us", began.elapsed());
    Ok(())
}

/// The newest leadership, and the backend that it has.
struct Term {
    term: i64,
    node: String,
    pid: i32,
}

async fn newest_term(act: &Act<'_>) -> anyhow::Result<Term> {
    let mut connection = act.cluster().admin().await?;
    let row = sqlx::query("SELECT term, node, pid FROM tidewire.terms ORDER BY term DESC LIMIT 1")
        .fetch_one(&mut connection)
        .await?;
    Ok(Term { term: row.try_get("term")?, node: row.try_get("node")?, pid: row.try_get("pid")? })
}

/// F3: SIGSTOP, then SIGCONT. Once another leads, the old one must have no session left to write with.
pub(super) async fn pause_leader(act: &mut Act<'_>) -> anyhow::Result<()> {
    let node = act.claim(Role::Leader).await?;
    let before = newest_term(act).await?;
    act.on(node.name());
    act.took = node.pause() && act.role_held() && before.node == node.name();
    let cluster = act.cluster();
    let replaced = until(act.until(), || async {
        cluster.leader().await.is_ok_and(|leader| leader.is_some_and(|leader| leader != node.index()))
    });
    if let Some(after) = replaced.await {
        act.micros("replaced_us", after);
    }
    act.hold().await;
    let relayed = recovery::head(act.scene()).await.unwrap_or_default();
    node.resume();
    act.off();
    let now = newest_term(act).await?;
    act.figure("head_at_waking_rows", relayed as f64);
    if now.term != before.term {
        old_session_is_gone(act, &before, &now).await?;
    }
    Ok(())
}

/// Two leaders are two sessions that can write: the old term's backend must have ended before the new term began.
async fn old_session_is_gone(act: &mut Act<'_>, old: &Term, new: &Term) -> anyhow::Result<()> {
    let mut connection = act.cluster().admin().await?;
    let deadline = Instant::now() + OLD_SESSION;
    while Instant::now() < deadline {
        let alive: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM pg_stat_activity a, tidewire.terms t
             WHERE a.pid = $1 AND t.term = $2 AND a.backend_start < t.acquired_at
               AND a.application_name = 'tidewire ' || $3",
        )
        .bind(old.pid)
        .bind(new.term)
        .bind(&old.node)
        .fetch_one(&mut connection)
        .await?;
        if alive > 0 {
            let (old, new) = (old.term, new.term);
            act.violation(format!("the session of term {old} was alive after term {new} had begun"));
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// F4: SIGSTOP, then SIGCONT. The balancer must leave it out, and awake it must not say ready before it has read on.
pub(super) async fn pause_follower(act: &mut Act<'_>) -> anyhow::Result<()> {
    let node = act.claim(Role::Follower).await?;
    act.on(node.name());
    act.took = node.pause() && act.role_held();
    let haproxy = act.cluster().haproxy();
    let out = until(act.until(), || async {
        let servers = haproxy.servers().await.unwrap_or_default();
        servers.iter().any(|(name, state)| name == node.name() && state != "UP")
    });
    if let Some(after) = out.await {
        act.micros("out_of_balancer_us", after);
    }
    act.hold().await;
    let head = recovery::head(act.scene()).await.ok();
    node.resume();
    act.off();
    ready_is_honest(act, node, head).await
}

async fn ready_is_honest(act: &mut Act<'_>, node: &Node, head: Option<u64>) -> anyhow::Result<()> {
    let ready = until(Instant::now() + AWAKE, || node.ready()).await;
    // Read after the answer: it can only have risen, so a number below the head proves that the answer was wrong.
    let newest = node.metric("tidewire_log_newest_seq").await.context("metrics of the woken node")?;
    if let Some(after) = ready {
        act.micros("ready_again_us", after);
        if let Some(head) = head
            && newest < head as f64
        {
            let name = node.name();
            act.violation(format!("{name} said ready at seq {newest}, the log had {head} before it was woken"));
        }
    }
    Ok(())
}

/// F20: SIGTERM, one node after the other.
pub(super) async fn rolling_restart(act: &mut Act<'_>) -> anyhow::Result<()> {
    act.on("every node");
    let mut longest = Duration::ZERO;
    for node in act.cluster().nodes() {
        act.mends(super::act::Mend::Node(node.index()));
        longest = longest.max(restart(act, node).await?);
    }
    act.took = true;
    act.micros("drain_us", longest);
    act.off();
    Ok(())
}

async fn restart(act: &mut Act<'_>, node: &Node) -> anyhow::Result<Duration> {
    let drained = stop(act, node).await?;
    node.start()?;
    node.wait_ready(NODE_READY).await?;
    Ok(drained)
}

/// Asks a node to stop; says how long it took. A bad end is a violation.
pub(super) async fn stop(act: &mut Act<'_>, node: &Node) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let status = node.terminate(DRAIN_LIMIT).await?;
    let drained = began.elapsed();
    if !status.success() {
        act.violation(format!("{} ended with {status} after SIGTERM", node.name()));
    }
    if drained > DRAIN_PROMISE {
        act.violation(format!("{} needed {drained:?} to drain, {DRAIN_PROMISE:?} are promised", node.name()));
    }
    Ok(drained)
}
