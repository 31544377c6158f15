//! Disks full: F15.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use sqlx::Executor as _;
use tokio::time::Instant;

use super::Scene;
use super::act::{Act, Mend, until};

/// Postgres has died of a full WAL disk within this, or survives it.
const PANIC_WAIT: Duration = Duration::from_secs(15);
/// Postgres finds no room in the tablespace within this.
const FULL_WAIT: Duration = Duration::from_secs(5);
/// What Postgres says then.
const DISK_FULL: &str = "53100";
/// Postgres accepts connections again within this.
const ACCEPTS: Duration = Duration::from_secs(60);

/// F15: Tidewire's tablespace is full, or the WAL's disk, of which Postgres dies.
pub(super) async fn fill(act: &mut Act<'_>) -> anyhow::Result<()> {
    act.mends(Mend::Disks);
    act.mends(Mend::Postgres);
    let postgres = act.cluster().postgres();
    let server = postgres.server(postgres.current());
    // An error before the beginning: the fault is skipped.
    ensure!(postgres.has_small_disks(), "the run has no small disks");
    ensure!(!act.says("wal") || postgres.current() == 0, "the WAL of the second server has no disk of its own");
    act.on("primary");
    if act.says("wal") {
        postgres.fill_wal()?;
        let died = until(Instant::now() + PANIC_WAIT, || async { !server.accepts().await }).await;
        act.took = died.is_some();
    } else {
        postgres.fill_tablespace()?;
        let full = until(Instant::now() + FULL_WAIT, || no_room(act.scene())).await;
        act.took = full.is_some();
    }
    act.hold().await;
    postgres.free_disks()?;
    if !server.running() {
        server.start().await?;
    }
    until(Instant::now() + ACCEPTS, || server.accepts()).await.context("Postgres does not accept connections")?;
    act.stamp("accepted_at_us");
    act.off();
    Ok(())
}

/// Whether Postgres refuses a megabyte in the tablespace for want of room.
async fn no_room(scene: &Scene) -> bool {
    let Ok(mut connection) = scene.cluster.admin().await else { return false };
    let probe = "BEGIN;
        CREATE TABLE public.chaos_probe AS SELECT repeat('x', 100) FROM generate_series(1, 10000);
        ROLLBACK";
    let refused = connection.execute(probe).await.err();
    refused.and_then(|error| Some(error.as_database_error()?.code()? == DISK_FULL)).unwrap_or(false)
}
