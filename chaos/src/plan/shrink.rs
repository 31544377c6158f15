//! Smaller plans to try when one has failed: halves first, then without single faults.

use super::{GROUP, Plan, PlannedFault};

/// Plans with fewer faults, most promising first: each half by time, each quarter, then each plan with one fault left
/// out. None of them is empty or as long as `plan`. Whoever shrinks takes the first that still fails, and asks again.
pub fn smaller(plan: &Plan) -> impl Iterator<Item = Plan> + '_ {
    let count = plan.faults.len();
    let parts = [2, 4].into_iter().flat_map(move |parts| parts_of(count, parts));
    let without = (0..count).map(move |at| (0..count).filter(|other| *other != at).collect());
    let mut seen = std::collections::BTreeSet::new();
    parts
        .chain(without)
        .map(|kept: Vec<usize>| tidied(&plan.faults, &kept))
        .filter(move |faults| {
            let numbers: Vec<u32> = faults.iter().map(|fault| fault.f).collect();
            !faults.is_empty() && faults.len() < count && seen.insert(numbers)
        })
        .map(|faults| Plan { faults, ..plan.clone() })
}

/// The `parts` pieces of `0..count`, and with more than two also what is left without each.
fn parts_of(count: usize, parts: usize) -> Vec<Vec<usize>> {
    let edge = |part: usize| count * part / parts;
    let piece = |part: usize| edge(part)..edge(part + 1);
    let pieces = (0..parts).map(|part| piece(part).collect());
    let rests = (0..parts).map(|part| (0..count).filter(|at| !piece(part).contains(at)).collect());
    if parts > 2 { pieces.chain(rests).collect() } else { pieces.collect() }
}

/// A group's entry without a group goes too; so does the return of an old primary that never left.
fn tidied(faults: &[PlannedFault], kept: &[usize]) -> Vec<PlannedFault> {
    let kept: Vec<&PlannedFault> = kept.iter().filter_map(|at| faults.get(*at)).collect();
    let others = |fault: &PlannedFault| kept.iter().filter(|other| other.slot == fault.slot).count() - 1;
    let stands = |fault: &PlannedFault| match fault.class.as_str() {
        GROUP => others(fault) >= 2,
        "F12" => others(fault) >= 1,
        _ => true,
    };
    kept.iter().filter(|fault| stands(fault)).map(|fault| (*fault).clone()).collect()
}
