//! Fail points of a server that was built with them: FP.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use rand::seq::IndexedRandom;
use tokio::time::Instant;

use super::act::{Act, NODE_READY, Role, until};
use super::connections;
use super::processes::EXIT;
use crate::cluster::Node;

/// A point that kills is passed within this, or nothing passes it now.
const PASSED: Duration = Duration::from_secs(3);
/// Rows of a transaction that is relayed in parts.
const LARGE: u32 = 20_000;
/// Elections until this follower has won one.
const ELECTIONS: u32 = 6;
/// How long a point that sleeps holds a task up, milliseconds.
const SLEEP: &str = "sleep(400)";

/// FP: one point of the node's list × kill, sleep or error.
pub(super) async fn set(act: &mut Act<'_>) -> anyhow::Result<()> {
    let name = choose(act).await?;
    let role = if name.starts_with("relay.") { Role::Leader } else { Role::Follower };
    let node = act.claim(role).await?;
    let action = if act.says("sleep") { SLEEP } else { act.fault.variant.as_str() };
    act.on(&format!("{name} of {}", node.name()));
    let before = std::fs::metadata(node.log_path()).map_or(0, |file| file.len());
    node.failpoint(&name, action).await?;
    provoke(act, node, &name, before).await?;
    if act.says("kill") {
        let died = until(Instant::now() + PASSED, || async { !node.running() }).await;
        act.took = act.role_held() && died.is_some();
        if died.is_some() {
            node.wait_exit(EXIT).await?;
        }
        act.hold().await;
    } else {
        act.hold().await;
        // Armed is not passed: the node logs each pass.
        act.took = act.role_held() && logged_since(node.log_path(), before).contains(&name);
    }
    if node.running() {
        node.failpoint(&name, "off").await?;
    } else {
        node.start()?;
    }
    act.off();
    node.wait_ready(NODE_READY).await
}

/// One of those that are passed all the time, or that [`provoke`] brings about. Ends of terms, new epochs and new
/// partitions are passed when other faults make them.
async fn choose(act: &mut Act<'_>) -> anyhow::Result<String> {
    let node = act.cluster().nodes().iter().find(|node| node.running()).context("no node runs")?;
    let names = names(&node.failpoints().await?);
    // A step that cannot wait does not sleep.
    let waits = |name: &str| !(act.says("sleep") && name == "session.send");
    let often = |name: &&String| {
        waits(name)
            && !matches!(
                name.as_str(),
                "election.resigning" | "relay.partition" | "feed.epoch" | "feed.read" | "resume.page" | "log.trim"
            )
    };
    let often: Vec<&String> = names.iter().filter(often).collect();
    Ok((*often.choose(&mut act.random).context("the server has no fail points")?).clone())
}

/// Has the node pass the point.
async fn provoke(act: &Act<'_>, node: &Node, name: &str, before: u64) -> anyhow::Result<()> {
    if name.starts_with("resume.") {
        // Its clients come back, to any node: some of them to this one.
        node.front_link().reset_all();
    } else if name.starts_with("drain.") {
        // Asked to go: it dies on the way, or is late.
        let _ = node.terminate(EXIT).await;
    } else if name == "relay.part" {
        act.scene().workload.big_transaction(LARGE).await?;
    } else if name.starts_with("election.") {
        let passed = || async { !node.running() || logged_since(node.log_path(), before).contains(name) };
        connections::elect_until(act, ELECTIONS, passed).await?;
    }
    Ok(())
}

/// Lines about fail points after this many bytes of a log.
fn logged_since(log: &Path, bytes: u64) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let new = text.get(usize::try_from(bytes).unwrap_or(usize::MAX)..).unwrap_or_default();
    let lines = String::from_utf8_lossy(new);
    lines.lines().filter(|line| line.contains("fail point")).collect()
}

/// The names in the node's list: a JSON array of them, an object by them, or one at the beginning of each line.
fn names(text: &str) -> Vec<String> {
    use serde_json::Value;
    match serde_json::from_str(text) {
        Ok(Value::Object(points)) => points.into_iter().map(|(name, _)| name).collect(),
        Ok(Value::Array(points)) => points
            .iter()
            .filter_map(|point| point.as_str().or_else(|| point.get("name")?.as_str()).map(str::to_owned))
            .collect(),
        _ => text.lines().filter_map(|line| line.split_whitespace().next().map(str::to_owned)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn names_are_found_in_every_form_of_the_list() {
        for text in [r#"["a","b"]"#, r#"{"a":"off","b":null}"#, r#"[{"name":"a"},{"name":"b"}]"#, "a off\nb kill\n"] {
            assert_eq!(names(text), ["a", "b"], "{text}");
        }
    }
}
