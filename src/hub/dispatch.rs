//! From events to the frames of every group that may show any of them: once for each group, whoever listens.
//!
//! This runs where every client of the node waits, so it is bounded: in what one group may cost, in what all may cost
//! together, and in the memory of what is rendered. A group that is over a bound of its own is passed over, whole: its
//! readers look at these events themselves (see the head of [`super::group`]). Where all together are too much, it is none
//! of them that is dear: the call ends with the transaction, and the next one goes on from there. Only inside a transaction,
//! which is told whole or not at all, are groups passed over for the sum, and of them those that take more than their
//! listeners' share. What a group costs is estimated before it is asked, never measured (see
//! [`TablePlan::cost`](super::plan::TablePlan::cost)).

use std::collections::HashMap;
use std::sync::Arc;

use super::group::{Assembly, Ended, Frame, Group, Span};
use super::plan::Opened;
use super::ring::Whole;
use super::routes::Routes;
use crate::cursor::{Cursor, Epochs};
use crate::event::Operation;

/// What one group's conditions may cost for one event, bytes read: a tenth of a millisecond and less.
const EVENT_COST: usize = 128 << 10;
/// What one group's conditions may cost in one call, some 2,000 events or 8 MiB: 4,000 bytes read of each, a few
/// milliseconds.
const GROUP_COST: usize = 8 << 20;
/// All groups in one call, to which the transaction is finished in which it is reached: ten milliseconds or so.
const CALL_COST: usize = 32 << 20;
/// All groups in a call that cannot end yet. Beyond, those go on that are within their listeners' share of [`CALL_COST`].
const TRANSACTION_COST: usize = 2 * CALL_COST;

/// What one group gets of some consecutive events.
pub(super) struct Dispatched {
    pub(super) group: Arc<Group>,
    pub(super) outcome: Outcome,
    pub(super) ended: Option<Ended>,
}

/// What a call comes to.
pub(super) struct Call {
    pub(super) groups: Vec<Dispatched>,
    /// It reaches up to here.
    pub(super) end: Cursor,
}

/// Of the events up to its end, or up to the call's.
pub(super) enum Outcome {
    Frames(Vec<Frame>),
    PassedOver,
}

/// Renders `whole`, or its first transactions, for every group that may show any of it. `end` is the position after it;
/// `render_bytes` bounds the memory of all groups together.
pub(super) fn dispatch(
    routes: &Routes,
    whole: &Whole,
    epochs: &Epochs,
    end: Cursor,
    frame_bytes: usize,
    render_bytes: usize,
) -> Call {
    let mut slots: HashMap<*const Group, Slot<'_>> = HashMap::new();
    let (mut span, mut end) = (Span::new(epochs.clone()), end);
    let mut sum = Sum { cost: 0, rendered: 0, listeners: 0, frame_bytes, render_bytes };
    for event in &whole.events {
        let opened = Opened::new(event);
        routes.each(&opened, |group| {
            let slot = slots.entry(Arc::as_ptr(group)).or_insert_with(|| sum.slot(group));
            if slot.ended.is_some() {
                return;
            }
            if event.operation == Operation::Schema {
                group.plans.forget();
            }
            sum.add(slot, &opened, &span);
            if let Some((reason, message)) = group.plans.broken_by(event) {
                slot.ended = Some((Ended { seq: event.seq, reason, message }, span.after(event), !event.tx_end));
            }
        });
        span.pass(event);
        if event.tx_end && sum.is_enough() {
            end = span.after(event);
            break;
        }
    }
    let groups = slots.into_values().map(|slot| slot.finish(end, whole.open)).collect();
    Call { groups, end }
}

/// One group's share of a call.
struct Slot<'a> {
    group: &'a Arc<Group>,
    // None: passed over.
    assembly: Option<Assembly>,
    // All of it, and that of its conditions.
    cost: usize,
    conditions: usize,
    listeners: usize,
    // Where it ends, and whether inside a transaction.
    ended: Option<(Ended, Cursor, bool)>,
}

impl<'a> Slot<'a> {
    fn finish(self, end: Cursor, open: bool) -> Dispatched {
        let (ended, end, open) = match self.ended {
            Some((ended, end, open)) => (Some(ended), end, open),
            None => (None, end, open),
        };
        let outcome = match self.assembly {
            Some(assembly) => Outcome::Frames(assembly.finish(end, open)),
            None => Outcome::PassedOver,
        };
        Dispatched { group: Arc::clone(self.group), outcome, ended }
    }
}

/// What a call has cost so far, and its bounds.
struct Sum {
    cost: usize,
    // Bytes.
    rendered: usize,
    // Of all groups that were asked.
    listeners: usize,
    frame_bytes: usize,
    render_bytes: usize,
}

impl Sum {
    fn slot<'a>(&mut self, group: &'a Arc<Group>) -> Slot<'a> {
        let listeners = group.listeners();
        self.listeners += listeners;
        Slot { group, assembly: Some(Assembly::default()), cost: 0, conditions: 0, listeners, ended: None }
    }

    /// Whether the call is to end as soon as it can.
    fn is_enough(&self) -> bool {
        self.cost > CALL_COST || self.rendered > self.render_bytes / 4
    }

    /// A group's part of `all` by its listeners: who has many is worth being looked at once for all.
    fn share(&self, slot: &Slot<'_>, all: usize) -> usize {
        (all / self.listeners.max(1)).saturating_mul(slot.listeners)
    }

    fn add(&mut self, slot: &mut Slot<'_>, opened: &Opened<'_>, span: &Span) {
        if slot.assembly.is_none() {
            return;
        }
        let Some(plan) = slot.group.plans.of(&opened.event().table) else { return };
        let estimate = plan.cost(opened);
        let cost = estimate.sum();
        slot.cost = slot.cost.saturating_add(cost);
        // Rendering is dear only by its sum: what all are shown is better rendered once than by each of them.
        slot.conditions = slot.conditions.saturating_add(estimate.conditions);
        let dear = estimate.conditions > EVENT_COST || slot.conditions > GROUP_COST;
        if dear || self.cost > TRANSACTION_COST && slot.cost > self.share(slot, CALL_COST) {
            self.pass_over(slot);
            return;
        }
        self.cost = self.cost.saturating_add(cost);
        let Some(assembly) = &mut slot.assembly else { return };
        let before = assembly.bytes();
        assembly.add(&plan, opened, span, self.frame_bytes);
        let after = assembly.bytes();
        self.rendered += after.saturating_sub(before);
        // Those within their share, together, come to the other half.
        let half = self.render_bytes / 2;
        if self.rendered > half && after > self.share(slot, half) {
            self.pass_over(slot);
        }
    }

    fn pass_over(&mut self, slot: &mut Slot<'_>) {
        let bytes = slot.assembly.take().map_or(0, |assembly| assembly.bytes());
        self.rendered = self.rendered.saturating_sub(bytes);
    }
}
