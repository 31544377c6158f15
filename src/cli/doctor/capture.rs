//! Tracked tables: whether their changes are captured, all of them and in order.

use sqlx::Row as _;

use super::{Finding, or_unasked, rows};
use crate::cli::tables::{TrackedTable, tracked_tables};
use crate::postgres::Pool;

pub(super) async fn checks(pool: &Pool) -> Vec<Finding> {
    let tables = match tracked_tables(pool).await {
        Ok(tables) => tables,
        Err(error) => return vec![super::unasked("triggers", &error)],
    };
    let mut findings = triggers(&tables);
    findings.extend(or_unasked("capture's rights", rights(pool).await));
    findings.extend(or_unasked("order", order(pool, &tables).await));
    findings.extend(or_unasked("tables", peculiarities(pool).await));
    findings
}

/// What a superuser runs where the migration could not, or where a restore has lost it.
const OWN_ROLE: &str = "\
DO $$ BEGIN CREATE ROLE tidewire_capture NOLOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
GRANT USAGE ON SCHEMA tidewire TO tidewire_capture;
REVOKE ALL ON tidewire.outbox FROM tidewire_capture;
GRANT INSERT (table_name, operation, row_key, old_key, before_data, after_data, headers, omitted) ON tidewire.outbox
    TO tidewire_capture;
GRANT EXECUTE ON FUNCTION tidewire.name_text(text), tidewire.table_text(oid), tidewire.key_of(json, text[]),
    tidewire.column_names(oid, jsonb, text), tidewire.options_of(text), tidewire.picked(json, text[], boolean),
    tidewire.still_named(oid, int2[], text[]), tidewire.context_headers(json), tidewire.root_of(oid),
    tidewire.is_tracked_root(oid, jsonb), tidewire.bound_columns(oid, jsonb, text), tidewire.carried_columns(oid, jsonb),
    tidewire.select_list(text, text[]), tidewire.image_statement(text[]), tidewire.reason_to_omit(text, bigint),
    tidewire.rendered_slowly(anyelement, text, text, text), tidewire.small_key(json),
    tidewire.to_pinned_json(anyelement), tidewire.rendered_change(text, text, record, record, record, record),
    tidewire.are_bound(oid, int2[], text[]), tidewire.warn_of_omission(text, text) TO tidewire_capture;
ALTER FUNCTION tidewire.capture() OWNER TO tidewire_capture;
ALTER FUNCTION tidewire.capture_bulk() OWNER TO tidewire_capture;";

// What the functions that render rows may do, by the role that owns each of them.
const RIGHTS: &str = "
    SELECT r.rolname::text AS role, c.relowner::regrole::text AS owner, r.oid = c.relowner AS shared, r.rolsuper AS superuser,
           has_schema_privilege(r.oid, 'tidewire', 'USAGE')
           AND (SELECT bool_and(has_column_privilege(r.oid, c.oid, name, 'INSERT'))
                FROM unnest('{table_name,operation,row_key,old_key,before_data,after_data,headers,omitted}'::text[]) name)
           AND (SELECT bool_and(has_function_privilege(r.oid, f.oid, 'EXECUTE'))
                FROM pg_catalog.pg_proc f
                WHERE f.pronamespace = 'tidewire'::regnamespace
                    AND f.proname IN ('name_text', 'table_text', 'key_of', 'column_names', 'options_of', 'picked',
                                      'still_named', 'context_headers', 'root_of', 'is_tracked_root', 'bound_columns',
                                      'carried_columns', 'select_list', 'image_statement', 'reason_to_omit',
                                      'rendered_slowly', 'small_key', 'rendered_change', 'to_pinned_json',
                                      'are_bound', 'warn_of_omission')) AS may,
           r.rolsuper OR has_table_privilege(r.oid, c.oid, 'SELECT, UPDATE, DELETE')
           OR EXISTS (SELECT FROM pg_catalog.pg_auth_members m WHERE m.member = r.oid) AS more
    FROM pg_catalog.pg_proc p
    JOIN pg_catalog.pg_roles r ON r.oid = p.proowner
    JOIN pg_catalog.pg_class c ON c.oid = 'tidewire.outbox'::regclass
    WHERE p.oid IN ('tidewire.capture()'::regprocedure, 'tidewire.capture_bulk()'::regprocedure)
    GROUP BY r.oid, r.rolname, r.rolsuper, c.oid, c.relowner
    ORDER BY 1";

/// To render a row, capture calls casts that the table's owner may have defined.
async fn rights(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let check = "capture's rights";
    let judged = rows(pool, RIGHTS).await?.into_iter().map(|row| {
        let (role, owner): (String, String) = (row.try_get("role")?, row.try_get("owner")?);
        let (shared, superuser): (bool, bool) = (row.try_get("shared")?, row.try_get("superuser")?);
        let (may, more): (bool, bool) = (row.try_get("may")?, row.try_get("more")?);
        let mend = format!("{OWN_ROLE}\nGRANT tidewire_capture TO {owner};");
        let anybody = "whoever may track a table of their own can act as";
        Ok(if !may {
            let what = format!(
                "{role}, whose rights capture has, may not write into the outbox: writes of tracked tables fail"
            );
            Finding::problem(check, what).run(mend)
        } else if shared && !superuser {
            Finding::note(check, format!("those of {role}, who owns the schema: {anybody} {role}")).run(mend)
        } else if more {
            Finding::warning(check, format!("those of {role}, who may do more than write: {anybody} {role}")).run(mend)
        } else {
            Finding::fine(check, format!("those of {role}"))
        })
    });
    judged.collect()
}

fn triggers(tables: &[TrackedTable]) -> Vec<Finding> {
    let broken: Vec<_> = tables.iter().filter(|table| !table.faults.is_empty()).collect();
    if broken.is_empty() {
        return vec![Finding::fine("triggers", format!("{} tracked tables, all captured whole", tables.len()))];
    }
    let judged = broken.into_iter().map(|table| {
        let what = format!("{}: {}", table.table, table.faults.join("; "));
        if table.faults.iter().all(|fault| fault.starts_with("dropped") || fault.starts_with("trigger_different")) {
            return Finding::warning("triggers", format!("{what} (a running leader mends this within seconds)"));
        }
        let what = format!("{what}; changes made meanwhile are not in the log: let clients read the table anew");
        let refused = table.faults.iter().any(|fault| fault.starts_with("repair_refused"));
        let who = if refused { " -- as the table's owner: the nodes' role may not" } else { "" };
        Finding::problem("triggers", what).run(format!("{}{who}", remedy(table)))
    });
    judged.collect()
}

/// Puts missing triggers back by tracking with the same options, and switches disabled ones on.
fn remedy(table: &TrackedTable) -> String {
    let mut lines = Vec::new();
    if table.faults.iter().any(|fault| !fault.starts_with("trigger_disabled")) {
        lines.push(track(table, table.deferred));
    }
    let enable = if table.replica { "ENABLE ALWAYS" } else { "ENABLE" };
    for fault in &table.faults {
        if let Some((trigger, on)) = fault.strip_prefix("trigger_disabled: ").and_then(|rest| rest.split_once(" on ")) {
            lines.push(format!("ALTER TABLE {} {enable} TRIGGER \"{trigger}\";", quoted(on)));
        }
    }
    lines.join("\n")
}

/// The call that tracks a table as it is tracked now.
fn track(table: &TrackedTable, deferred: bool) -> String {
    let list = |names: &[String]| {
        let names: Vec<_> = names.iter().map(|name| literal(name)).collect();
        format!("ARRAY[{}]::text[]", names.join(", "))
    };
    let mut call = format!("SELECT tidewire.track({}", literal(&quoted(&table.table)));
    let lists = [
        ("columns", &table.columns),
        ("except_columns", &table.except),
        ("key", if table.primary { &None } else { &table.key }),
    ];
    for (name, names) in lists.into_iter().filter_map(|(name, names)| Some((name, names.as_ref()?))) {
        call.push_str(&format!(", {name} => {}", list(names)));
    }
    let switches = [
        ("before_image", table.before_image, true),
        ("notify", table.channel.is_some(), false),
        ("bulk", table.bulk && !deferred, false),
        ("deferred", deferred, false),
        ("replica", table.replica, false),
    ];
    for (name, on, _) in switches.into_iter().filter(|(_, on, default)| on != default) {
        call.push_str(&format!(", {name} => {on}"));
    }
    call.push_str(");");
    call
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// A canonical name as SQL writes it.
fn quoted(canonical: &str) -> String {
    let name = crate::table_name::TableName::from_canonical(canonical);
    let quote = |part: &str| format!("\"{}\"", part.replace('"', "\"\""));
    name.schema_and_table()
        .map_or_else(|| canonical.to_owned(), |(schema, table)| format!("{}.{}", quote(&schema), quote(&table)))
}

// Bits of tgtype: 1 row, 2 before, 64 instead of. A body that builds its statements from pieces escapes this.
const REENTRANT: &str = r#"
    SELECT tidewire.table_text(t.relid) AS name, g.tgname::text AS trigger, g.tgfoid::regproc::text AS function
    FROM tidewire.tracked_tables t
    CROSS JOIN LATERAL (SELECT t.relid UNION SELECT p.relid FROM pg_catalog.pg_partition_tree(t.relid) p) AS member (relid)
    JOIN pg_catalog.pg_class m ON m.oid = member.relid
    JOIN pg_catalog.pg_trigger g ON g.tgrelid = m.oid
    JOIN pg_catalog.pg_proc f ON f.oid = g.tgfoid
    WHERE NOT g.tgisinternal AND g.tgparentid = 0 AND g.tgenabled <> 'D' AND g.tgtype & 1 = 1 AND g.tgtype & 66 = 0
        AND f.pronamespace <> 'tidewire'::regnamespace AND NOT t.deferred
        AND EXISTS (
            SELECT FROM pg_catalog.pg_class named
            WHERE named.oid IN (t.relid, m.oid)
                AND f.prosrc ~* ('\m(update|insert\s+into|delete\s+from|merge\s+into)\s+(only\s+)?("?[^\s"]+"?\s*\.\s*)?"?'
                                 || regexp_replace(named.relname, '(\W)', '\\\1', 'g') || '("|\M)'))
    ORDER BY 1, 2"#;

/// Tables where a row trigger of the user's changes rows of the same table: then a row that the outer statement changes
/// too gets its events in the wrong order.
async fn order(pool: &Pool, tables: &[TrackedTable]) -> Result<Vec<Finding>, sqlx::Error> {
    let mut findings = Vec::new();
    for row in rows(pool, REENTRANT).await? {
        let (name, trigger, function): (String, String, String) =
            (row.try_get("name")?, row.try_get("trigger")?, row.try_get("function")?);
        let what = format!(
            "{name}: its row trigger {trigger} ({function}) changes rows of the same table; for a row that the outer \
             statement changes too, the last event may not be its last state"
        );
        let known = tables.iter().find(|table| table.table == name);
        let remedy = known.map(|table| format!("{} -- or make it a BEFORE trigger", track(table, true)));
        findings.push(Finding { run: remedy, ..Finding::warning("order", what) });
    }
    if findings.is_empty() {
        findings.push(Finding::fine("order", "no row trigger of a tracked table is seen to change that table"));
    }
    Ok(findings)
}

async fn peculiarities(pool: &Pool) -> Result<Vec<Finding>, sqlx::Error> {
    let asked = rows(
        pool,
        "SELECT tidewire.table_text(c.oid) AS name, c.relpersistence = 'u' AS unlogged, c.relrowsecurity AS secured,
                c.relkind = 'r' AND EXISTS (SELECT FROM pg_catalog.pg_inherits WHERE inhparent = c.oid) AS inherited,
                t.key_columns IS NULL AS keyless,
                (SELECT string_agg(gone ->> 'name', ', ' ORDER BY position)
                 FROM jsonb_array_elements(tidewire.tracked_options(c.oid) -> 'key_gone') WITH ORDINALITY AS t (gone, position)) AS key_gone,
                tidewire.key_problem(c.oid, t.key_columns) AS key_problem,
                t.bulk AND c.relkind = 'p' AND NOT EXISTS (
                    SELECT FROM pg_catalog.pg_event_trigger WHERE evtname = 'tidewire_attach' AND evtenabled <> 'D') AS late,
                t.notify AND octet_length(tidewire.notify_channel(c.oid)) > 63 AS unnotified
         FROM tidewire.tracked_tables t JOIN pg_catalog.pg_class c ON c.oid = t.relid
         ORDER BY 1",
    )
    .await?;
    let mut findings = Vec::new();
    for row in asked {
        let name: String = row.try_get("name")?;
        for (column, what) in [
            ("unlogged", "is unlogged: after a crash Postgres empties it without an event"),
            ("secured", "has row security: only keys with a row condition may read it"),
            ("inherited", "has children that inherit from it: each must be tracked by itself"),
            ("keyless", "has no key: its events say what changed, but not in which row"),
        ] {
            if row.try_get(column)? {
                findings.push(Finding::note("tables", format!("{name} {what}")));
            }
        }
        if let Some(problem) = row.try_get::<Option<String>, _>("key_problem")? {
            findings.push(Finding::warning("tables", format!("{name}: {problem}")));
        }
        if let Some(key) = row.try_get::<Option<String>, _>("key_gone")? {
            let what =
                format!("{name} was tracked with the key ({key}), of which a column is gone: its events have no key");
            let remedy = "-- track it again with the key => that tells its rows apart".to_owned();
            findings.push(Finding::warning("tables", what).run(remedy));
        }
        if row.try_get("late")? {
            let what = "is captured in bulk, and there are no event triggers here: what is written into a new partition before the \
                        leader has looked (two seconds) is not in the log. Track it without bulk, or migrate as a superuser";
            findings.push(Finding::warning("tables", format!("{name} {what}")));
        }
        if row.try_get("unnotified")? {
            let what = "has a name too long for a channel (63 bytes with cdc_): nobody who listens there is notified";
            findings.push(Finding::warning("tables", format!("{name} {what}")));
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remedy_keeps_the_options_of_tracking() {
        let table = TrackedTable {
            table: r#"public."o'clock x""#.to_owned(),
            key: Some(vec!["a".to_owned(), "B".to_owned()]),
            primary: false,
            columns: None,
            except: Some(vec!["body".to_owned()]),
            before_image: false,
            channel: Some("cdc_x".to_owned()),
            bulk: true,
            deferred: false,
            replica: true,
            faults: vec!["trigger_missing: !tidewire on x".to_owned(), "trigger_disabled: !t on public.p".to_owned()],
        };
        let remedy = remedy(&table);
        let lines: Vec<_> = remedy.lines().collect();
        assert_eq!(
            lines[0],
            r#"SELECT tidewire.track('"public"."o''clock x"', except_columns => ARRAY['body']::text[], key => ARRAY['a', 'B']::text[], before_image => false, notify => true, bulk => true, replica => true);"#
        );
        assert_eq!(lines[1], r#"ALTER TABLE "public"."p" ENABLE ALWAYS TRIGGER "!t";"#);
        assert!(track(&table, true).contains("deferred => true") && !track(&table, true).contains("bulk"));
    }
}
