//! What plans promise.

use std::collections::BTreeMap;

use super::deck::DECK;
use super::schedule::{CALM_END_MS, WARM_UP_MS};
use super::*;

fn options(round: u64) -> PlanOptions {
    PlanOptions { round, failpoints: true, ..PlanOptions::default() }
}

fn class(fault: &PlannedFault) -> Option<&'static deck::Class> {
    DECK.iter().find(|class| class.name == fault.class)
}

fn real(plan: &Plan) -> impl Iterator<Item = &PlannedFault> {
    plan.faults.iter().filter(|fault| fault.hold_ms > 0)
}

fn only(classes: &[&str]) -> PlanOptions {
    PlanOptions { only: Some(classes.iter().map(|name| (*name).to_owned()).collect()), ..PlanOptions::default() }
}

#[test]
fn the_same_seed_gives_the_same_plan_and_another_seed_another() {
    for round in [0, 1, 24, 999] {
        let options = options(round);
        assert_eq!(Plan::from_seed(7, &options), Plan::from_seed(7, &options));
        assert_ne!(Plan::from_seed(7, &options).faults, Plan::from_seed(8, &options).faults);
    }
}

/// If this fails, seeds that people have noted mean something else: raise `VERSION`, then write the new number here.
#[test]
fn the_plan_of_a_seed_never_changes_within_a_version() {
    let mut text = String::new();
    for round in 0..8 {
        text += &serde_json::to_string(&Plan::from_seed(42 + round, &options(round))).unwrap();
    }
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    assert_eq!((VERSION, hash), (3, 16_253_573_939_013_237_923));
}

#[test]
fn a_plan_survives_its_text() {
    let plan = Plan::from_seed(3, &options(2));
    let text = serde_json::to_string_pretty(&plan).unwrap();
    assert_eq!(Plan::parse(&text, Path::new("plan.json")).unwrap(), plan);
}

#[test]
fn a_plan_of_another_version_is_refused_with_what_to_do() {
    let text = r#"{"version": 99, "seed": 5, "faults": "something new"}"#;
    let error = Plan::parse(text, Path::new("old.json")).unwrap_err().to_string();
    assert!(error.contains("version 99") && error.contains("--seed 5"), "{error}");
    let error = Plan::parse("{}", Path::new("old.json")).unwrap_err().to_string();
    assert!(error.contains("not a plan"), "{error}");
    let error = Plan::load(Path::new("/nowhere/plan.json")).unwrap_err().to_string();
    assert!(error.contains("/nowhere/plan.json"), "{error}");
}

#[test]
fn an_hour_of_runs_has_three_hundred_faults_and_eight_of_every_class() {
    let (mut count, mut classes) = (0, BTreeMap::<String, u32>::new());
    let rounds = 24;
    for round in 0..rounds {
        let plan = Plan::from_seed(1_000 + round, &options(round));
        let faults = real(&plan).count();
        assert!((6..=30).contains(&faults), "round {round}: {faults}");
        count += faults;
        for fault in real(&plan) {
            *classes.entry(fault.class.clone()).or_default() += 1;
        }
    }
    assert!(count >= 300, "{count} faults");
    for class in CLASSES.iter().filter(|class| **class != "F22") {
        assert!(classes.get(*class).is_some_and(|dealt| *dealt >= 8), "{class}: {classes:?}");
    }
}

#[test]
fn about_two_in_five_stand_alone() {
    let (mut alone, mut all) = (0, 0);
    for round in 0..25 {
        let plan = Plan::from_seed(round, &options(round));
        alone += real(&plan).filter(|fault| fault.alone).count();
        all += real(&plan).filter(|fault| fault.class != GROUP).count();
    }
    let percent = 100 * alone / all;
    assert!((33..=52).contains(&percent), "{percent} % of {all}");
}

#[test]
fn slots_follow_each_other_and_leave_a_calm_end() {
    for round in 0..200 {
        let options = PlanOptions { duration: Duration::from_secs(40 + round % 200), ..options(round) };
        let plan = Plan::from_seed(round, &options);
        let mut free_at = WARM_UP_MS;
        for slot in plan.slots().filter(|slot| slot[0].hold_ms > 0) {
            assert!(slot[0].at_ms >= free_at, "round {round}: {slot:?}");
            free_at = slot.iter().map(|fault| fault.at_ms + fault.hold_ms).max().unwrap();
        }
        assert!(free_at <= plan.duration_ms - CALM_END_MS, "round {round}: {free_at}");
        assert!(plan.faults.windows(2).all(|pair| pair[0].f < pair[1].f && pair[0].slot <= pair[1].slot));
    }
}

#[test]
fn a_fault_alone_has_its_slot_to_itself() {
    for round in 0..200 {
        let plan = Plan::from_seed(round, &options(round));
        for slot in plan.slots().filter(|slot| slot[0].hold_ms > 0) {
            match slot {
                [one] => assert!(one.alone),
                [failover, old] if failover.alone => {
                    assert!(["F10", "F11"].contains(&failover.class.as_str()) && old.class == "F12");
                    assert!(old.at_ms > failover.at_ms + failover.hold_ms);
                }
                [group, members @ ..] => {
                    assert_eq!(group.class, GROUP);
                    assert!((2..=4).contains(&members.len()) && members.iter().all(|member| !member.alone));
                    let names: Vec<_> = members.iter().map(|member| member.class.as_str()).collect();
                    assert_eq!(group.variant, names.join("+"));
                }
                [] => unreachable!("a slot has faults"),
            }
        }
    }
}

#[test]
fn what_overlaps_leaves_a_node_and_never_takes_postgres_twice() {
    use deck::Takes;
    for nodes in [1, 2, 3, 5] {
        for round in 0..200 {
            let plan = Plan::from_seed(round, &PlanOptions { nodes, ..options(round) });
            for slot in plan.slots() {
                let takes: Vec<_> = slot.iter().filter_map(class).map(|class| class.takes).collect();
                let count = |kind: Takes| takes.iter().filter(|takes| takes.has(kind)).count();
                assert!(count(Takes::NODE) < usize::from(nodes).max(1), "{slot:?}");
                assert!(count(Takes::POSTGRES) <= 1 && count(Takes::FILTER) <= 1 && count(Takes::CLIENTS) <= 1);
                assert!(count(Takes::POSTGRES) == 0 || count(Takes::SESSION) == 0, "{slot:?}");
                assert!(count(Takes::ALL) == 0 || takes.len() == 1, "{slot:?}");
            }
        }
    }
}

#[test]
fn only_the_named_classes_come_and_each_alone() {
    let plan = Plan::from_seed(1, &only(&["F2", "F3"]));
    assert!(plan.faults.len() >= 5);
    assert!(plan.faults.iter().all(|fault| fault.alone && ["F2", "F3"].contains(&fault.class.as_str())));
    assert!(Plan::from_seed(1, &only(&["F99"])).faults.is_empty());
}

#[test]
fn f12_alone_brings_the_failover_that_it_needs() {
    let plan = Plan::from_seed(1, &only(&["F12"]));
    assert!(plan.faults.iter().any(|fault| fault.class == "F12") && plan.faults.iter().any(|f| f.class == "F10"));
}

#[test]
fn groups_alone_are_made_of_everything_that_can_overlap() {
    let plan = Plan::from_seed(1, &only(&[GROUP]));
    assert!(plan.slots().filter(|slot| slot[0].class == GROUP).count() >= 3);
    assert!(plan.slots().all(|slot| slot.len() == 1 || slot[0].class == GROUP));
}

#[test]
fn a_small_plan_has_the_classes_of_ci_and_nothing_long() {
    let mut seen = BTreeSet::new();
    for round in 0..12 {
        let options = PlanOptions { small: true, duration: Duration::from_secs(90), ..options(round) };
        for fault in Plan::from_seed(round, &options).faults {
            assert!(fault.hold_ms <= 25_000, "{fault:?}");
            seen.insert(fault.class);
        }
    }
    let wanted = ["F1", "F13", "F18", "F19", "F2", "F25", "F3", "F5", "F9"];
    assert_eq!(seen.iter().map(String::as_str).collect::<Vec<_>>(), wanted);
}

#[test]
fn fail_points_are_dealt_only_where_the_server_has_them() {
    let dealt = |failpoints| {
        (0..10).any(|round| {
            let options = PlanOptions { failpoints, ..options(round) };
            Plan::from_seed(round, &options).faults.iter().any(|fault| fault.class == "FP")
        })
    };
    assert!(dealt(true) && !dealt(false));
}

#[test]
fn ten_minutes_idle_come_only_in_a_long_run() {
    let longest = |seconds| {
        (0..120)
            .map(|round| {
                let options = PlanOptions { duration: Duration::from_secs(seconds), ..options(round) };
                Plan::from_seed(round, &options).faults.iter().map(|fault| fault.hold_ms).max().unwrap_or_default()
            })
            .max()
            .unwrap()
    };
    assert!(longest(150) < 100_000);
    assert!(longest(1_200) >= 600_000);
}

#[test]
fn what_cannot_be_done_yet_stands_in_every_full_plan() {
    for round in 0..5 {
        let plan = Plan::from_seed(round, &options(round));
        assert!(plan.faults.iter().any(|fault| fault.class == "F22"));
        assert!(plan.faults.iter().any(|fault| fault.variant == "mixed versions"));
    }
}

#[test]
fn a_run_too_short_for_any_fault_has_none() {
    let options = PlanOptions { duration: Duration::from_secs(10), ..PlanOptions::default() };
    assert!(Plan::from_seed(1, &options).faults.iter().all(|fault| fault.hold_ms == 0));
}

/// Shrinks as `replay` does, with "fails" decided by `fails`.
fn shrunk(mut plan: Plan, fails: impl Fn(&Plan) -> bool) -> (Plan, u32) {
    let mut tries = 0;
    loop {
        let next = smaller(&plan).inspect(|_| tries += 1).find(&fails);
        let Some(next) = next else { return (plan, tries) };
        plan = next;
    }
}

#[test]
fn shrinking_finds_the_one_fault_that_matters() {
    let plan = Plan::from_seed(11, &options(3));
    for guilty in plan.faults.iter().filter(|fault| fault.class != GROUP && fault.class != "F12") {
        let (small, tries) = shrunk(plan.clone(), |plan| plan.faults.contains(guilty));
        assert_eq!(small.faults, std::slice::from_ref(guilty));
        assert!(tries < 100, "{tries}");
    }
}

#[test]
fn shrinking_keeps_two_faults_that_matter_together() {
    let plan = Plan::from_seed(11, &options(3));
    let (first, last) = (&plan.faults[2], &plan.faults[plan.faults.len() - 1]);
    let (small, _) = shrunk(plan.clone(), |plan| plan.faults.contains(first) && plan.faults.contains(last));
    assert!(small.faults.contains(first) && small.faults.contains(last) && small.faults.len() <= 4);
}

#[test]
fn smaller_plans_are_smaller_not_empty_and_differ_from_each_other() {
    let plan = Plan::from_seed(5, &options(5));
    let mut seen = Vec::new();
    for smaller in smaller(&plan) {
        assert!(!smaller.faults.is_empty() && smaller.faults.len() < plan.faults.len());
        assert!(smaller.faults.iter().all(|fault| plan.faults.contains(fault)));
        assert!(!seen.contains(&smaller.faults));
        seen.push(smaller.faults);
    }
    assert!(seen.len() >= plan.faults.len() / 2);
    let one = Plan { faults: plan.faults[2..3].to_vec(), ..plan.clone() };
    assert_eq!(smaller(&one).count(), 0);
}
