//! What a node answers over HTTP to those that are no clients of its feed, or not yet.

use serde_json::json;
use tidewire::config::Settings;

use crate::support::cluster::TestCluster;
use crate::support::http::ask;
use crate::support::raw::Raw;
use crate::support::wire::Wire;

async fn one(edit: impl Fn(&mut Settings)) -> TestCluster {
    TestCluster::with(1, edit).await
}

#[tokio::test]
async fn what_is_no_websocket_gets_426_and_unknown_paths_404() {
    let cluster = one(|_| {}).await;
    let node = cluster.node(0);
    let answer = node.get("/v1/ws").await;
    assert_eq!((answer.status, answer.header("content-type")), (426, Some("application/problem+json")));
    assert_eq!(answer.json().await["code"], "bad_message");
    assert_eq!(node.get("/v1/nothing").await.status, 404);
    assert_eq!(ask("POST", node.address(), "/v1/sse", &[]).await.status, 405);
}

#[tokio::test]
async fn only_a_version_that_nobody_speaks_is_closed_with_4406() {
    let cluster = one(|_| {}).await;
    let url = cluster.node(0).ws_url();
    let bearer = format!("Bearer {}", cluster.key);
    let with = |protocol: &'static str| [("authorization", bearer.as_str()), ("sec-websocket-protocol", protocol)];
    for ours in ["tidewire.v1.json", "tidewire.v9.json, tidewire.v1.json"] {
        let mut wire = Wire::connect(&url, &with(ours)).await.unwrap();
        wire.expect("welcome").await;
    }
    // The library refuses an answer without the protocol that it offered, as the RFC says: so look at the bytes.
    let offered = [("sec-websocket-protocol", "tidewire.v9.json")];
    let mut raw = Raw::connect(cluster.node(0).address(), "/v1/ws", &offered).await;
    // Found in review: it was closed without a word of why.
    let error = raw.json().await;
    let (kind, code, retry) = (&error["type"], &error["code"], &error["retry"]);
    assert_eq!((kind, code, retry), (&json!("error"), &json!("unsupported"), &json!("never")));
    assert!(error["message"].as_str().unwrap().contains("tidewire.v1.json"), "{error}");
    assert_eq!(raw.closed().await, 4406);
}

#[tokio::test]
async fn foreign_pages_are_refused_where_origins_are_listed() {
    let cluster =
        one(|settings| settings.allowed_origins = Some("https://app.example, https://b.example".into())).await;
    let url = cluster.node(0).ws_url();
    let bearer = format!("Bearer {}", cluster.key);
    let from = |origin: &'static str| [("authorization", bearer.as_str()), ("origin", origin)];
    assert!(Wire::connect(&url, &from("https://app.example")).await.is_ok());
    assert_eq!(Wire::connect(&url, &from("https://evil.example")).await.unwrap_err().0, 403);
    assert!(Wire::connect(&url, &[("authorization", &bearer)]).await.is_ok(), "programs send no origin");
}

#[tokio::test]
async fn a_full_node_sends_newcomers_elsewhere() {
    let cluster = one(|settings| settings.max_connections = Some(1)).await;
    let _first = cluster.node(0).wire().await;
    let bearer = format!("Bearer {}", cluster.key);
    let (status, _) = Wire::connect(&cluster.node(0).ws_url(), &[("authorization", &bearer)]).await.unwrap_err();
    assert_eq!(status, 503);
    let answer = ask("GET", cluster.node(0).address(), "/v1/sse?table=orders", &[("authorization", &bearer)]).await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("5")));
}

#[tokio::test]
async fn the_node_tells_how_it_is() {
    let cluster = one(|_| {}).await;
    let node = cluster.node(0);
    assert_eq!(node.get("/livez").await.status, 200);
    assert_eq!(node.get("/readyz").await.status, 200);
    let health = node.get("/health").await.json().await;
    assert_eq!(
        (&health["node"], &health["ready"], &health["relay"]["leader"]),
        (&json!("n0"), &json!(true), &json!(true))
    );
    let metrics = node.get("/metrics").await.text().await;
    for name in ["tidewire_leader 1", "tidewire_ready 1", "tidewire_postgres_up 1"] {
        assert!(metrics.lines().any(|line| line == name), "{name}");
    }
}
