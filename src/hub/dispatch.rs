//! From events to the frames of every group that may show any of them: once for each group, whoever listens.

use std::collections::HashMap;
use std::sync::Arc;

use super::group::{Assembly, Ended, Frame, Group, Span};
use super::ring::Whole;
use super::routes::Routes;
use crate::cursor::{Cursor, Epochs};
use crate::event::Operation;

/// What one group gets of some consecutive events.
pub(super) struct Dispatched {
    pub(super) group: Arc<Group>,
    pub(super) frames: Vec<Frame>,
    pub(super) ended: Option<Ended>,
}

/// Renders `whole` for every group that may show any of it.
pub(super) fn dispatch(
    routes: &Routes,
    whole: &Whole,
    epochs: &Epochs,
    end: Cursor,
    frame_bytes: usize,
) -> Vec<Dispatched> {
    let mut assemblies: HashMap<*const Group, (&Arc<Group>, Assembly)> = HashMap::new();
    let mut ended: HashMap<*const Group, Dispatched> = HashMap::new();
    let mut span = Span::new(epochs);
    for event in &whole.events {
        routes.each(event, |group| {
            if !ended.is_empty() && ended.contains_key(&Arc::as_ptr(group)) {
                return;
            }
            let slot = assemblies.entry(Arc::as_ptr(group)).or_insert_with(|| (group, Assembly::default()));
            if event.operation == Operation::Schema {
                group.plans.forget();
            }
            slot.1.add(&group.plans, event, &span, frame_bytes);
            if let Some((reason, message)) = group.plans.broken_by(event) {
                let assembly = std::mem::take(&mut slot.1);
                let frames = assembly.finish(Cursor::at(epochs.of(event.seq), event.seq, event.id), !event.tx_end);
                let (group, because) = (Arc::clone(group), Some(Ended { seq: event.seq, reason, message }));
                ended.insert(Arc::as_ptr(&group), Dispatched { group, frames, ended: because });
            }
        });
        span.pass(event);
    }
    let live = assemblies.into_iter().filter(|(group, _)| !ended.contains_key(group)).map(|(_, (group, assembly))| {
        Dispatched { group: Arc::clone(group), frames: assembly.finish(end, whole.open), ended: None }
    });
    let mut all: Vec<_> = live.collect();
    all.extend(ended.into_values());
    all
}
