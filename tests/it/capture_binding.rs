//! Which column is the key, and which old row belongs to which new one: by what they are, not by name or place.

use crate::capture::{captured, database_with, problems, run, strings};

/// `{way}` is the table's options.
const SWAPS: &[(&str, &str, &[&str])] = &[
    (
        "CREATE TABLE t (a int PRIMARY KEY, b int)",
        "ALTER TABLE t RENAME a TO x; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME x TO b; INSERT INTO t (b, a) VALUES (2, 200);
         UPDATE t SET b = 3",
        &[r#"INSERT {"b":2}"#, r#"UPDATE {"b":3} was {"b":2}"#],
    ),
    (
        "CREATE TABLE t (b int, a int, c int, PRIMARY KEY (c, a))",
        "ALTER TABLE t RENAME a TO x; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME x TO b; INSERT INTO t (a, b, c) VALUES (1, 2, 3);
         DELETE FROM t",
        &[r#"INSERT {"c":3,"b":2}"#, r#"DELETE {"c":3,"b":2}"#],
    ),
    (
        "CREATE TABLE t (a int, b int, PRIMARY KEY (a, b))",
        "ALTER TABLE t RENAME a TO x; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME x TO b; INSERT INTO t (b, a) VALUES (1, 2)",
        &[r#"INSERT {"b":1,"a":2}"#],
    ),
    (
        "CREATE TABLE t (id int PRIMARY KEY, b int)",
        "ALTER TABLE t RENAME id TO other; INSERT INTO t VALUES (1, 2)",
        &[r#"INSERT {"other":1}"#],
    ),
    (
        "CREATE TABLE t (id int PRIMARY KEY, b int)",
        "ALTER TABLE t DROP COLUMN id; ALTER TABLE t RENAME b TO id; INSERT INTO t VALUES (7)",
        &["INSERT -"],
    ),
    (
        "CREATE TABLE t (a int, b int, PRIMARY KEY (a, b)) PARTITION BY LIST (b); CREATE TABLE t1 (x int, b int NOT NULL, a int NOT NULL);
         ALTER TABLE t1 DROP COLUMN x; ALTER TABLE t ATTACH PARTITION t1 FOR VALUES IN (1)",
        "ALTER TABLE t RENAME a TO x; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME x TO b; INSERT INTO t (b, a) VALUES (9, 1)",
        &[r#"INSERT {"b":9,"a":1}"#],
    ),
];

#[tokio::test]
async fn a_key_is_its_columns_whatever_they_are_called() {
    for way in ["", ", bulk => true", ", deferred => true", ", before_image => false", ", except_columns => '{}'"] {
        for (table, change, expected) in SWAPS {
            let database = database_with(&format!("{table}; SELECT tidewire.track('t'{way})")).await;
            run(&database.pool, &format!("BEGIN; {change}; COMMIT")).await;
            let lines: Vec<_> =
                captured(&database.pool).await.into_iter().filter(|line| !line.starts_with("SCHEMA")).collect();
            assert_eq!(lines.len(), expected.len(), "{way} {change}: {lines:?}");
            for (line, start) in lines.iter().zip(*expected) {
                assert!(line.starts_with(&format!("{start} ")), "{way} {change}: {line}");
            }
        }
    }
}

#[tokio::test]
async fn a_hidden_column_stays_hidden_when_names_change_hands() {
    for way in ["except_columns => '{secret}'", "columns => '{id,open}'", "bulk => true, except_columns => '{secret}'"]
    {
        let database = database_with(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, open text, secret text); SELECT tidewire.track('t', {way});
             BEGIN; ALTER TABLE t RENAME open TO x; ALTER TABLE t RENAME secret TO open; ALTER TABLE t RENAME x TO secret;
             INSERT INTO t (id, secret, open) VALUES (1, 'was open', 'was secret'); COMMIT"
        ))
        .await;
        let lines: Vec<_> =
            captured(&database.pool).await.into_iter().filter(|line| !line.starts_with("SCHEMA")).collect();
        assert_eq!(lines, [r#"INSERT {"id":1} - -> {"id":1,"secret":"was open"}"#], "{way}");
    }
}

#[tokio::test]
async fn a_row_that_a_partition_swallows_shifts_no_other() {
    let database = database_with(
        "CREATE TABLE p (id int, part int, v int, PRIMARY KEY (id, part)) PARTITION BY LIST (part);
         CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1); CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2);
         CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN IF NEW.id = 2 THEN RETURN NULL; END IF; RETURN NEW; END';
         CREATE TRIGGER swallow BEFORE INSERT ON p2 FOR EACH ROW EXECUTE FUNCTION swallow();
         SELECT tidewire.track('p', bulk => true); INSERT INTO p VALUES (1, 1, 1), (2, 1, 2), (3, 1, 3)",
    )
    .await;
    captured(&database.pool).await;
    run(&database.pool, "UPDATE p SET part = 2; UPDATE p SET v = v + 10").await;
    assert_eq!(
        captured(&database.pool).await,
        [
            r#"DELETE {"id":1,"part":1} {"id":1,"part":1,"v":1} -> -"#,
            r#"DELETE {"id":2,"part":1} {"id":2,"part":1,"v":2} -> -"#,
            r#"DELETE {"id":3,"part":1} {"id":3,"part":1,"v":3} -> -"#,
            r#"INSERT {"id":1,"part":2} - -> {"id":1,"part":2,"v":1}"#,
            r#"INSERT {"id":3,"part":2} - -> {"id":3,"part":2,"v":3}"#,
            r#"UPDATE {"id":1,"part":2} {"id":1,"part":2,"v":1} -> {"id":1,"part":2,"v":11}"#,
            r#"UPDATE {"id":3,"part":2} {"id":3,"part":2,"v":3} -> {"id":3,"part":2,"v":13}"#,
        ]
    );
}

#[tokio::test]
async fn rows_of_an_inheriting_table_are_never_told_as_the_parents() {
    let tables = "CREATE TABLE par (id int PRIMARY KEY, v int);";
    let child = "CREATE TABLE chi (secret int) INHERITS (par);";
    let writes =
        "INSERT INTO par VALUES (1, 1); INSERT INTO chi VALUES (2, 2, 2); UPDATE par SET v = 9; DELETE FROM par";
    let own = [
        r#"INSERT {"id":1} - -> {"id":1,"v":1}"#,
        r#"UPDATE {"id":1} {"id":1,"v":1} -> {"id":1,"v":9}"#,
        r#"DELETE {"id":1} {"id":1,"v":9} -> -"#,
    ];
    let database =
        database_with(&format!("{tables} {child} SELECT tidewire.track('par', bulk => true); {writes}")).await;
    assert_eq!(captured(&database.pool).await, own);

    // The child comes later: what cannot be told apart is told as a gap, until the leader changes the triggers.
    let database = database_with(&format!("{tables} SELECT tidewire.track('par', bulk => true)")).await;
    run(&database.pool, &format!("BEGIN; {child} {writes}; COMMIT")).await;
    let told = strings(
        &database.pool,
        "SELECT operation || coalesce(after_data -> 'changes' -> 0 ->> 'kind', '') FROM tidewire.outbox ORDER BY id",
    )
    .await;
    assert!(told.iter().filter(|line| *line == "SCHEMAcapture_gap").count() >= 2, "{told:?}");
    assert!(!told.iter().any(|line| line.starts_with("UPDATE") || line.starts_with("DELETE")), "{told:?}");
    problems(&database.pool).await;
    captured(&database.pool).await;
    run(&database.pool, writes).await;
    assert_eq!(captured(&database.pool).await, own);
}

#[tokio::test]
async fn a_bulk_child_hears_of_writes_through_its_parent() {
    let database = database_with(
        "CREATE TABLE par (id int PRIMARY KEY, v int); CREATE TABLE chi (PRIMARY KEY (id)) INHERITS (par);
         SELECT tidewire.track('chi', bulk => true); INSERT INTO chi VALUES (2, 2); UPDATE par SET v = 9",
    )
    .await;
    let lines = captured(&database.pool).await;
    assert_eq!(lines[1..], [r#"UPDATE {"id":2} {"id":2,"v":2} -> {"id":2,"v":9}"#]);
}

/// The arguments of migration 8: key names, and nulls in the place of columns that are not carried.
#[tokio::test]
async fn triggers_of_the_last_version_go_on_capturing() {
    for (way, row, expected) in [
        ("", "(3, 's', 1)", r#"INSERT {"id":3} - -> {"id":3,"secret":"s","v":1}"#),
        (", except_columns => '{secret}'", "(3, 's', 1)", r#"INSERT {"id":3} - -> {"id":3,"v":1}"#),
        (", columns => '{v}'", "(3, 's', 1)", r#"INSERT {"id":3} - -> {"id":3,"v":1}"#),
        (", bulk => true, columns => '{v}'", "(3, 's', 1)", r#"INSERT {"id":3} - -> {"id":3,"v":1}"#),
    ] {
        let database = database_with(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, secret text, v int); SELECT tidewire.track('t'{way});
             DO $$
             DECLARE
                 t record;
                 arguments text[];
             BEGIN
                 FOR t IN SELECT tgname, tgfoid::regprocedure::text AS function, pg_get_triggerdef(oid) AS definition,
                                 encode(tgargs, 'escape') AS given
                          FROM pg_trigger WHERE tgrelid = 't'::regclass LOOP
                     arguments := string_to_array(t.given, E'\\\\000');
                     EXECUTE format('DROP TRIGGER %I ON t', t.tgname);
                     EXECUTE format('%s(%L, %L, %L, %L, %L, %L)', split_part(t.definition, '(' || quote_literal(arguments[1]), 1),
                         replace(arguments[1], 'n', ''), arguments[2], CASE WHEN arguments[1] LIKE '%i%' THEN '{{1,3}}' ELSE '{{2}}' END, CASE WHEN arguments[1] LIKE '%i%' THEN '{{id,v}}' ELSE '{{secret}}' END, '{{\"secret\":null}}', 'id');
                 END LOOP;
             END $$;
             INSERT INTO t VALUES {row}"
        ))
        .await;
        let mut lines = captured(&database.pool).await;
        // The gap that exchanging the triggers by hand leaves.
        lines.retain(|line| !line.starts_with("SCHEMA"));
        assert_eq!(lines, [expected], "{way}");
        assert!(
            problems(&database.pool).await.is_empty() || !way.is_empty(),
            "the leader installs today's triggers in their place"
        );
    }
}
