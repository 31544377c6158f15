//! What our sessions set, and why. All are settings that an unprivileged role may change.

use std::time::Duration;

use sqlx::postgres::PgConnection;

use super::pool::Pool;

/// What every statement of ours rests on, whatever the role or the database has set: a backslash means itself, nothing else
/// ends a transaction or a wait for a lock (statements have limits of their own), and what was committed is not taken back by
/// a crash (the cluster's stronger setting stays). `$local`: `true` for this transaction alone, `false` for the session.
macro_rules! fit {
    ($local:literal) => {
        concat!(
            "set_config('standard_conforming_strings', 'on', ",
            $local,
            "),
                set_config('lock_timeout', '0', ",
            $local,
            "),
                set_config('synchronous_commit',
                    CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on'
                         ELSE current_setting('synchronous_commit') END, ",
            $local,
            "),
                CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
                     THEN set_config('transaction_timeout', '0', ",
            $local,
            ") END"
        )
    };
}

/// What bounds a pooled statement: no statement of a node's own runs longer than the first, and a session left idle inside a
/// transaction by a bug frees its locks after the second.
macro_rules! limits {
    ($local:literal) => {
        concat!(
            "set_config('statement_timeout', '15s', ",
            $local,
            "), set_config('idle_in_transaction_session_timeout', '10s', ",
            $local,
            ")"
        )
    };
}
pub(super) use {fit, limits};

/// Makes a session fit for the leader: it dies by itself when we fall silent, and its plans do not depend on statistics.
///
/// # Errors
/// When the server refuses.
pub async fn lead(connection: &mut PgConnection, lease: Duration) -> Result<(), sqlx::Error> {
    // Sooner than we give up: who waits for a lock is told so, and may go on without it.
    let lock = format!("{}ms", lease.as_millis() / 2);
    let lease = format!("{}ms", lease.as_millis());
    // Each of the first six covers a hole that the others leave (notes of the design, "how fast does the server notice").
    // synchronous_commit: the cluster's stronger setting stays, `off` and `local` would show what a crash can take back.
    // jit compiles every claim once an estimate crosses its threshold; the scan settings keep the claim on its indexes
    // whatever autovacuum last believed about a table that is empty most of the time.
    sqlx::query(
        "SELECT set_config('idle_session_timeout', $1, false),
                set_config('idle_in_transaction_session_timeout', $1, false),
                set_config('tcp_user_timeout', $1, false),
                set_config('tcp_keepalives_idle', '1', false),
                set_config('tcp_keepalives_interval', '1', false),
                set_config('tcp_keepalives_count', '2', false),
                set_config('client_connection_check_interval', '500ms', false),
                set_config('statement_timeout', '30s', false),
                set_config('lock_timeout', $2, false),
                set_config('synchronous_commit',
                    CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on'
                         ELSE current_setting('synchronous_commit') END, false),
                set_config('jit', 'off', false),
                set_config('enable_seqscan', 'off', false),
                set_config('enable_bitmapscan', 'off', false),
                set_config('plan_cache_mode', 'force_generic_plan', false),
                set_config('work_mem', '64MB', false),
                set_config('timezone', 'UTC', false)",
    )
    .bind(lease)
    .bind(lock)
    .persistent(false)
    .execute(connection)
    .await?;
    Ok(())
}

/// Makes a session fit for announcing: nothing that it commits needs to survive a crash.
///
/// # Errors
/// When the server refuses.
pub async fn announce(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query(
        "SELECT set_config('synchronous_commit', 'off', false), set_config('statement_timeout', '5s', false),
                set_config('tcp_user_timeout', '5s', false), set_config('client_connection_check_interval', '1s', false)",
    )
    .persistent(false)
    .execute(connection)
    .await?;
    Ok(())
}

/// Sets how writers wake a parked relay, for the whole database: `notify` or `poll`.
///
/// # Errors
/// When Postgres refuses.
pub async fn wake(pool: &Pool, mode: &str) -> Result<(), sqlx::Error> {
    sqlx::query("SELECT tidewire.set_wake($1) WHERE tidewire.wake_mode() <> $1").bind(mode).execute(pool).await?;
    Ok(())
}
