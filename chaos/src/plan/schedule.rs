//! From a round's hands to faults with times, holds and seeds.

use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;
use rand::{Rng, RngExt, SeedableRng};

use super::deck::{self, Card, Hand, OLD_PRIMARY_MS, STAGGER_MS};
use super::{GROUP, PlanOptions, PlannedFault, millis};

/// Writers and clients come up before the first fault, milliseconds.
pub(super) const WARM_UP_MS: u64 = 4_000;
/// Nothing happens at the end, milliseconds: what a fault left behind must show, and progress be seen.
pub(super) const CALM_END_MS: u64 = 15_000;

/// The faults of a seed.
pub(super) fn lay_out(seed: u64, options: &PlanOptions) -> Vec<PlannedFault> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let budget = millis(options.duration).saturating_sub(WARM_UP_MS + CALM_END_MS);
    let mut hands = deck::deal(options, budget);
    hands.shuffle(&mut random);
    let spent: u64 = hands.iter().map(Hand::cost_ms).sum();
    // What is left over becomes calm between the slots.
    let pause = budget.saturating_sub(spent) / (hands.len() as u64 + 1);
    let mut sheet = Sheet { faults: Vec::new(), slot: 0, random };
    if options.only.is_none() && !options.small {
        for (class, variant) in deck::IMPOSSIBLE {
            sheet.add(0, class, variant, 0, true);
        }
        sheet.slot += 1;
    }
    let mut at = WARM_UP_MS;
    for hand in &hands {
        sheet.write(at, hand);
        at += hand.cost_ms() + pause;
    }
    sheet.faults
}

struct Sheet {
    faults: Vec<PlannedFault>,
    slot: u32,
    random: Xoshiro256PlusPlus,
}

impl Sheet {
    fn write(&mut self, at: u64, hand: &Hand) {
        match hand.cards.as_slice() {
            [card] => self.write_one(at, card),
            cards => self.write_group(at, cards),
        }
        self.slot += 1;
    }

    fn write_one(&mut self, at: u64, card: &Card) {
        let hold = self.hold(card.variant.hold_ms);
        self.add(at, card.class.name, card.variant.name, hold, true);
        if card.class.leaves_old_primary {
            let after = at + hold + card.class.recovery_ms;
            let hold = OLD_PRIMARY_MS.0;
            self.add(after, "F12", "read-write", hold, true);
        }
    }

    fn write_group(&mut self, at: u64, cards: &[Card]) {
        let mut members: Vec<(u64, &Card, u64)> = cards
            .iter()
            .map(|card| (self.random.random_range(0..STAGGER_MS), card, self.hold(card.variant.hold_ms)))
            .collect();
        members.sort_by_key(|(begin, ..)| *begin);
        // The first begins with the group: a group that waits for its own beginning only costs time.
        let early = members.first().map_or(0, |(begin, ..)| *begin);
        let name: Vec<_> = members.iter().map(|(_, card, _)| card.class.name).collect();
        let length = members.iter().map(|(begin, _, hold)| begin - early + hold).max().unwrap_or_default();
        self.add(at, GROUP, &name.join("+"), length, false);
        for (begin, card, hold) in members {
            self.add(at + begin - early, card.class.name, card.variant.name, hold, false);
        }
    }

    fn hold(&mut self, (low, high): (u64, u64)) -> u64 {
        self.random.random_range(low..=high)
    }

    fn add(&mut self, at_ms: u64, class: &str, variant: &str, hold_ms: u64, alone: bool) {
        self.faults.push(PlannedFault {
            f: u32::try_from(self.faults.len()).unwrap_or(u32::MAX),
            at_ms,
            class: class.to_owned(),
            variant: variant.to_owned(),
            hold_ms,
            seed: self.random.next_u64(),
            alone,
            slot: self.slot,
        });
    }
}
