//! What integration tests stand on: a real Postgres and, for each test, a database of its own in it; a cluster of nodes,
//! clients of it, and the means to break what is between them.
pub(crate) mod client;
pub(crate) mod cluster;
pub(crate) mod container;
pub(crate) mod http;
pub(crate) mod postgres;
pub(crate) mod proxy;
pub(crate) mod raw;
pub(crate) mod wire;

use std::future::Future;
use std::time::{Duration, Instant};
pub(crate) mod relay;

/// Every wait on a fact in these tests ends here, in failure. Generous: machines under load are slow, not wrong.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Between two looks at a fact that nothing tells of.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Waits for `work`; past the deadline the test fails and says what it waited for.
pub(crate) async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(value) => value,
        Err(_) => panic!("not in time: {what}"),
    }
}

/// Looks until `fact` is true.
pub(crate) async fn eventually(what: &str, mut fact: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !fact() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Asks until there is an answer.
pub(crate) async fn answered<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
