//! [`OpSet`]: which operations' events a key may read.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::event::Operation;

/// A set of operations. `SCHEMA` is not among them: whoever may read a table in any way is told when its shape changes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct OpSet(u8);

impl OpSet {
    /// No operation.
    pub const NONE: Self = Self(0);
    /// `INSERT`
    pub const INSERT: Self = Self(1);
    /// `UPDATE`
    pub const UPDATE: Self = Self(1 << 1);
    /// `DELETE`
    pub const DELETE: Self = Self(1 << 2);
    /// `TRUNCATE`
    pub const TRUNCATE: Self = Self(1 << 3);
    /// `EVENT`: domain events.
    pub const EVENT: Self = Self(1 << 4);
    /// Every operation.
    pub const ALL: Self = Self((1 << 5) - 1);

    /// The set of this one operation; of `SCHEMA`, none.
    #[must_use]
    pub const fn of(operation: Operation) -> Self {
        match operation {
            Operation::Insert => Self::INSERT,
            Operation::Update => Self::UPDATE,
            Operation::Delete => Self::DELETE,
            Operation::Truncate => Self::TRUNCATE,
            Operation::Event => Self::EVENT,
            Operation::Schema => Self::NONE,
        }
    }

    /// The operations of both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether every operation of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether events of this operation may be read: those in the set, and `SCHEMA` where anything is.
    #[must_use]
    pub const fn allows(self, operation: Operation) -> bool {
        !self.is_empty() && self.contains(Self::of(operation))
    }

    /// Whether there is no operation in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether every operation is in it.
    #[must_use]
    pub const fn is_all(&self) -> bool {
        self.0 == Self::ALL.0
    }

    /// The operations in it, in the order of the protocol.
    pub fn iter(self) -> impl Iterator<Item = Operation> {
        Operation::ALL.into_iter().filter(move |operation| {
            let one = Self::of(*operation);
            !one.is_empty() && self.contains(one)
        })
    }
}

impl FromIterator<Operation> for OpSet {
    fn from_iter<I: IntoIterator<Item = Operation>>(operations: I) -> Self {
        operations.into_iter().fold(Self::NONE, |set, operation| set.with(Self::of(operation)))
    }
}

impl Default for OpSet {
    fn default() -> Self {
        Self::ALL
    }
}

impl fmt::Debug for OpSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl Serialize for OpSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter().map(Operation::as_str))
    }
}

impl<'de> Deserialize<'de> for OpSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = |name: String| {
            Operation::parse(&name).filter(|operation| *operation != Operation::Schema).ok_or_else(|| {
                serde::de::Error::custom(format_args!(
                    "{name:?} cannot be granted: INSERT, UPDATE, DELETE, TRUNCATE or EVENT (SCHEMA needs no grant)"
                ))
            })
        };
        Vec::<String>::deserialize(deserializer)?.into_iter().map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_change_is_told_to_whoever_may_read_anything() {
        assert!(OpSet::DELETE.allows(Operation::Schema));
        assert!(OpSet::DELETE.allows(Operation::Delete));
        assert!(!OpSet::DELETE.allows(Operation::Insert));
        assert!(!OpSet::NONE.allows(Operation::Schema));
        assert!(Operation::ALL.into_iter().all(|operation| OpSet::ALL.allows(operation)));
        assert!(Operation::ALL.into_iter().collect::<OpSet>().is_all());
    }
}
