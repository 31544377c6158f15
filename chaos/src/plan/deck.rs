//! The deck: every class of fault with its variants, what it takes, and how long; and the dealing of it.
//!
//! Dealing goes on over the rounds of a campaign without regard to their seeds, so that consecutive runs get every class
//! equally often; what does not fit into a round's time comes first in the next.

use std::collections::{BTreeMap, VecDeque};

use super::PlanOptions;

/// Rounds after which the dealing repeats: bounds the work of reaching a round.
pub(super) const PERIOD: u64 = 1_000;
/// Between a slot's recovery and the next slot, milliseconds.
pub(super) const GAP_MS: u64 = 500;
/// Faults of one group.
pub(super) const GROUP_MAX: usize = 4;
/// Members of a group begin within this time, milliseconds.
pub(super) const STAGGER_MS: u64 = 4_000;

/// What a fault takes from the others while it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Takes(u16);

impl Takes {
    /// Nothing that others need.
    pub(super) const NOTHING: Self = Self(0);
    /// One node: at least one must be left.
    pub(super) const NODE: Self = Self(1);
    /// The primary goes away.
    pub(super) const POSTGRES: Self = Self(1 << 1);
    /// Sessions of the harness on the primary, which must not go away.
    pub(super) const SESSION: Self = Self(1 << 2);
    /// The way of all clients.
    pub(super) const CLIENTS: Self = Self(1 << 3);
    /// The one packet filter.
    pub(super) const FILTER: Self = Self(1 << 4);
    /// Everything.
    pub(super) const ALL: Self = Self(1 << 5);

    pub(super) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(super) const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether both may be under way at once, nodes apart.
    pub(super) const fn agrees(self, other: Self) -> bool {
        let both = Self(self.0 & other.0);
        let either = self.and(other);
        let alone = either.has(Self::ALL) || both.has(Self::POSTGRES.and(Self::CLIENTS).and(Self::FILTER));
        !(alone || either.has(Self::POSTGRES) && either.has(Self::SESSION))
    }
}

/// One variant of a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Variant {
    pub(super) name: &'static str,
    /// Shortest and longest hold, milliseconds.
    pub(super) hold_ms: (u64, u64),
    /// Dealt in small plans.
    pub(super) small: bool,
}

/// One class.
#[derive(Debug)]
pub(super) struct Class {
    pub(super) name: &'static str,
    pub(super) takes: Takes,
    /// From the heal until everybody has caught up, as planned for, milliseconds.
    pub(super) recovery_ms: u64,
    /// Cards of it in a deck.
    pub(super) weight: u8,
    pub(super) variants: &'static [Variant],
    /// Followed by F12 in the same slot.
    pub(super) leaves_old_primary: bool,
}

const fn small(name: &'static str, low: u64, high: u64) -> Variant {
    Variant { name, hold_ms: (low, high), small: true }
}

const fn full(name: &'static str, low: u64, high: u64) -> Variant {
    Variant { name, hold_ms: (low, high), small: false }
}

const fn class(name: &'static str, takes: Takes, recovery_ms: u64, weight: u8, variants: &'static [Variant]) -> Class {
    Class { name, takes, recovery_ms, weight, variants, leaves_old_primary: false }
}

const fn failover(name: &'static str, recovery_ms: u64, variants: &'static [Variant]) -> Class {
    Class { name, takes: Takes::ALL, recovery_ms, weight: 1, variants, leaves_old_primary: true }
}

/// The old primary's return after a failover, milliseconds: start, look, rebuild as a standby.
pub(super) const OLD_PRIMARY_MS: (u64, u64) = (2_000, 8_000);

/// Classes that no machine and no release can do yet: (class, variant, why).
pub(super) const IMPOSSIBLE: [(&str, &str); 2] = [("F22", "kafka"), ("F20", "mixed versions")];

/// What can be dealt. Variants take turns, so one that stands twice comes twice as often.
pub(super) const DECK: &[Class] = &[
    class("F1", Takes::NODE, 5_000, 1, &[small("kill", 1_000, 3_000)]),
    class("F2", Takes::NODE, 5_000, 2, &[small("kill", 500, 2_500)]),
    class(
        "F3",
        Takes::NODE,
        5_000,
        1,
        &[
            small("5s", 5_000, 5_000),
            small("1s", 1_000, 1_000),
            full("5s", 5_000, 5_000),
            full("60s", 60_000, 60_000),
            full("5s", 5_000, 5_000),
            full("1s", 1_000, 1_000),
            full("5s", 5_000, 5_000),
            full("1s", 1_000, 1_000),
            full("5s", 5_000, 5_000),
            full("5s", 5_000, 5_000),
        ],
    ),
    class("F4", Takes::NODE, 5_000, 1, &[full("stop", 6_000, 9_000), full("stop", 6_000, 15_000)]),
    class(
        "F5",
        Takes::NODE,
        5_000,
        1,
        &[
            small("leader blackhole", 5_000, 8_000),
            small("follower reset", 6_000, 9_000),
            small("leader reset", 4_000, 8_000),
            small("follower blackhole", 7_000, 10_000),
        ],
    ),
    class(
        "F6",
        Takes::NODE,
        5_000,
        1,
        &[
            full("leader to Postgres", 5_000, 8_000),
            full("follower from Postgres", 7_000, 10_000),
            full("leader from Postgres", 5_000, 8_000),
            full("follower to Postgres", 7_000, 10_000),
        ],
    ),
    class(
        "F7",
        Takes::NODE.and(Takes::CLIENTS),
        5_000,
        1,
        &[
            full("balancer reset", 5_000, 8_000),
            full("client reset", 1_000, 4_000),
            full("balancer blackhole", 6_000, 10_000),
            full("client stall", 22_000, 26_000),
            full("client blackhole", 6_000, 10_000),
        ],
    ),
    class(
        "F8",
        Takes::NODE.and(Takes::FILTER),
        7_000,
        1,
        &[
            full("database latency", 6_000, 10_000),
            full("front loss 5%", 6_000, 10_000),
            full("database 1 Mbit/s", 5_000, 8_000),
            full("database loss 1%", 6_000, 10_000),
            full("front latency", 6_000, 10_000),
            full("database loss 20%", 6_000, 10_000),
            full("front 1 Mbit/s", 5_000, 8_000),
            full("database loss 5%", 6_000, 10_000),
            full("front loss 20%", 6_000, 10_000),
            full("front loss 1%", 6_000, 10_000),
        ],
    ),
    class(
        "F9",
        Takes::POSTGRES,
        8_000,
        1,
        &[
            small("immediate", 1_000, 3_000),
            small("immediate", 1_000, 5_000),
            full("immediate", 2_000, 10_000),
            full("immediate", 1_000, 3_000),
            full("immediate", 1_000, 5_000),
            full("immediate", 1_000, 3_000),
            full("immediate", 30_000, 30_000),
        ],
    ),
    failover("F10", 6_000, &[full("synchronous", 500, 1_500)]),
    failover("F11", 6_000, &[full("lossy", 1_500, 3_000)]),
    class(
        "F13",
        Takes::SESSION,
        5_000,
        1,
        &[small("leader", 1_000, 2_000), small("random", 1_000, 2_000), small("listener", 1_000, 2_000)],
    ),
    class(
        "F14",
        Takes::SESSION,
        5_000,
        1,
        &[full("pool", 4_000, 8_000), full("lock", 3_000, 6_000), full("slow", 4_000, 8_000)],
    ),
    class("F15", Takes::ALL, 10_000, 1, &[full("tablespace", 4_000, 7_000), full("wal", 4_000, 6_000)]),
    class(
        "F16",
        Takes::SESSION,
        5_000,
        1,
        &[
            full("idle", 15_000, 20_000),
            full("big 5000", 2_000, 4_000),
            full("snapshot", 10_000, 15_000),
            full("rollbacks", 3_000, 5_000),
            full("big 20000", 2_000, 4_000),
            full("idle", 60_000, 60_000),
            full("big 100000", 4_000, 6_000),
            full("idle 10min", 600_000, 600_000),
        ],
    ),
    class("F17", Takes::NODE, 5_000, 1, &[full("silent", 5_000, 8_000), full("duplicated", 3_000, 5_000)]),
    class("F18", Takes::NOTHING, 4_000, 1, &[small("stall", 10_000, 12_000), small("drip", 10_000, 12_000)]),
    class(
        "F19",
        Takes::CLIENTS,
        7_000,
        1,
        &[small("one", 1_000, 2_000), full("all", 1_000, 2_000), full("clients", 1_000, 2_000)],
    ),
    class("F20", Takes::ALL, 6_000, 1, &[full("rolling", 22_000, 22_000)]),
    class(
        "F21",
        Takes::NODE,
        8_000,
        1,
        &[
            full("leader +1h", 12_000, 14_000),
            full("follower -1h", 12_000, 14_000),
            full("leader -1h", 12_000, 14_000),
            full("follower +1h", 12_000, 14_000),
        ],
    ),
    class(
        "F23",
        Takes::NOTHING,
        3_000,
        1,
        &[
            full("revoke", 2_000, 4_000),
            full("untrack", 1_000, 2_000),
            full("rotate", 2_000, 4_000),
            full("gap", 1_000, 2_000),
        ],
    ),
    class("F24", Takes::NOTHING, 3_000, 1, &[full("hostile", 5_000, 8_000)]),
    class(
        "F26",
        Takes::SESSION,
        5_000,
        1,
        &[full("queue", 8_000, 15_000), full("forged", 3_000, 5_000), full("replayed", 3_000, 5_000)],
    ),
    class("F27", Takes::NODE, 8_000, 1, &[full("address space", 16_000, 18_000)]),
    class(
        "F28",
        Takes::NOTHING,
        4_000,
        1,
        &[full("dear", 12_000, 14_000), full("unread", 10_000, 12_000), full("syncs", 8_000, 12_000)],
    ),
    class(
        "FP",
        Takes::NODE,
        5_000,
        3,
        &[full("kill", 2_000, 4_000), full("error", 2_000, 4_000), full("sleep", 2_000, 4_000)],
    ),
];

/// Every class that a campaign reports, in order; F12, F22 and F25 are made apart from the dealing.
pub const CLASSES: [&str; 29] = [
    "F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9", "F10", "F11", "F12", "F13", "F14", "F15", "F16", "F17",
    "F18", "F19", "F20", "F21", "F22", "F23", "F24", "F25", "F26", "F27", "F28", "FP",
];

/// A card that was dealt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Card {
    pub(super) class: &'static Class,
    pub(super) variant: Variant,
    /// How many of its class were dealt before.
    pub(super) nth: u64,
}

impl Card {
    /// From its beginning until it has recovered, at most, milliseconds.
    pub(super) const fn cost_ms(&self) -> u64 {
        let old = if self.class.leaves_old_primary { OLD_PRIMARY_MS.0 + OLD_PRIMARY_MS.1 } else { 0 };
        self.variant.hold_ms.1 + self.class.recovery_ms + old
    }
}

/// A slot of a round: one card alone, or a group.
#[derive(Clone, Debug)]
pub(super) struct Hand {
    pub(super) cards: Vec<Card>,
}

impl Hand {
    pub(super) fn cost_ms(&self) -> u64 {
        let longest = self.cards.iter().map(Card::cost_ms).max().unwrap_or_default();
        longest + GAP_MS + if self.cards.len() > 1 { STAGGER_MS } else { 0 }
    }
}

/// The hands of a round.
pub(super) fn deal(options: &PlanOptions, budget_ms: u64) -> Vec<Hand> {
    let mut dealer = Dealer::new(options, budget_ms);
    let mut hands = Vec::new();
    for _ in 0..=options.round % PERIOD {
        hands = dealer.round();
    }
    hands
}

/// Deals round after round.
struct Dealer<'a> {
    options: &'a PlanOptions,
    budget_ms: u64,
    cards: Vec<&'static Class>,
    waiting: VecDeque<Card>,
    dealt: BTreeMap<&'static str, u64>,
    decks: u64,
}

impl<'a> Dealer<'a> {
    fn new(options: &'a PlanOptions, budget_ms: u64) -> Self {
        let cards = DECK.iter().filter(|class| wanted(class, options)).collect();
        Self { options, budget_ms, cards, waiting: VecDeque::new(), dealt: BTreeMap::new(), decks: 0 }
    }

    fn round(&mut self) -> Vec<Hand> {
        let mut left = self.budget_ms;
        let mut hands = Vec::new();
        while !self.cards.is_empty() {
            if self.waiting.len() < self.cards.len() {
                self.shuffle_one_in();
            }
            let Some(hand) = self.next_hand(left) else { break };
            left -= hand.cost_ms();
            hands.push(hand);
        }
        hands
    }

    /// One more deck behind what waits. The order differs from deck to deck, so that not the same neighbours meet.
    fn shuffle_one_in(&mut self) {
        use rand::SeedableRng;
        use rand::seq::SliceRandom;
        let mut order: Vec<&'static Class> = Vec::new();
        for class in &self.cards {
            order.extend(std::iter::repeat_n(*class, usize::from(class.weight)));
        }
        order.shuffle(&mut rand::rngs::Xoshiro256PlusPlus::seed_from_u64(self.decks));
        self.decks += 1;
        for class in order {
            let dealt = self.dealt.entry(class.name).or_default();
            let nth = *dealt;
            *dealt += 1;
            if let Some(variant) = self.variant(class, nth) {
                self.waiting.push_back(Card { class, variant, nth });
            }
        }
    }

    /// The variants take turns, those left out that would eat up the round.
    fn variant(&self, class: &Class, nth: u64) -> Option<Variant> {
        let fits = |variant: &&Variant| {
            let cost = variant.hold_ms.1 + class.recovery_ms + GAP_MS + STAGGER_MS;
            let old = if class.leaves_old_primary { OLD_PRIMARY_MS.0 + OLD_PRIMARY_MS.1 } else { 0 };
            (!self.options.small || variant.small) && cost + old <= self.budget_ms
        };
        let possible: Vec<_> = class.variants.iter().filter(fits).collect();
        let turn = usize::try_from(nth).ok()?.checked_rem(possible.len())?;
        possible.get(turn).map(|variant| **variant)
    }

    /// The first waiting card that fits into the time left, alone or with those that go with it.
    fn next_hand(&mut self, left_ms: u64) -> Option<Hand> {
        let at = self.waiting.iter().position(|card| card.cost_ms() + GAP_MS <= left_ms)?;
        let first = self.waiting.remove(at)?;
        let mut hand = Hand { cards: vec![first] };
        if self.stands_alone(&first) {
            return Some(hand);
        }
        // Two to four, and the sizes take turns.
        let turn = usize::try_from(first.nth).unwrap_or_default();
        let size = if long(&first) { GROUP_MAX } else { 2 + turn % (GROUP_MAX - 1) };
        let mut at = 0;
        while hand.cards.len() < size {
            let Some(card) = self.waiting.get(at).copied() else { break };
            let joined = joined(&hand, card);
            if !self.stands_alone(&card) && self.agrees(&hand, &card) && joined.cost_ms() <= left_ms {
                hand = joined;
                self.waiting.remove(at);
            } else {
                at += 1;
            }
        }
        Some(hand)
    }

    /// Two in five or so: every third of those that can be grouped, and all that cannot.
    fn stands_alone(&self, card: &Card) -> bool {
        let groups = self.options.only.as_ref().is_none_or(|only| only.contains(super::GROUP));
        let groups_only = self.options.only.as_ref().is_some_and(|only| only.len() == 1 && groups);
        !groups || card.class.takes.has(Takes::ALL) || (!groups_only && !long(card) && card.nth.is_multiple_of(3))
    }

    fn agrees(&self, hand: &Hand, card: &Card) -> bool {
        let nodes = hand.cards.iter().filter(|other| other.class.takes.has(Takes::NODE)).count();
        let spare = nodes + 1 < usize::from(self.options.nodes);
        (spare || !card.class.takes.has(Takes::NODE))
            && hand
                .cards
                .iter()
                .all(|other| other.class.name != card.class.name && other.class.takes.agrees(card.class.takes))
    }
}

/// So long that other faults had better happen meanwhile.
const fn long(card: &Card) -> bool {
    card.variant.hold_ms.0 >= 30_000
}

fn joined(hand: &Hand, card: Card) -> Hand {
    let mut cards = hand.cards.clone();
    cards.push(card);
    Hand { cards }
}

/// Whether the options let a class in: F12 stands for the failovers that it follows.
fn wanted(class: &Class, options: &PlanOptions) -> bool {
    let named = options.only.as_ref().is_none_or(|only| {
        only.contains(class.name)
            || (only.len() == 1 && only.contains(super::GROUP) && !class.takes.has(Takes::ALL))
            || (only.contains("F12") && !only.contains("F10") && !only.contains("F11") && class.name == "F10")
    });
    named
        && (options.failpoints || class.name != "FP")
        && (!options.small || class.variants.iter().any(|variant| variant.small))
        && (options.nodes > 1 || !class.takes.has(Takes::NODE))
}
