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

/// Shorter texts that need no decoding are scanned sooner than they are found again, bytes.
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

/// Texts, decoded: every one that takes more than a glance. Together they are at most twice as large as their row.
#[derive(Debug, Default)]
pub(super) struct Texts(OnceCell<Box<Kept>>);

/// A node of a tree by the bits of where the texts lie, so that it is found in some steps however many they are.
#[derive(Debug)]
struct Kept {
    // The address of the raw text, which does not move while its row is borrowed, and whether it is folded.
    name: u64,
    text: Text,
    others: [OnceCell<Box<Kept>>; 4],
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
        if raw.len() < KEPT_FROM_BYTES && is_plain(raw, folded) {
            return decode(raw, folded);
        }
        let name = (raw.as_ptr().addr() as u64) << 1 | u64::from(folded);
        // Odd, so that unequal names stay unequal, and their first bits differ.
        let mut path = name.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut slot = &self.0;
        loop {
            let kept = slot.get_or_init(|| Box::new(Kept::decode(name, raw, folded)));
            if kept.name == name {
                return kept.text(raw);
            }
            path = path.rotate_left(2);
            slot = &kept.others[(path & 3) as usize];
        }
    }
}

/// Whether it is as it is between its quotes.
fn is_plain(raw: &str, folded: bool) -> bool {
    memchr::memchr(b'\\', raw.as_bytes()).is_none() && !(folded && raw.bytes().any(|byte| byte.is_ascii_uppercase()))
}

impl Kept {
    fn decode(name: u64, raw: &str, folded: bool) -> Self {
        let text = match decode(raw, folded) {
            Some(Cow::Borrowed(_)) => Text::Plain,
            Some(Cow::Owned(text)) => Text::Decoded(text),
            None => Text::Bad,
        };
        Self { name, text, others: Default::default() }
    }

    fn text<'a>(&'a self, raw: &'a str) -> Option<Cow<'a, str>> {
        match &self.text {
            Text::Plain => raw.get(1..raw.len() - 1).map(Cow::Borrowed),
            Text::Decoded(text) => Some(Cow::Borrowed(text)),
            Text::Bad => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found in review: only eight were kept, and each term on a ninth decoded it whole.
    #[test]
    fn every_text_of_a_row_is_decoded_once_however_many_there_are() {
        const COLUMNS: usize = 500;
        let row: String = (0..COLUMNS).map(|n| format!(r#"Line {n}\nline {}|"#, "X".repeat(n % 7 * 100))).collect();
        let quoted: Vec<String> = row.trim_end_matches('|').split('|').map(|text| format!("\"{text}\"")).collect();
        let texts = Texts::default();
        for folded in [false, true] {
            let first: Vec<_> = quoted.iter().map(|raw| texts.get(raw, folded).unwrap()).collect();
            for (raw, first) in quoted.iter().zip(&first) {
                let Some(Cow::Borrowed(again)) = texts.get(raw, folded) else { panic!("decoded again: {raw}") };
                assert_eq!(again.as_ptr(), first.as_ptr());
                assert_eq!(again, decode(raw, folded).unwrap());
            }
        }
    }

    #[test]
    fn what_is_no_text_stays_none() {
        let texts = Texts::default();
        for raw in ["12", r#""\ud800""#, r#""\q""#] {
            assert_eq!((texts.get(raw, false), texts.get(raw, true)), (None, None), "{raw}");
        }
    }
}
