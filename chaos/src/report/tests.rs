use std::collections::BTreeMap;

use super::*;

fn fault(class: &str, silence: f64, alone: bool) -> FaultFigures {
    FaultFigures {
        class: class.into(),
        variant: "kill".into(),
        took: true,
        progressed: true,
        alone,
        figures: BTreeMap::from([("relay_silence_us".into(), silence)]),
        ..FaultFigures::default()
    }
}

fn report(faults: Vec<FaultFigures>, violations: Vec<Violation>) -> Report {
    let run = RunSummary {
        seed: 7,
        mutant: None,
        failpoints: false,
        violations,
        late: Vec::new(),
        vacuous: Vec::new(),
        counts: Counts::default(),
        figures: Figures { seconds: 120.0, deliveries: 1_234_567, faults, ..Figures::default() },
        node_bytes: (1, 2),
    };
    Report {
        title: "A run".into(),
        version: "0".into(),
        commit: None,
        began: "now".into(),
        seconds: 120.0,
        machine: Vec::new(),
        cannot: vec![("F22".into(), "there is no Kafka sink".into())],
        command: "chaos run --seed 7".into(),
        runs: vec![run],
        not_carried_out: Vec::new(),
    }
}

#[test]
fn figures_are_taken_only_from_faults_that_were_alone() {
    let report = report(vec![fault("F2", 2e5, true), fault("F2", 9e6, false)], Vec::new());
    let class = &report.classes()["F2"];
    assert_eq!((class.injected, class.counted, class.alone), (2, 2, 1));
    assert_eq!(class.figures["relay_silence_us"], [2e5]);
}

#[test]
fn a_missed_goal_stands_on_the_page_as_missed() {
    let page = markdown::page(&report(vec![fault("F2", 1.5e6, true)], Vec::new()), "x");
    assert!(page.contains("| kill to relaying again, most | 1.50 s | ≤ 1.00 s | **MISSED** |"), "{page}");
    let page = markdown::page(&report(vec![fault("F2", 2e5, true)], Vec::new()), "x");
    assert!(page.contains("| kill to relaying again, most | 200.0 ms | ≤ 1.00 s | reached |"), "{page}");
}

#[test]
fn the_page_says_what_was_skipped_and_what_was_checked() {
    let page = markdown::page(&report(Vec::new(), Vec::new()), "x");
    assert!(page.contains("| F22 | SKIPPED | | | there is no Kafka sink |"), "{page}");
    assert!(page.contains("1,234,567 deliveries checked, 0 safety violations"), "{page}");
}

#[test]
fn a_broken_promise_is_the_first_thing_on_the_page() {
    let violation = Violation { rule: "unique", at: 1_500_000, text: "subscription 3 saw seq 9 twice".into() };
    let page = markdown::page(&report(Vec::new(), vec![violation]), "x");
    assert!(page.lines().nth(2).is_some_and(|line| line.starts_with("**PROMISES WERE BROKEN:**")), "{page}");
    assert!(page.contains("seed 7, 1.500 s, **unique**: subscription 3 saw seq 9 twice"), "{page}");
}

#[test]
fn quantiles_never_flatter() {
    let values: Vec<f64> = (1..=10).map(f64::from).collect();
    assert_eq!(quantile(&values, 0.99), Some(10.0));
    assert_eq!(quantile(&values, 0.5), Some(6.0));
    assert_eq!(quantile(&[], 0.5), None);
}
