//! Clients that read slowly, all come at once, or mean harm: F18, F19, F24.

use std::time::Duration;

use anyhow::Context as _;
use rand::seq::IndexedRandom;
use tokio::time::Instant;

use super::Scene;
use super::act::{Act, Mend, POLL};
use super::raw::{ANSWER, BINARY, End, Raw, TEXT, request, status};
use crate::cluster::link::Link;

/// A client that accepts nothing is closed within this: the server's default of `slow_after_ms`, and a margin.
const CLOSED: Duration = Duration::from_secs(45);
/// Slow clients of one F18.
const CROWD: usize = 4;
/// Subscriptions of a slow client, so that its buffers fill at once.
const SUBSCRIPTIONS: usize = 16;
/// A dripping client takes this much…
const DRIP_BYTES: usize = 100;
/// …this often: 1 KB/s.
const DRIP_EVERY: Duration = Duration::from_millis(100);
/// Between two attacks.
const BREATH: Duration = Duration::from_millis(20);
/// Above `message_bytes`.
const HUGE_BYTES: usize = 80 << 10;
/// A condition nested deeper than anything reasonable.
const DEPTH: usize = 1_500;

/// Clients that have subscribed to everything, from as far back as a client's cursor goes, and do not read.
pub(super) struct SlowCrowd(Vec<Raw>);

impl SlowCrowd {
    pub(super) async fn attach(scene: &Scene, link: &Link, count: usize) -> anyhow::Result<Self> {
        let cursors = scene.workload.positions().into_iter().filter_map(|position| position.cursor);
        let oldest = cursors.min_by_key(|cursor| cursor.seq).context("no client has a cursor yet")?;
        let mut crowd = Vec::new();
        for _ in 0..count {
            let mut raw = Raw::upgrade(link.address(), scene.cluster.api_key()).await?;
            for id in 0..SUBSCRIPTIONS {
                let from = format!(r#"{{"cursor":"{oldest}"}}"#);
                raw.text(&format!(r#"{{"type":"subscribe","id":"{id}","tables":["*"],"from":{from}}}"#)).await?;
            }
            crowd.push(raw);
        }
        Ok(Self(crowd))
    }

    pub(super) fn attached(&self) -> usize {
        self.0.len()
    }
}

/// F18: reads nothing, or 1 KB/s. The server closes them with 4008; they cannot read that, so its metrics tell.
pub(super) async fn slow(act: &mut Act<'_>) -> anyhow::Result<()> {
    let before = metric_sum(act, "tidewire_slow_consumers_total").await;
    act.on("client");
    let mut crowd = attached_among_faults(act).await?;
    let attached = Instant::now();
    act.took = crowd.attached() > 0;
    let deadline = if act.fault.alone { attached + CLOSED } else { act.until() };
    let mut closed = 0.0;
    while Instant::now() < deadline && closed < CROWD as f64 {
        if act.says("drip") {
            for raw in &mut crowd.0 {
                let _ = tokio::time::timeout(POLL, raw.drip(DRIP_BYTES)).await;
            }
        }
        tokio::time::sleep(DRIP_EVERY).await;
        // A node that restarts counts from 0 again.
        closed = (metric_sum(act, "tidewire_slow_consumers_total").await - before).max(0.0);
    }
    act.figure("closed_slow", closed);
    if closed >= CROWD as f64 {
        act.micros("closed_us", attached.elapsed());
    } else if act.fault.alone {
        act.violation(format!("{closed} of {CROWD} slow clients were closed within {CLOSED:?}"));
    }
    drop(crowd);
    act.off();
    Ok(())
}

/// Alone, the clients must get in at once; beside other faults the way in may be cut for a while.
async fn attached_among_faults(act: &Act<'_>) -> anyhow::Result<SlowCrowd> {
    loop {
        match SlowCrowd::attach(act.scene(), act.cluster().client_link(), CROWD).await {
            Err(_) if !act.fault.alone && Instant::now() < act.until() => tokio::time::sleep(DRIP_EVERY).await,
            done => return done,
        }
    }
}

/// A metric of all nodes that answer.
pub(super) async fn metric_sum(act: &Act<'_>, name: &str) -> f64 {
    let mut sum = 0.0;
    for node in act.cluster().nodes() {
        sum += node.metric(name).await.unwrap_or_default();
    }
    sum
}

/// F19: everybody of one node, or of all, comes at once.
pub(super) async fn storm(act: &mut Act<'_>) -> anyhow::Result<()> {
    act.mends(Mend::Clients);
    let replay = "tidewire_log_queries_total{purpose=\"replay\"}";
    let before = metric_sum(act, replay).await;
    let cluster = act.cluster();
    let cut = match act.fault.variant.as_str() {
        "clients" => {
            act.on("client");
            cluster.client_link().reset_all()
        }
        "all" => {
            act.on("every node");
            let cut = cluster.client_link().connections();
            for node in cluster.nodes() {
                cluster.haproxy().shut_sessions(node.name()).await?;
            }
            cut
        }
        _ => {
            let node = act.claim_any().await?;
            act.on(node.name());
            let cut = node.front_link().connections();
            cluster.haproxy().shut_sessions(node.name()).await?;
            cut
        }
    };
    act.off();
    act.took = cut > 0;
    act.figure("cut_connections", cut as f64);
    act.hold().await;
    let queries = metric_sum(act, replay).await - before;
    act.figure("log_queries", queries.max(0.0));
    Ok(())
}

/// What a hostile client tries.
#[derive(Clone, Copy, Debug)]
enum Attack {
    Garbage,
    WrongKey,
    NotMasked,
    Binary,
    Huge,
    NotUtf8,
    NotJson,
    DeepFilter,
    ForgedCursor,
    SlowHandshake,
}

const ATTACKS: [Attack; 10] = [
    Attack::Garbage,
    Attack::WrongKey,
    Attack::NotMasked,
    Attack::Binary,
    Attack::Huge,
    Attack::NotUtf8,
    Attack::NotJson,
    Attack::DeepFilter,
    Attack::ForgedCursor,
    Attack::SlowHandshake,
];

/// F24: each attack again and again. The right code comes, and memory stays flat.
pub(super) async fn hostile(act: &mut Act<'_>) -> anyhow::Result<()> {
    let memory = memory(act);
    act.on("client");
    let (mut tried, mut wrong) = (0_u32, std::collections::BTreeSet::new());
    let mut slow = Vec::new();
    while Instant::now() < act.until() {
        let Some(attack) = ATTACKS.choose(&mut act.random).copied() else { break };
        // Another fault of the group may refuse the connection: that says nothing of the server.
        match strike(act, attack, &mut slow).await {
            Ok(Some(got)) => drop(wrong.insert(format!("{attack:?} was answered with {got}"))),
            Ok(None) => {}
            Err(_) => {
                tokio::time::sleep(BREATH).await;
                continue;
            }
        }
        tried += 1;
        tokio::time::sleep(BREATH).await;
    }
    drop(slow);
    act.took = tried > 0;
    act.figure("attacks", f64::from(tried));
    act.figure("rss_growth_bytes", self::memory(act) as f64 - memory as f64);
    for text in wrong {
        act.violation(text);
    }
    act.off();
    Ok(())
}

/// Tries once; what was wrong with the answer. A connection that ends without a code is no wrong answer.
async fn strike(
    act: &Act<'_>,
    attack: Attack,
    slow: &mut Vec<tokio::net::TcpStream>,
) -> anyhow::Result<Option<String>> {
    let (address, key) = (act.cluster().client_link().address(), act.cluster().api_key());
    match attack {
        Attack::Garbage => {
            let mut stream = Raw::plain(address, b"\x16\x03\x01\x02\x00 this is not HTTP\r\n\r\n").await?;
            let status = tokio::time::timeout(ANSWER, status(&mut stream)).await??;
            return Ok((!(400..500).contains(&status)).then(|| status.to_string()));
        }
        Attack::WrongKey => {
            let mut stream = Raw::plain(address, &request(address, "cdc_nobody")).await?;
            let status = tokio::time::timeout(ANSWER, status(&mut stream)).await??;
            return Ok((![401, 429, 503].contains(&status)).then(|| status.to_string()));
        }
        Attack::SlowHandshake => {
            slow.push(Raw::plain(address, b"GET /v1/ws HTTP/1.1\r\nHost: slow").await?);
            return Ok(None);
        }
        _ => {}
    }
    let mut raw = Raw::upgrade(address, key).await?;
    match broken(&mut raw, attack).await? {
        Answer::Code(expected) => Ok(match raw.end(ANSWER).await {
            End::Code(code) if code != expected => Some(code.to_string()),
            // Beside other faults the way back may be cut, or the node may wait for Postgres.
            End::Open if act.fault.alone => Some(format!("nothing within {ANSWER:?}")),
            _ => None,
        }),
        Answer::Words(expected) => {
            let Some(said) = raw.answer("a", ANSWER).await? else {
                return Ok(act.fault.alone.then(|| format!("nothing within {ANSWER:?}")));
            };
            // A node that cannot reach Postgres now may say so instead.
            let fits = expected.iter().chain(&["unavailable"]).any(|word| said.contains(word));
            Ok((!fits).then_some(said))
        }
    }
}

/// What the protocol answers a broken rule with.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// The connection is closed with this code.
    Code(u16),
    /// A message says one of these, and the connection stays.
    Words(&'static [&'static str]),
}

/// Sends what breaks a rule.
async fn broken(raw: &mut Raw, attack: Attack) -> anyhow::Result<Answer> {
    let answer = match attack {
        Attack::NotMasked => {
            raw.frame(TEXT, b"{}", false).await?;
            Answer::Code(1002)
        }
        Attack::Binary => {
            raw.frame(BINARY, b"{}", true).await?;
            Answer::Code(1003)
        }
        Attack::Huge => {
            raw.frame(TEXT, &[b' '; HUGE_BYTES], true).await?;
            Answer::Code(1009)
        }
        Attack::NotUtf8 => {
            raw.frame(TEXT, b"{\"type\":\"\xff\xfe\"}", true).await?;
            Answer::Code(1007)
        }
        Attack::NotJson => {
            raw.text("subscribe, please").await?;
            Answer::Code(4400)
        }
        Attack::DeepFilter => {
            let deep = format!("{}w = 1{}", "(".repeat(DEPTH), ")".repeat(DEPTH));
            // One table by name: with a glob the filter would be refused unread.
            raw.text(&format!(r#"{{"type":"subscribe","id":"a","tables":["public.notes"],"where":"{deep}"}}"#)).await?;
            Answer::Words(&["bad_filter"])
        }
        _ => {
            let cursor = "00000001-00000000ffffffff-deadbeef";
            raw.text(&format!(r#"{{"type":"subscribe","id":"a","tables":["*"],"from":{{"cursor":"{cursor}"}}}}"#))
                .await?;
            // After a failover it lies in the tail that an epoch has lost, as far as anybody can tell.
            Answer::Words(&["cursor_invalid", "history_diverged"])
        }
    };
    Ok(answer)
}

/// Of all nodes, bytes.
pub(super) fn memory(act: &Act<'_>) -> u64 {
    act.cluster().nodes().iter().filter_map(crate::cluster::Node::rss_bytes).sum()
}
