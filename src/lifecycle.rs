//! Starting and stopping: named tasks, a soft stop and a hard stop.
//!
//! *Soft* means: no new work, finish what is in hand, say goodbye. *Hard* means: return now. The hard stop implies the
//! soft one. Every task of a node is spawned here, so that stopping can wait for all of them by name.

use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// One node's life. Cheap to clone; all clones are the same life.
#[derive(Clone, Debug, Default)]
pub struct Lifecycle {
    soft: CancellationToken,
    hard: CancellationToken,
    tasks: TaskTracker,
}

impl Lifecycle {
    /// Begins a life.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Spawns a task; `name` appears in the log when it ends badly.
    #[expect(clippy::disallowed_methods, reason = "the one place where tasks begin")]
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let watched = self.tasks.track_future(task);
        let handle = tokio::spawn(watched);
        tokio::spawn(async move {
            if let Err(error) = handle.await
                && error.is_panic()
            {
                tracing::error!(task = name, "a task panicked; its node stops serving what the task did");
            }
        });
    }

    /// Asks for a soft stop.
    pub fn stop(&self) {
        self.soft.cancel();
    }

    /// Demands a hard stop.
    pub fn abort(&self) {
        self.soft.cancel();
        self.hard.cancel();
    }

    /// Fires at the soft stop.
    #[must_use]
    pub fn soft(&self) -> &CancellationToken {
        &self.soft
    }

    /// Fires at the hard stop.
    #[must_use]
    pub fn hard(&self) -> &CancellationToken {
        &self.hard
    }

    /// Waits for every task, at most `limit`; true when all have ended.
    pub async fn finished(&self, limit: Duration) -> bool {
        self.tasks.close();
        tokio::time::timeout(limit, self.tasks.wait()).await.is_ok()
    }
}
