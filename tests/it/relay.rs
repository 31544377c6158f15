//! What was tried to break the claim, kept: each counterexample of the design's notes, and those of our own making.

mod attack;
mod plan;

use tidewire::dev::postgres::PrivateServer;

use crate::capture::run;
use crate::support::postgres::{database, own_server, pool};
use crate::support::relay::{Term, Writer, emit, faults};

/// Plain rows of the outbox, `n` from 1 to `count`, as one statement.
fn rows(prefix: &str, count: u32) -> String {
    format!(
        r#"INSERT INTO tidewire.outbox (table_name, operation, after_data)
           SELECT 'event:t', 'EVENT', json_build_object('n', '{prefix}' || g) FROM generate_series(1, {count}) g;"#
    )
}

/// A server where nobody else takes transaction ids.
async fn quiet_server() -> (PrivateServer, String, sqlx::PgPool) {
    let server = own_server().await;
    let url = server.url("postgres");
    let pool = pool(&url).await;
    tidewire::postgres::migrate::migrate(&pool.connect_options()).await.unwrap();
    (server, url, pool)
}

#[tokio::test]
async fn a_running_writer_with_the_newest_xid_of_an_idle_database_is_not_passed_over() {
    let (_server, url, pool) = quiet_server().await;
    let mut term = Term::begin(&url, 100).await.unwrap();
    let mut writer = Writer::connect(&url).await;
    for round in 0..20 {
        writer.run("BEGIN").await;
        writer.emit(&format!("first {round}")).await;
        for _ in 0..3 {
            assert!(term.step().await.unwrap().events.is_empty());
        }
        if round % 2 == 0 {
            // Draws a higher id, still without another xid in between.
            writer.emit("second").await;
        }
        assert!(term.step().await.unwrap().events.is_empty());
        writer.run("COMMIT").await;
        assert_eq!(term.drain().await, if round % 2 == 0 { 2 } else { 1 }, "round {round}");
    }
    assert_eq!(faults(&pool).await, [""; 0]);
}

#[tokio::test]
async fn a_long_writer_holds_up_nobody_and_comes_when_it_commits() {
    let database = database().await;
    let mut term = Term::begin(&database.url, 7).await.unwrap();
    let (mut long, mut short) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    long.run("BEGIN").await;
    long.emit("long").await;
    for round in 0..30 {
        short.run(&format!("BEGIN; {}; {}; COMMIT", emit("a"), emit("b"))).await;
        assert_eq!(term.drain().await, 2, "round {round}");
    }
    long.emit("end").await;
    long.run("COMMIT").await;
    term.drain().await;
    assert_eq!(term.last(2), ["long", "end."]);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test]
async fn a_hundred_thousand_rows_of_one_transaction_are_contiguous_and_end_once() {
    let database = database().await;
    let mut term = Term::begin(&database.url, 5000).await.unwrap();
    let (mut large, mut small) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    large.run("BEGIN").await;
    for part in 0..20 {
        large.run(&rows(&format!("{part}-"), 5000)).await;
        small.run(&emit("small")).await;
        let _ = term.step().await.unwrap();
    }
    small.run(&format!("BEGIN; {}", emit("before"))).await;
    large.run("COMMIT").await;
    small.run(&format!("{}; COMMIT", emit("after"))).await;
    term.drain().await;
    assert_eq!(term.newest, 100_022);
    assert_eq!(faults(&database.pool).await, [""; 0]);
    assert_eq!(term.last(2), ["before", "after."]);
}

#[tokio::test]
async fn large_interleaved_transactions_wait_beyond_the_window_and_come_in_order_of_their_ends() {
    let database = database().await;
    let mut term = Term::begin(&database.url, 10).await.unwrap();
    let mut writers = [Writer::connect(&database.url).await, Writer::connect(&database.url).await];
    let mut small = Writer::connect(&database.url).await;
    for writer in &mut writers {
        writer.run("BEGIN").await;
    }
    for round in 0..5 {
        for (index, writer) in writers.iter_mut().enumerate() {
            writer.run(&rows(&format!("{index}-{round}-"), 8)).await;
        }
        small.run(&emit(&format!("s{round}"))).await;
    }
    writers[1].emit("end of 1").await;
    writers[0].emit("end of 0").await;
    // Nothing was relayed so far: the first window holds only beginnings.
    writers[0].run("COMMIT").await;
    writers[1].run("COMMIT").await;
    small.run(&emit("last")).await;
    term.drain().await;
    assert_eq!(term.newest, 88);
    assert_eq!(faults(&database.pool).await, [""; 0]);
    let all = term.last(88);
    let at = |name: &str| all.iter().position(|label| label == name).unwrap();
    assert!(at("s4.") < at("end of 1.") && at("end of 1.") < at("end of 0.") && at("end of 0.") < at("last."));
}

#[tokio::test]
async fn a_transaction_that_is_left_out_again_and_again_is_taken_once_at_its_end() {
    let database = database().await;
    let mut term = Term::begin(&database.url, 10).await.unwrap();
    let (mut large, mut small) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    large.run("BEGIN").await;
    for _ in 0..3 {
        large.emit("l").await;
        for _ in 0..9 {
            small.emit("s").await;
        }
    }
    large.run("COMMIT").await;
    for _ in 0..20 {
        // What is looked at in two ways at once must not count as a foreign lock.
        assert!(!term.step().await.unwrap().torn);
    }
    assert_eq!(term.newest, 30);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test]
async fn whoever_commits_first_on_a_row_comes_first_whatever_the_ids() {
    let database = database().await;
    run(
        &database.pool,
        "CREATE TABLE r (id int PRIMARY KEY, n text); SELECT tidewire.track('r'); INSERT INTO r VALUES (1, 'new')",
    )
    .await;
    let mut term = Term::begin(&database.url, 7).await.unwrap();
    let (mut one, mut two) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    term.drain().await;
    // Ids: one 2, two 3, one 4; on the row: two before one.
    one.run(&format!("BEGIN; {}", emit("one"))).await;
    two.run("UPDATE r SET n = 'by two'").await;
    let _ = term.step().await.unwrap();
    one.run("UPDATE r SET n = 'by one'; COMMIT").await;
    term.drain().await;
    assert_eq!(term.last(3), ["by two.", "one", "by one."]);

    // Ids: one 5 and 7, two 6 and 8; on the row: one before two, who waits for it.
    one.run("BEGIN; UPDATE r SET n = 'first'").await;
    two.run(&format!("BEGIN; {}", emit("two"))).await;
    one.emit("one").await;
    let waiting = tokio::spawn(async move {
        two.run("UPDATE r SET n = 'second'; COMMIT").await;
    });
    wait_for_a_blocked_writer(&database.pool).await;
    let _ = term.step().await.unwrap();
    one.run("COMMIT").await;
    waiting.await.unwrap();
    term.drain().await;
    assert_eq!(term.last(4), ["first", "one.", "two", "second."]);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

async fn wait_for_a_blocked_writer(pool: &sqlx::PgPool) {
    let sql = "SELECT EXISTS (SELECT FROM pg_stat_activity
               WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE 'UPDATE r%')";
    while !sqlx::query_scalar::<_, bool>(sql).fetch_one(pool).await.unwrap() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_is_rolled_back_to_a_savepoint_leaves_nothing_and_deferred_capture_comes_in_order() {
    let database = database().await;
    run(&database.pool, "CREATE TABLE d (id int PRIMARY KEY, n text); SELECT tidewire.track('d', deferred => true)")
        .await;
    let mut term = Term::begin(&database.url, 3).await.unwrap();
    let mut writer = Writer::connect(&database.url).await;
    writer.run(&format!("BEGIN; {}; SAVEPOINT s; {}", emit("kept"), emit("gone"))).await;
    let _ = term.step().await.unwrap();
    writer.run(&format!("ROLLBACK TO s; {}; RELEASE s", emit("kept too"))).await;
    writer.run("INSERT INTO d VALUES (1, 'd1'); UPDATE d SET n = 'd2'").await;
    let _ = term.step().await.unwrap();
    writer.emit("before the deferred ones").await;
    writer.run("COMMIT").await;
    writer.run(&format!("BEGIN; {}; ROLLBACK", emit("never"))).await;
    term.drain().await;
    assert_eq!(term.last(9), ["kept", "kept too", "before the deferred ones", "d1", "d2."]);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test]
async fn a_foreign_row_lock_loses_nothing_lets_nothing_overtake_and_all_flows_when_it_goes() {
    let database = database().await;
    let (mut writer, mut locker) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    for strength in ["KEY SHARE", "SHARE", "UPDATE"] {
        let mut term = Term::begin(&database.url, 100).await.unwrap();
        for name in ["a", "b"] {
            writer.emit(name).await;
        }
        writer.run(&format!("BEGIN; {}; {}; {}; COMMIT", emit("t1"), emit("t2"), emit("t3"))).await;
        writer.emit("z").await;
        locker.run(&format!("BEGIN; SELECT FROM tidewire.outbox WHERE after_data ->> 'n' = 't2' FOR {strength}")).await;
        let claimed = term.step().await.unwrap();
        assert!(claimed.torn, "{strength}");
        assert_eq!(term.last(9), ["a.", "b."], "{strength}: what precedes the torn transaction goes");
        for _ in 0..5 {
            let claimed = term.step().await.unwrap();
            assert!(claimed.torn && claimed.events.is_empty(), "{strength}: nothing overtakes");
        }
        writer.emit("later").await;
        assert!(term.step().await.unwrap().torn);
        locker.run("COMMIT").await;
        term.drain().await;
        assert_eq!(term.last(5), ["t1", "t2", "t3.", "z.", "later."], "{strength}");
        sqlx::Connection::close(term.connection).await.unwrap();
    }
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test]
async fn a_foreign_row_lock_inside_a_large_transaction_holds_up_its_next_part_only() {
    let database = database().await;
    let (mut writer, mut locker) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    let mut term = Term::begin(&database.url, 10).await.unwrap();
    writer.run(&rows("", 35)).await;
    locker.run("BEGIN; SELECT FROM tidewire.outbox WHERE after_data ->> 'n' = '15' FOR SHARE").await;
    writer.emit("z").await;
    while !term.step().await.unwrap().torn {}
    assert_eq!(term.newest, 10, "the first part");
    for _ in 0..3 {
        assert!(term.step().await.unwrap().torn);
    }
    locker.run("COMMIT").await;
    term.drain().await;
    assert_eq!(term.last(2), ["35.", "z."]);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test]
async fn the_next_term_first_finishes_the_transaction_that_the_log_leaves_open() {
    let database = database().await;
    let (mut large, mut small) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    large.run(&format!("BEGIN; {}", rows("", 34))).await;
    small.run(&format!("BEGIN; {}", emit("inside"))).await;
    large.emit("35").await;
    large.run("COMMIT").await;
    let mut term = Term::begin(&database.url, 10).await.unwrap();
    while term.newest < 20 {
        let _ = term.step().await.unwrap();
    }
    // Its end comes before that of the large one.
    small.run("COMMIT").await;
    drop(term);
    let mut term = Term::begin(&database.url, 7).await.unwrap();
    assert!(term.open.is_some());
    term.drain().await;
    assert_eq!(term.newest, 36);
    assert_eq!(term.last(2), ["35.", "inside."]);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test]
async fn restored_rows_with_old_xids_and_ids_below_one_come_at_once_or_with_the_next_sweep() {
    let database = database().await;
    let mut writer = Writer::connect(&database.url).await;
    let restored = |id: i64, xid: i64, name: &str| {
        format!(
            r#"INSERT INTO tidewire.outbox (xid, id, table_name, operation, after_data)
               VALUES ('{xid}', {id}, 'event:t', 'EVENT', '{{"n":"{name}"}}')"#
        )
    };
    writer.run(&restored(-3, 7, "c")).await;
    writer.run(&restored(0, 8, "d")).await;
    writer.run(&restored(-9, 9, "b")).await;
    writer.run(&restored(i64::MIN + 1, 3, "a")).await;
    let mut term = Term::begin(&database.url, 100).await.unwrap();
    term.drain().await;
    assert_eq!(term.last(9), ["a.", "b.", "c.", "d."]);

    // Beside a term: an old xid below the floor is late at worst, one from the future is not even that.
    writer.emit("new").await;
    term.drain().await;
    writer.run(&restored(-1, 5, "late")).await;
    writer.run(&restored(-2, 1 << 40, "future")).await;
    writer.run(&restored(1 << 40, 6, "ahead of the sequence")).await;
    writer.emit("newer").await;
    term.drain().await;
    term.sweep();
    term.drain().await;
    let mut names = term.last(5);
    names.sort();
    assert_eq!(names, ["ahead of the sequence.", "future.", "late.", "new.", "newer."]);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}

#[tokio::test]
async fn a_prepared_transaction_is_relayed_when_it_is_committed() {
    let database = database().await;
    run(&database.pool, "SELECT tidewire.set_wake('poll')").await;
    let mut writer = Writer::connect(&database.url).await;
    let mut term = Term::begin(&database.url, 10).await.unwrap();
    let name = &database.name;
    writer.run(&format!("BEGIN; {}; PREPARE TRANSACTION '{name}'", emit("prepared"))).await;
    writer.emit("other").await;
    assert_eq!(term.drain().await, 1);
    writer.run(&format!("COMMIT PREPARED '{name}'")).await;
    writer.emit("last").await;
    term.drain().await;
    assert_eq!(term.last(9), ["other.", "prepared.", "last."]);
}

#[tokio::test]
async fn a_sweep_at_any_moment_neither_reorders_nor_repeats() {
    let database = database().await;
    let (mut long, mut short) = (Writer::connect(&database.url).await, Writer::connect(&database.url).await);
    let mut term = Term::begin(&database.url, 4).await.unwrap();
    let mut want = Vec::new();
    for round in 0..20 {
        long.run(&format!("BEGIN; {}", emit(&format!("long {round}")))).await;
        for index in 0..5 {
            short.emit(&format!("{round}.{index}")).await;
            if index % 2 == round % 2 {
                let _ = term.step().await.unwrap();
            }
            if index == round % 5 {
                term.sweep();
            }
        }
        want.extend((0..5).map(|index| format!("{round}.{index}.")));
        let _ = term.step().await.unwrap();
        long.run(&format!("{}; COMMIT", emit(&format!("end {round}")))).await;
        want.extend([format!("long {round}"), format!("end {round}.")]);
    }
    term.drain().await;
    assert_eq!(term.last(want.len()), want);
    assert_eq!(faults(&database.pool).await, [""; 0]);
}
