//! The server and its settings, Tidewire's schema, and what this role may do.

use sqlx::Row as _;

use super::{Finding, or_unasked, rows};
use crate::postgres::Pool;
use crate::postgres::migrate;

/// The first good minor of each major version in which LISTEN cannot fail because VACUUM has truncated the commit log that
/// unread notifications need (fixed in November 2025, out in February 2026).
const GOOD_MINORS: &[(i32, i32)] = &[(14, 22), (15, 17), (16, 13), (17, 9), (18, 3)];

pub(super) async fn checks(pool: &Pool) -> Vec<Finding> {
    let mut findings = or_unasked("version", version(pool).await);
    findings.extend(or_unasked("settings", settings(pool).await));
    findings
}

async fn version(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let number: i32 = sqlx::query_scalar("SELECT current_setting('server_version_num')::int").fetch_one(pool).await?;
    Ok(vec![judge_version(number)])
}

fn judge_version(number: i32) -> Finding {
    let (major, minor) = (number / 10_000, number % 10_000);
    let what = format!("Postgres {major}.{minor}");
    match GOOD_MINORS.iter().find(|(known, _)| *known == major) {
        _ if major < 14 => Finding::problem("version", format!("{what}: Tidewire needs version 14 or later")),
        Some((_, good)) if minor < *good => {
            let why =
                format!("{what}: before {major}.{good} LISTEN can fail (\"could not access status of transaction\")");
            Finding::warning("version", why).run(format!("upgrade the server to {major}.{good} or later (a restart)"))
        }
        _ => Finding::fine("version", what),
    }
}

async fn settings(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT current_setting('wal_level') AS wal_level, current_setting('fsync') AS fsync,
                current_setting('full_page_writes') AS full_page_writes, current_setting('autovacuum') AS autovacuum,
                current_setting('synchronous_commit') AS synchronous_commit",
    )
    .fetch_one(pool)
    .await?;
    let setting = |name: &str| row.try_get::<String, _>(name);
    let mut findings = Vec::new();
    findings.push(Finding::fine("wal_level", setting("wal_level")?));
    let commit = setting("synchronous_commit")?;
    findings.push(match commit.as_str() {
        "off" | "local" => Finding::warning(
            "synchronous_commit",
            format!("{commit}: what an application was told is committed can be lost in a crash (the relay's own commits wait)"),
        )
        .run("ALTER SYSTEM SET synchronous_commit = 'on'; SELECT pg_reload_conf();"),
        _ => Finding::fine("synchronous_commit", commit),
    });
    for (name, why) in [
        ("fsync", "a crash can destroy the database"),
        ("full_page_writes", "a crash can tear pages"),
        ("autovacuum", "the outbox is a queue and needs it"),
    ] {
        if setting(name)? == "off" {
            let found = Finding::warning(name, format!("off: {why}"));
            findings.push(found.run(format!("ALTER SYSTEM SET {name} = 'on'; SELECT pg_reload_conf();")));
        }
    }
    Ok(findings)
}

/// Whether Tidewire's schema is there and of this program's version.
pub(super) async fn schema(pool: &Pool) -> Result<Finding, sqlx::Error> {
    let there: bool =
        sqlx::query_scalar("SELECT to_regclass('tidewire.schema_migrations') IS NOT NULL").fetch_one(pool).await?;
    let wanted = migrate::version();
    if !there {
        let found = Finding::problem("schema", "this database has no schema tidewire");
        return Ok(found.run("tidewire migrate"));
    }
    let found: i64 =
        sqlx::query_scalar("SELECT coalesce(max(version), 0) FROM tidewire.schema_migrations").fetch_one(pool).await?;
    Ok(match found.cmp(&wanted) {
        std::cmp::Ordering::Equal => Finding::fine("schema", format!("version {found}")),
        std::cmp::Ordering::Less => {
            let what = format!("version {found}, this program needs {wanted}");
            Finding::problem("schema", what).run("tidewire migrate")
        }
        std::cmp::Ordering::Greater => {
            let what = format!("version {found} is newer than this program ({wanted})");
            Finding::problem("schema", what).run("upgrade the program")
        }
    })
}

pub(super) async fn privileges(pool: &Pool) -> Vec<Finding> {
    or_unasked("privileges", asked_privileges(pool).await)
}

async fn asked_privileges(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let asked = rows(
        pool,
        "SELECT current_user::text AS role, pg_get_userbyid(relowner)::text AS owner,
                pg_has_role(relowner, 'USAGE') AS owns, pg_has_role('pg_read_all_stats', 'USAGE') AS sees,
                (SELECT count(*) FROM pg_catalog.pg_event_trigger
                 WHERE evtname IN ('tidewire_attach', 'tidewire_ddl', 'tidewire_drop') AND evtenabled <> 'D') AS event_triggers
         FROM pg_catalog.pg_class WHERE oid = 'tidewire.outbox'::regclass",
    )
    .await?;
    let Some(row) = asked.first() else { return Ok(Vec::new()) };
    let (role, owner): (String, String) = (row.try_get("role")?, row.try_get("owner")?);
    let mut findings = vec![match row.try_get::<bool, _>("owns")? {
        true => Finding::fine("privileges", format!("{role} acts as the owner, {owner}")),
        false => {
            let what =
                format!("{role} is no member of {owner}: a node with this role can neither relay nor read the log");
            Finding::problem("privileges", what).run(format!("GRANT \"{owner}\" TO \"{role}\";"))
        }
    }];
    if !row.try_get::<bool, _>("sees")? {
        let what =
            format!("{role} does not see what other roles' sessions do: whoever holds things up stays nameless here");
        findings.push(Finding::note("privileges", what).run(format!("GRANT pg_read_all_stats TO \"{role}\";")));
    }
    if row.try_get::<i64, _>("event_triggers")? < 3 {
        let what = "without event triggers, changes of tables are noticed within two seconds instead of at once, and a capture \
                    trigger that is disabled and enabled again in between is not noticed at all";
        findings.push(Finding::note("event triggers", what));
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Severity;

    #[test]
    fn a_minor_with_the_listen_defect_is_named_with_its_remedy() {
        for (number, severity) in [
            (130_020, Severity::Problem),
            (140_021, Severity::Warning),
            (140_022, Severity::Fine),
            (170_008, Severity::Warning),
            (170_009, Severity::Fine),
            (180_003, Severity::Fine),
            (190_000, Severity::Fine),
        ] {
            assert_eq!(judge_version(number).severity, severity, "{number}");
        }
        assert!(judge_version(150_001).run.unwrap().contains("15.17"));
    }
}
