//! Positions in the log: [`Epoch`], [`Seq`] and the [`Cursor`] that clients keep.
//!
//! A cursor names the last event that was handled, so it is always exclusive: a resume begins *after* it. Its text is
//! fixed-width lower-case hexadecimal, so cursors of one cluster sort bytewise in event order, and two cursors are the
//! same text exactly when they are the same position. The check ties a cursor to the event it was taken at: a cursor
//! that was forged, or that belongs to a log that has diverged, does not match the event that stands there now.
//!
//! Pure: knows neither the log nor the ring; whoever holds the event's id makes and verifies the check.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};
use uuid::Uuid;

/// A position in the log as the relay numbers it: dense, from 1. `0` is before the first event.
pub type Seq = u64;

/// An incarnation of the log: rises when the database that carries it is not the one it was.
pub type Epoch = u32;

/// Length of a cursor's text: 8 (epoch) + 1 + 16 (seq) + 1 + 8 (check).
pub const CURSOR_TEXT_LEN: usize = 34;

/// The last handled position. Order is event order: epoch first, then seq.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cursor {
    /// The epoch in which the event at `seq` was numbered.
    pub epoch: Epoch,
    /// The last handled seq; 0 before the first event.
    pub seq: Seq,
    /// Four bytes of a hash over epoch, seq and event id.
    pub check: u32,
}

/// The text is not a cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cursor is malformed: keep the text of `cursor` exactly as the server sent it")]
pub struct MalformedCursor;

impl Cursor {
    /// The cursor of the event `event_id` that stands at `seq`; nil for seq 0.
    #[must_use]
    pub fn at(epoch: Epoch, seq: Seq, event_id: Uuid) -> Self {
        Self { epoch, seq, check: check(epoch, seq, event_id) }
    }

    /// Before the first event of the first epoch.
    #[must_use]
    pub fn origin(epoch: Epoch) -> Self {
        Self::at(epoch, 0, Uuid::nil())
    }

    /// Whether the event `event_id` is the one that this cursor was taken at.
    #[must_use]
    pub fn matches(&self, event_id: Uuid) -> bool {
        self.check == check(self.epoch, self.seq, event_id)
    }
}

fn check(epoch: Epoch, seq: Seq, event_id: Uuid) -> u32 {
    let mut hash = Sha256::new();
    hash.update(epoch.to_be_bytes());
    hash.update(seq.to_be_bytes());
    hash.update(event_id.as_bytes());
    let digest = hash.finalize();
    u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]])
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{:016x}-{:08x}", self.epoch, self.seq, self.check)
    }
}

impl FromStr for Cursor {
    type Err = MalformedCursor;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = text.as_bytes();
        if bytes.len() != CURSOR_TEXT_LEN || bytes[8] != b'-' || bytes[25] != b'-' {
            return Err(MalformedCursor);
        }
        let epoch = hex(&bytes[..8])?;
        let seq = hex(&bytes[9..25])?;
        let check = hex(&bytes[26..])?;
        Ok(Self {
            epoch: u32::try_from(epoch).map_err(|_| MalformedCursor)?,
            seq,
            check: u32::try_from(check).map_err(|_| MalformedCursor)?,
        })
    }
}

/// Lower-case only: two texts must never mean the same position.
fn hex(digits: &[u8]) -> Result<u64, MalformedCursor> {
    digits.iter().try_fold(0u64, |value, digit| {
        let nibble = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return Err(MalformedCursor),
        };
        Ok((value << 4) | u64::from(nibble))
    })
}

impl serde::Serialize for Cursor {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Cursor {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// One incarnation of the log, as the table `epochs` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EpochStart {
    /// Its number, from 1.
    pub epoch: Epoch,
    /// The highest seq that stood before it: its own events are numbered above.
    pub start_seq: Seq,
}

/// Every epoch of the log, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Epochs(Vec<EpochStart>);

/// Why a cursor of this log cannot be resumed from, as far as the epochs alone can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EpochFault {
    /// The epoch never existed here.
    Unknown,
    /// The position is past the start of a later epoch: it lies in a lost tail.
    Diverged,
}

impl Epochs {
    /// `starts` in any order.
    #[must_use]
    pub fn new(mut starts: Vec<EpochStart>) -> Self {
        starts.sort_by_key(|start| start.epoch);
        Self(starts)
    }

    /// The newest epoch; 0 when there is none yet.
    #[must_use]
    pub fn newest(&self) -> Epoch {
        self.0.last().map_or(0, |start| start.epoch)
    }

    /// Where `epoch` begins, if it is known.
    #[must_use]
    pub fn start_of(&self, epoch: Epoch) -> Option<Seq> {
        self.0.iter().find(|start| start.epoch == epoch).map(|start| start.start_seq)
    }

    /// Up to where a log that was known by `known` is still the same: the lowest start of the epochs that only one of the two
    /// lists has. Several may have begun unseen, and one may be gone with the primary that gave it. The newest one's start
    /// where the lists are equal.
    #[must_use]
    pub fn cut_since(&self, known: &Self) -> Seq {
        let news = self.0.iter().filter(|start| !known.0.contains(start));
        let gone = known.0.iter().filter(|start| !self.0.contains(start));
        let cut = news.chain(gone).map(|start| start.start_seq).min();
        cut.or_else(|| self.start_of(self.newest())).unwrap_or_default()
    }

    /// The epoch in which the event that stands at `seq` now was numbered.
    #[must_use]
    pub fn of(&self, seq: Seq) -> Epoch {
        let owner = self.0.iter().rev().find(|start| start.start_seq < seq).or(self.0.first());
        owner.map_or(0, |start| start.epoch)
    }

    /// Whether a cursor's epoch and seq belong to this log's history.
    ///
    /// # Errors
    /// [`EpochFault`] says why not.
    pub fn admit(&self, cursor: &Cursor) -> Result<(), EpochFault> {
        if self.start_of(cursor.epoch).is_none() {
            return Err(EpochFault::Unknown);
        }
        let lost = self.0.iter().any(|later| later.epoch > cursor.epoch && later.start_seq < cursor.seq);
        if lost { Err(EpochFault::Diverged) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_cursor_survives_its_text(epoch in any::<u32>(), seq in any::<u64>(), check in any::<u32>()) {
            let cursor = Cursor { epoch, seq, check };
            let text = cursor.to_string();
            prop_assert!(text.len() <= 64);
            prop_assert_eq!(text.parse::<Cursor>(), Ok(cursor));
        }

        #[test]
        fn texts_sort_in_event_order(a in any::<(u32, u64)>(), b in any::<(u32, u64)>()) {
            let left = Cursor::at(a.0, a.1, Uuid::nil());
            let right = Cursor::at(b.0, b.1, Uuid::nil());
            prop_assert_eq!(left.to_string().cmp(&right.to_string()), left.cmp(&right));
        }

        #[test]
        fn arbitrary_text_never_panics(text in "\\PC*") {
            let _ = text.parse::<Cursor>();
        }
    }

    #[test]
    fn whoever_missed_two_epochs_is_cut_where_the_first_of_them_began() {
        let start = |epoch, start_seq| EpochStart { epoch, start_seq };
        let epochs = Epochs::new(vec![start(1, 0), start(2, 50), start(3, 500)]);
        let known = |count: usize| Epochs::new(epochs.0[..count].to_vec());
        assert_eq!([0, 1, 2, 3].map(|count| epochs.cut_since(&known(count))), [0, 50, 500, 500]);
        assert_eq!(Epochs::new(vec![start(1, 0), start(2, 90), start(3, 50)]).cut_since(&known(1)), 50);
    }

    #[test]
    fn an_epoch_that_is_gone_takes_its_events_with_it() {
        let list = |starts: &[(Epoch, Seq)]| {
            Epochs::new(
                starts.iter().map(|(epoch, start_seq)| EpochStart { epoch: *epoch, start_seq: *start_seq }).collect(),
            )
        };
        let known = list(&[(1, 0), (2, 990)]);
        assert_eq!(list(&[(1, 0), (2, 950)]).cut_since(&known), 950);
        assert_eq!(list(&[(1, 0), (2, 1_000)]).cut_since(&known), 990);
    }

    #[test]
    fn a_forged_check_does_not_match() {
        let id = Uuid::from_u128(7);
        let cursor = Cursor::at(1, 10, id);
        assert!(cursor.matches(id));
        assert!(!cursor.matches(Uuid::from_u128(8)));
        assert!(!Cursor { seq: 11, ..cursor }.matches(id));
    }

    #[test]
    fn upper_case_is_not_a_second_spelling() {
        let text = Cursor { epoch: 0xab, seq: 1, check: 2 }.to_string();
        assert_eq!(text.to_uppercase().parse::<Cursor>(), Err(MalformedCursor));
    }

    #[test]
    fn only_the_lost_tail_diverges() {
        let epochs = Epochs::new(vec![EpochStart { epoch: 1, start_seq: 0 }, EpochStart { epoch: 2, start_seq: 990 }]);
        let cursor = |epoch, seq| Cursor { epoch, seq, check: 0 };
        assert_eq!(epochs.admit(&cursor(1, 990)), Ok(()));
        assert_eq!(epochs.admit(&cursor(1, 991)), Err(EpochFault::Diverged));
        assert_eq!(epochs.admit(&cursor(2, 991)), Ok(()));
        assert_eq!(epochs.admit(&cursor(3, 1)), Err(EpochFault::Unknown));
        assert_eq!((epochs.of(990), epochs.of(991), epochs.of(0)), (1, 2, 1));
    }
}
