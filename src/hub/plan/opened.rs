//! An event taken apart once, whoever asks for its parts.
//!
//! Many subscriptions look at the same event. Its body is parsed when the first of them needs it, and a long text is
//! decoded once, not once for each condition on it.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::fmt;

use crate::event::Event;
use crate::event::row::Row;
use crate::filter::{RowImage, decode};

/// Texts that an image keeps decoded; of more, the others are decoded again.
const KEPT_TEXTS: usize = 8;
/// Shorter texts are decoded sooner than they are found again, bytes.
const KEPT_FROM_BYTES: usize = 256;

/// Says whether what is going on is to end.
pub(super) type Stop<'e> = &'e dyn Fn() -> bool;

/// An event and its parts.
pub struct Opened<'e> {
    event: &'e Event,
    stop: Option<Stop<'e>>,
    body: OnceCell<Option<Row<'e>>>,
    before: OnceCell<Option<Image<'e>>>,
    after: OnceCell<Option<Image<'e>>>,
}

impl fmt::Debug for Opened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened").field("event", self.event).finish_non_exhaustive()
    }
}

impl<'e> Opened<'e> {
    /// Nothing is parsed yet.
    #[must_use]
    pub fn new(event: &'e Event) -> Self {
        let (body, before, after) = (OnceCell::new(), OnceCell::new(), OnceCell::new());
        Self { event, stop: None, body, before, after }
    }

    /// Conditions on it end early, with whatever outcome, once `stop` says so.
    #[must_use]
    pub fn stopped_by(event: &'e Event, stop: Stop<'e>) -> Self {
        Self { stop: Some(stop), ..Self::new(event) }
    }

    /// The event.
    #[must_use]
    pub const fn event(&self) -> &'e Event {
        self.event
    }

    /// Its members; None: not one JSON object.
    #[must_use]
    pub fn body(&self) -> Option<&Row<'e>> {
        let parse = || Row::parse(std::str::from_utf8(&self.event.body).ok()?).ok();
        self.body.get_or_init(parse).as_ref()
    }

    /// The row before, where there is one.
    #[must_use]
    pub fn before(&self) -> Option<&Image<'e>> {
        self.before.get_or_init(|| self.image("before")).as_ref()
    }

    /// The row after, where there is one.
    #[must_use]
    pub fn after(&self) -> Option<&Image<'e>> {
        self.after.get_or_init(|| self.image("after")).as_ref()
    }

    pub(super) fn stop(&self) -> Option<Stop<'e>> {
        self.stop
    }

    fn image(&self, name: &str) -> Option<Image<'e>> {
        let row = Row::parse(self.body()?.get(name)?).ok()?;
        Some(Image { row, stop: self.stop, texts: Texts::default() })
    }
}

/// One image of a row.
pub struct Image<'e> {
    row: Row<'e>,
    stop: Option<Stop<'e>>,
    texts: Texts,
}

impl fmt::Debug for Image<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Image").field(&self.row).finish()
    }
}

impl<'e> Image<'e> {
    /// The raw value of a column; None when the image lacks it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&'e str> {
        self.row.get(name)
    }
}

impl RowImage for Image<'_> {
    fn column(&self, name: &str) -> Option<&str> {
        self.row.get(name)
    }

    fn text<'a>(&'a self, raw: &'a str, folded: bool) -> Option<Cow<'a, str>> {
        self.texts.get(raw, folded)
    }

    fn is_interrupted(&self) -> bool {
        self.stop.is_some_and(|stop| stop())
    }
}

/// Long texts, decoded.
#[derive(Debug, Default)]
pub(super) struct Texts([OnceCell<Kept>; KEPT_TEXTS]);

#[derive(Debug)]
struct Kept {
    // Where the raw text lies; it does not move while its row is borrowed.
    address: usize,
    folded: bool,
    text: Text,
}

#[derive(Debug)]
enum Text {
    /// As it is between its quotes.
    Plain,
    Decoded(String),
    /// Not a string.
    Bad,
}

impl Texts {
    pub(super) fn get<'a>(&'a self, raw: &'a str, folded: bool) -> Option<Cow<'a, str>> {
        if raw.len() < KEPT_FROM_BYTES {
            return decode(raw, folded);
        }
        let address = raw.as_ptr().addr();
        for slot in &self.0 {
            let kept = slot.get_or_init(|| {
                let text = match decode(raw, folded) {
                    Some(Cow::Borrowed(_)) => Text::Plain,
                    Some(Cow::Owned(text)) => Text::Decoded(text),
                    None => Text::Bad,
                };
                Kept { address, folded, text }
            });
            if kept.address != address || kept.folded != folded {
                continue;
            }
            return match &kept.text {
                Text::Plain => raw.get(1..raw.len() - 1).map(Cow::Borrowed),
                Text::Decoded(text) => Some(Cow::Borrowed(text)),
                Text::Bad => None,
            };
        }
        decode(raw, folded)
    }
}
