//! From events to the frames of every group that may show any of them: once for each group, whoever listens.
//!
//! This runs where every client of the node waits, so it is bounded: in what one group may cost, in what all may cost
//! together, and in the memory of what is rendered. A group over a bound is passed over, whole: its readers look at these
//! events themselves (see the head of [`super::group`]). What a group costs is estimated before it is asked, never measured
//! (see [`TablePlan::cost`](super::plan::TablePlan::cost)).

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
/// What one group may cost in one call, some 2,000 events or 8 MiB: 4,000 bytes read of each, a few milliseconds.
const GROUP_COST: usize = 8 << 20;
/// All groups in one call: ten milliseconds or so.
const CALL_COST: usize = 32 << 20;

/// What one group gets of some consecutive events.
pub(super) struct Dispatched {
    pub(super) group: Arc<Group>,
    pub(super) outcome: Outcome,
    pub(super) ended: Option<Ended>,
}

/// Of the events up to its end, or up to the call's.
pub(super) enum Outcome {
    Frames(Vec<Frame>),
    PassedOver,
}

/// Renders `whole` for every group that may show any of it. `render_bytes` bounds the memory of all of them together.
pub(super) fn dispatch(
    routes: &Routes,
    whole: &Whole,
    epochs: &Epochs,
    end: Cursor,
    frame_bytes: usize,
    render_bytes: usize,
) -> Vec<Dispatched> {
    let mut slots: HashMap<*const Group, Slot<'_>> = HashMap::new();
    let mut span = Span::new(epochs.clone());
    let mut call = Call { cost: 0, rendered: 0, frame_bytes, render_bytes };
    for event in &whole.events {
        let opened = Opened::new(event);
        routes.each(&opened, |group| {
            let slot = slots.entry(Arc::as_ptr(group)).or_insert_with(|| Slot::new(group));
            if slot.ended.is_some() {
                return;
            }
            if event.operation == Operation::Schema {
                group.plans.forget();
            }
            call.add(slot, &opened, &span);
            if let Some((reason, message)) = group.plans.broken_by(event) {
                slot.ended = Some((Ended { seq: event.seq, reason, message }, span.after(event), !event.tx_end));
            }
        });
        span.pass(event);
    }
    slots.into_values().map(|slot| slot.finish(end, whole.open)).collect()
}

/// One group's share of a call.
struct Slot<'a> {
    group: &'a Arc<Group>,
    // None: passed over.
    assembly: Option<Assembly>,
    cost: usize,
    // Where it ends, and whether inside a transaction.
    ended: Option<(Ended, Cursor, bool)>,
}

impl<'a> Slot<'a> {
    fn new(group: &'a Arc<Group>) -> Self {
        Self { group, assembly: Some(Assembly::default()), cost: 0, ended: None }
    }

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
struct Call {
    cost: usize,
    rendered: usize,
    frame_bytes: usize,
    render_bytes: usize,
}

impl Call {
    fn add(&mut self, slot: &mut Slot<'_>, opened: &Opened<'_>, span: &Span) {
        let Some(assembly) = &mut slot.assembly else { return };
        let Some(plan) = slot.group.plans.of(&opened.event().table) else { return };
        let estimate = plan.cost(opened);
        let cost = estimate.sum();
        (slot.cost, self.cost) = (slot.cost.saturating_add(cost), self.cost.saturating_add(cost));
        // Rendering is dear only by its sum: what all are shown is better rendered once than by each of them.
        let over = estimate.conditions > EVENT_COST || slot.cost > GROUP_COST || self.cost > CALL_COST;
        if over {
            // What it would have cost it does not cost here.
            self.cost = self.cost.saturating_sub(cost);
            self.rendered = self.rendered.saturating_sub(assembly.bytes());
            slot.assembly = None;
            return;
        }
        let before = assembly.bytes();
        assembly.add(&plan, opened, span, self.frame_bytes);
        self.rendered += assembly.bytes().saturating_sub(before);
        if self.rendered > self.render_bytes {
            self.rendered = self.rendered.saturating_sub(assembly.bytes());
            slot.assembly = None;
        }
    }
}
