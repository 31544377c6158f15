//! From an event to the groups that may show it: table, then a hash of the filter's equality, then the rest.
//!
//! Pure. Cost follows the matches: a group whose filter says `column = constant` is found by the row's value, not by
//! asking every group. What cannot be looked up (no before image, TRUNCATE, …) asks every group of the table.

use std::collections::HashMap;
use std::sync::Arc;

use crate::event::Operation;
use crate::filter::{ColumnType, IndexConjunct, IndexKey, index_key_of};
use crate::hub::group::{Group, Plans};
use crate::hub::plan::{Image, Opened, TablePlan};

/// All groups of a node.
#[derive(Debug, Default)]
pub struct Routes {
    groups: HashMap<Arc<str>, Arc<Group>>,
    tables: HashMap<Arc<str>, Table>,
    globs: Vec<Arc<Group>>,
    ended: Vec<Arc<Group>>,
}

#[derive(Debug, Default)]
struct Table {
    unindexed: Vec<Arc<Group>>,
    indexed: Vec<Index>,
}

/// Groups whose filter pins one column.
#[derive(Debug)]
struct Index {
    column: Box<str>,
    kind: ColumnType,
    by_value: HashMap<IndexKey, Vec<Arc<Group>>>,
}

impl Routes {
    /// The group of this key.
    #[must_use]
    pub fn find(&self, key: &str) -> Option<&Arc<Group>> {
        self.groups.get(key)
    }

    /// How many groups there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Every group, those that ended but are still listened to included.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Group>> {
        self.groups.values().chain(&self.ended)
    }

    /// Takes a group that ended off the routes; it is kept for its listeners.
    pub fn retire(&mut self, group: &Arc<Group>) {
        self.remove(group);
        self.ended.push(Arc::clone(group));
    }

    /// Adds a group.
    pub fn add(&mut self, group: &Arc<Group>) {
        self.groups.insert(Arc::clone(&group.key), Arc::clone(group));
        match &group.plans {
            Plans::Globs { .. } => self.globs.push(Arc::clone(group)),
            Plans::Exact(plans) => {
                for (table, plan) in plans {
                    self.tables.entry(Arc::clone(table)).or_default().add(plan, group);
                }
            }
        }
    }

    /// Removes a group, if it is still here: one that ended is gone before its last listener is, and another may have
    /// taken its key.
    pub fn remove(&mut self, group: &Arc<Group>) {
        self.ended.retain(|other| !Arc::ptr_eq(other, group));
        match self.groups.get(&group.key) {
            Some(found) if Arc::ptr_eq(found, group) => self.groups.remove(&group.key),
            _ => return,
        };
        match &group.plans {
            Plans::Globs { .. } => self.globs.retain(|other| !Arc::ptr_eq(other, group)),
            Plans::Exact(plans) => {
                for (name, plan) in plans {
                    if let Some(table) = self.tables.get_mut(name) {
                        table.remove(plan, group);
                        if table.unindexed.is_empty() && table.indexed.is_empty() {
                            self.tables.remove(name);
                        }
                    }
                }
            }
        }
    }

    /// Hands `event` to every group that may show it, at least to all that do; some may be handed it twice.
    pub fn each<'a>(&'a self, opened: &Opened<'_>, mut visit: impl FnMut(&'a Arc<Group>)) {
        self.globs.iter().for_each(&mut visit);
        let Some(table) = self.tables.get(&opened.event().table) else { return };
        table.unindexed.iter().for_each(&mut visit);
        if table.indexed.is_empty() {
            return;
        }
        let Some(images) = Images::of(opened) else {
            return table.indexed.iter().flat_map(|index| index.by_value.values().flatten()).for_each(&mut visit);
        };
        for index in &table.indexed {
            index.each(&images, &mut visit);
        }
    }
}

impl Table {
    fn add(&mut self, plan: &TablePlan, group: &Arc<Group>) {
        let Some(conjunct) = conjunct(plan) else {
            self.unindexed.push(Arc::clone(group));
            return;
        };
        let found = self.indexed.iter().position(|i| *i.column == *conjunct.column && i.kind == conjunct.kind);
        let index = match found {
            Some(position) => &mut self.indexed[position],
            None => {
                let column = conjunct.column.as_str().into();
                self.indexed.push(Index { column, kind: conjunct.kind, by_value: HashMap::new() });
                let last = self.indexed.len() - 1;
                &mut self.indexed[last]
            }
        };
        for key in conjunct.keys {
            index.by_value.entry(key).or_default().push(Arc::clone(group));
        }
    }

    fn remove(&mut self, plan: &TablePlan, group: &Arc<Group>) {
        let Some(conjunct) = conjunct(plan) else {
            self.unindexed.retain(|other| !Arc::ptr_eq(other, group));
            return;
        };
        for index in self.indexed.iter_mut().filter(|i| *i.column == *conjunct.column && i.kind == conjunct.kind) {
            for key in &conjunct.keys {
                if let Some(groups) = index.by_value.get_mut(key) {
                    groups.retain(|other| !Arc::ptr_eq(other, group));
                    if groups.is_empty() {
                        index.by_value.remove(key);
                    }
                }
            }
        }
        self.indexed.retain(|index| !index.by_value.is_empty());
    }
}

/// What a plan can be found by. A filter that no row satisfies has no keys, but TRUNCATE and SCHEMA still pass it.
fn conjunct(plan: &TablePlan) -> Option<IndexConjunct> {
    plan.filter.as_ref()?.index_conjunct().filter(|conjunct| !conjunct.keys.is_empty())
}

impl Index {
    fn each<'a>(&'a self, images: &Images<'_, '_>, visit: &mut impl FnMut(&'a Arc<Group>)) {
        let mut seen: Option<IndexKey> = None;
        for image in [images.after, images.before].into_iter().flatten() {
            let Some(raw) = image.get(&self.column) else {
                // The source did not send the column: every group has to judge for itself.
                return self.by_value.values().flatten().for_each(visit);
            };
            // None: SQL's NULL, which equals nothing.
            let Some(key) = index_key_of(self.kind, raw) else { continue };
            if seen.as_ref() == Some(&key) {
                continue;
            }
            if let Some(groups) = self.by_value.get(&key) {
                groups.iter().for_each(&mut *visit);
            }
            seen = Some(key);
        }
    }
}

/// Both images of an event, where both are needed and there.
struct Images<'a, 'e> {
    before: Option<&'a Image<'e>>,
    after: Option<&'a Image<'e>>,
}

impl<'a, 'e> Images<'a, 'e> {
    fn of(opened: &'a Opened<'e>) -> Option<Self> {
        let event = opened.event();
        if event.omitted {
            return None;
        }
        // An image that is wanted but missing leaves the verdict to every group; an UPDATE without a before image is
        // tested by `after` alone.
        let wanted = match event.operation {
            Operation::Insert | Operation::Update => opened.after(),
            Operation::Delete => opened.before(),
            Operation::Truncate | Operation::Event | Operation::Schema => None,
        };
        wanted.map(|_| Self { before: opened.before(), after: opened.after() })
    }
}
