//! Random histories: right ones pass, and each with one thing wrong fails.

use proptest::prelude::*;

use super::*;

/// Transactions as (rows, rolled back), and in how many events a batch comes.
fn history(transactions: &[(usize, bool)]) -> History {
    let mut history = History::new();
    let mut key = 0;
    let mut batches: Vec<Vec<u64>> = Vec::new();
    let mut seq = 0;
    for (n, (rows, rolled_back)) in transactions.iter().enumerate() {
        let n = n as u64 + 1;
        let ops: Vec<Write> = (0..*rows)
            .map(|i| {
                key += 1;
                insert(key, &format!("{n}-{i}"))
            })
            .collect();
        if *rolled_back {
            history.rolled_back(n, &ops);
        } else {
            history.transaction(n, &ops);
            batches.push((seq + 1..=seq + ops.len() as u64).collect());
            seq += ops.len() as u64;
        }
    }
    history.subscribe(1, None, at(1, 0));
    for batch in &batches {
        history.deliver(1, batch);
    }
    history.stop(1, at(1, seq));
    history.matched(&[(1, seq)]);
    history
}

/// Something that must not happen to a delivery or to a row of the log.
#[derive(Clone, Copy, Debug)]
enum Damage {
    DropDelivery,
    RepeatDelivery,
    AlterDelivery,
    DropRow,
    AlterRow,
    SwapRows,
}

fn damage(history: &mut History, damage: Damage, index: usize) {
    let deliveries = history.lines.iter().filter(|record| matches!(record, Record::Deliver { .. })).count();
    let mut batches = history.lines.iter_mut().filter_map(|record| match record {
        Record::Deliver { e, .. } => Some(e),
        _ => None,
    });
    let rows = history.log.len();
    match damage {
        Damage::DropDelivery => drop(batches.nth(index % deliveries).unwrap().remove(0)),
        Damage::RepeatDelivery => {
            let batch = batches.nth(index % deliveries).unwrap();
            let first = batch[0].clone();
            batch.insert(0, first);
        }
        Damage::AlterDelivery => batches.nth(index % deliveries).unwrap()[0].1 ^= 1 << 40,
        Damage::DropRow => drop(history.log.remove(index % rows)),
        Damage::AlterRow => history.log[index % rows].val = Some("altered".into()),
        Damage::SwapRows => {
            let (a, b) = (index % rows, (index + 1) % rows);
            let (first, second) = (history.log[a].seq, history.log[b].seq);
            history.log.swap(a, b);
            history.log[a].seq = first;
            history.log[b].seq = second;
        }
    }
}

fn transactions() -> impl Strategy<Value = Vec<(usize, bool)>> {
    prop::collection::vec((1_usize..5, prop::bool::weighted(0.2)), 3..20)
        .prop_filter("something is committed", |all| all.iter().filter(|(_, rolled_back)| !rolled_back).count() > 1)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_right_history_passes(transactions in transactions()) {
        let verdict = history(&transactions).check();
        prop_assert!(verdict.violations.is_empty(), "{:#?}", verdict.violations);
    }

    #[test]
    fn one_thing_wrong_is_noticed(
        transactions in transactions(),
        what in prop::sample::select(vec![
            Damage::DropDelivery, Damage::RepeatDelivery, Damage::AlterDelivery, Damage::DropRow, Damage::AlterRow,
            Damage::SwapRows,
        ]),
        index in 0_usize..1_000,
    ) {
        let mut history = history(&transactions);
        damage(&mut history, what, index);
        let verdict = history.check();
        prop_assert!(!verdict.violations.is_empty(), "{what:?} was not noticed");
    }
}
