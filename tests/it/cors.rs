//! Pages of other origins: what a browser asks before it lets them in, and what it lets them read.

use tidewire::config::Settings;

use crate::support::cluster::TestCluster;
use crate::support::http::{Answer, ask};
use crate::support::wire::Wire;

const LISTED: &str = "https://app.example";
const FOREIGN: &str = "https://evil.example";

async fn with(origins: Option<&str>) -> TestCluster {
    TestCluster::with(1, |settings: &mut Settings| settings.allowed_origins = origins.map(str::to_owned)).await
}

async fn preflight(cluster: &TestCluster, target: &str, origin: &str, method: &str) -> Answer {
    let headers = [
        ("origin", origin),
        ("access-control-request-method", method),
        ("access-control-request-headers", "authorization,content-type,last-event-id"),
    ];
    ask("OPTIONS", cluster.node(0).address(), target, &headers).await
}

fn allowed(answer: &Answer) -> Option<&str> {
    assert_eq!(answer.header("access-control-allow-credentials"), None, "no cookie is ever wanted");
    answer.header("access-control-allow-origin")
}

#[tokio::test]
async fn a_preflight_is_answered_for_every_resource_of_the_api() {
    for (origins, want, vary) in [
        (None, "*", None),
        (Some("*"), "*", None),
        (Some("https://b.example, https://app.example"), LISTED, Some("Origin")),
    ] {
        let cluster = with(origins).await;
        for (target, method) in
            [("/v1/sse?table=orders", "GET"), ("/v1/tickets", "POST"), ("/v1/ws", "GET"), ("/v1/later", "DELETE")]
        {
            let answer = preflight(&cluster, target, LISTED, method).await;
            assert_eq!((answer.status, allowed(&answer)), (204, Some(want)), "{target}");
            assert_eq!(answer.header("vary"), vary, "{target}");
            assert_eq!(answer.header("access-control-max-age"), Some("7200"));
            assert_eq!(answer.header("access-control-allow-methods"), Some("GET, POST"));
            let headers = answer.header("access-control-allow-headers").unwrap();
            for header in ["authorization", "content-type", "last-event-id"] {
                assert!(headers.split(", ").any(|one| one == header), "{headers}");
            }
        }
        for path in ["/health", "/metrics", "/readyz", "/livez"] {
            let answer = preflight(&cluster, path, LISTED, "GET").await;
            assert_eq!((answer.status, allowed(&answer)), (405, None), "{path} is for operators");
            let answer = ask("GET", cluster.node(0).address(), path, &[("origin", LISTED)]).await;
            assert_eq!((answer.status, allowed(&answer)), (200, None), "{path}");
        }
    }
}

#[tokio::test]
async fn a_page_can_read_answers_and_errors_alike() {
    let cluster = with(Some(LISTED)).await;
    let bearer = format!("Bearer {}", cluster.key);
    for (method, target, key, status) in [
        ("GET", "/v1/sse?table=orders", Some(bearer.as_str()), 200),
        ("GET", "/v1/sse?table=orders", None, 401),
        ("GET", "/v1/sse?table=orders&ticket=used", None, 401),
        ("GET", "/v1/sse?wehre=1", Some(&bearer), 400),
        ("POST", "/v1/sse", None, 405),
        ("POST", "/v1/tickets", Some(&bearer), 201),
        ("POST", "/v1/tickets", Some("Bearer no"), 401),
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/v1/ws", None, 426),
    ] {
        let mut headers = vec![("origin", LISTED)];
        headers.extend(key.map(|key| ("authorization", key)));
        let answer = ask(method, cluster.node(0).address(), target, &headers).await;
        assert_eq!((answer.status, allowed(&answer)), (status, Some(LISTED)), "{method} {target}");
        assert_eq!(answer.header("vary"), Some("Origin"), "{method} {target}");
        assert!(answer.header("access-control-expose-headers").unwrap().contains("retry-after"), "{method} {target}");
        // A cache must not give this page's answer to another's, nor a program's to a page.
        let answer = ask(method, cluster.node(0).address(), target, &headers[1..]).await;
        assert_eq!((answer.status, allowed(&answer)), (status, None), "{method} {target}");
        assert_eq!(answer.header("vary"), Some("Origin"), "{method} {target}");
    }
}

#[tokio::test]
async fn pages_that_are_not_listed_get_nothing_done() {
    let cluster = with(Some("https://app.example,null")).await;
    let bearer = format!("Bearer {}", cluster.key);
    let issued = ask("POST", cluster.node(0).address(), "/v1/tickets", &[("authorization", &bearer)]).await;
    let ticket = issued.json().await["ticket"].as_str().unwrap().to_owned();
    let sse = format!("/v1/sse?table=orders&ticket={ticket}");
    let foreign = [
        vec![("origin", FOREIGN)],
        vec![("origin", "http://app.example")],
        vec![("origin", "https://app.example:8443")],
        vec![("origin", "https://app.example.evil.example")],
        vec![("origin", "")],
        // Found by trying: what was no ASCII text counted as no origin.
        vec![("origin", "https://äpp.example")],
        vec![("origin", LISTED), ("origin", FOREIGN)],
    ];
    for origin in foreign {
        for (method, target) in [("GET", sse.as_str()), ("POST", "/v1/tickets"), ("GET", "/v1/ws"), ("OPTIONS", &sse)] {
            let mut headers = origin.clone();
            headers.extend([("authorization", bearer.as_str()), ("access-control-request-method", "GET")]);
            let answer = ask(method, cluster.node(0).address(), target, &headers).await;
            assert_eq!((answer.status, allowed(&answer)), (403, None), "{origin:?} {method} {target}");
            assert_eq!(answer.header("vary"), Some("Origin"));
            assert_eq!(answer.json().await["code"], "forbidden");
        }
    }
    let refused = Wire::connect(&cluster.node(0).ws_url(), &[("authorization", &bearer), ("origin", FOREIGN)]).await;
    assert_eq!(refused.unwrap_err().0, 403);
    for origin in [LISTED, "null", "HTTPS://app.example"] {
        let answer = preflight(&cluster, &sse, origin, "GET").await;
        assert_eq!((answer.status, allowed(&answer)), (204, Some(origin)));
    }
    assert_eq!(
        ask("GET", cluster.node(0).address(), &sse, &[("origin", LISTED)]).await.status,
        200,
        "its ticket is good"
    );
}
