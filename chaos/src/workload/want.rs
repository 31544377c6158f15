//! Who listens to what: drawn from the seed, mostly a small share of everything, a few to all of it.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::WorkloadPlan;
use super::schema::{EVENTS, TABLES, WEIGHTS};
use crate::history::Want;

/// Of these many clients, one listens to everything.
const EVERYTHING_EVERY: u32 = 80;
/// Of these many clients, one has several subscriptions on its connection.
const SEVERAL_EVERY: u32 = 10;
/// Filters are drawn from so many: what each lets through is asked of Postgres at the end, one by one.
const DISTINCT: u32 = 48;

/// How a client behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Habit {
    /// Stays for the whole run.
    Stays,
    /// Its process ends now and then and another one goes on from the cursor that it saved.
    Restarts,
    /// Like `Restarts`, but the saved cursor is older than what it has handled.
    RestartsFromOlder,
    /// Its process ends now and then and another one begins with now.
    Forgets,
}

/// One client process.
#[derive(Clone, Debug)]
pub(super) struct ClientPlan {
    pub(super) client: u32,
    pub(super) seed: u64,
    pub(super) wants: Vec<Want>,
    pub(super) habit: Habit,
}

pub(super) fn clients(plan: &WorkloadPlan) -> Vec<ClientPlan> {
    let mut rng = StdRng::seed_from_u64(plan.seed ^ 0x0077_616e_7473);
    let wants: Vec<Want> = (0..DISTINCT).map(|n| selective(n, plan.keys, &mut rng)).collect();
    (0..plan.clients)
        .map(|client| {
            let several = if client % SEVERAL_EVERY == 3 { 3 } else { 1 };
            let wants = if client % EVERYTHING_EVERY == 0 {
                vec![everything(client / EVERYTHING_EVERY)]
            } else {
                (0..several).map(|_| wants[rng.random_range(0..wants.len())].clone()).collect()
            };
            let habit = match rng.random_range(0..100) {
                0..10 => Habit::Restarts,
                10..16 => Habit::RestartsFromOlder,
                16..20 => Habit::Forgets,
                _ => Habit::Stays,
            };
            ClientPlan { client, seed: rng.random(), wants, habit }
        })
        .collect()
}

/// Everything, said in different ways.
fn everything(n: u32) -> Want {
    let tables = match n % 3 {
        0 => vec!["*".into(), "event:*".into()],
        1 => TABLES.iter().map(ToString::to_string).chain([EVENTS.into()]).collect(),
        _ => vec!["public.*".into(), EVENTS.into()],
    };
    Want { tables, filter: None, ops: None }
}

/// One to three hundredths of everything.
fn selective(n: u32, keys: u32, rng: &mut StdRng) -> Want {
    let table = TABLES[rng.random_range(0..TABLES.len())].to_owned();
    let all: Vec<String> = TABLES.iter().map(ToString::to_string).collect();
    let weight = rng.random_range(0..WEIGHTS - 4);
    let per_table = keys / TABLES.len() as u32;
    let from = rng.random_range(0..per_table.max(20) - 19);
    let (tables, filter, ops) = match n % 12 {
        0 => (all, format!("w = {weight}"), None),
        1 => (vec![table], format!("id >= {from} AND id < {}", from + 20), None),
        2 => (vec![table], format!("w BETWEEN {weight} AND {}", weight + 1), None),
        3 => (all, format!("w IN ({weight}, {})", weight + 3), Some(vec!["UPDATE"])),
        4 => (vec![table], format!("val LIKE '{}-%'", rng.random_range(0..16)), Some(vec!["INSERT", "UPDATE"])),
        5 => (all, format!("NOT (w <> {weight} OR prev IS NULL)"), None),
        6 => (vec![table], format!("w < 3 AND prev IS NOT NULL OR id = {from}"), None),
        7 => (vec![EVENTS.to_owned()], format!("payload->>'w' = '{weight}' OR aggregate_id = '{from}'"), None),
        8 => (vec![table], "prev IS NULL".into(), Some(vec!["INSERT"])),
        9 => (all, format!("w = {weight} AND val IS DISTINCT FROM prev"), Some(vec!["UPDATE", "DELETE"])),
        10 => (vec![table], String::new(), Some(vec!["DELETE"])),
        _ => (all, format!("id BETWEEN {from} AND {} AND w < 50", from + 9), None),
    };
    Want {
        tables,
        filter: (!filter.is_empty()).then_some(filter),
        ops: ops.map(|ops| ops.into_iter().map(str::to_owned).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_the_same_clients_and_another_gives_others() {
        let plan = WorkloadPlan { seed: 7, writers: 1, transactions_per_second: 1, keys: 1_200, clients: 240 };
        let text = |plan: &WorkloadPlan| format!("{:?}", clients(plan));
        assert_eq!(text(&plan), text(&plan));
        assert_ne!(text(&plan), text(&WorkloadPlan { seed: 8, ..plan.clone() }));
        let wants: usize = clients(&plan).iter().map(|client| client.wants.len()).sum();
        assert!(wants > 240, "{wants}");
    }
}
