//! Reads JSON where it lies: the `->` and `->>` steps of a path, and the text of a string.
//!
//! Works on slices of the row's own text and allocates only for strings with escapes. The text
//! comes from Postgres and is taken to be valid; on anything else the answers are "not found",
//! never a panic, and nothing here recurses, so nesting costs no stack.

use std::borrow::Cow;

/// One step of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The value of an object's key.
    Key(Box<str>),
    /// An array's element, from 0; negative counts from the end.
    Index(i32),
}

impl Step {
    /// Bytes that a copy takes.
    pub(super) fn text_bytes(&self) -> usize {
        match self {
            Self::Key(key) => key.len(),
            Self::Index(_) => size_of::<i32>(),
        }
    }
}

/// Follows `steps`; `None` is SQL's NULL (no such key, no such element, not a container). A JSON
/// `null` that is found is a value, as in Postgres.
pub(super) fn follow<'a>(json: &'a str, steps: &[Step], binary: bool) -> Option<&'a str> {
    let mut current = json.trim_ascii();
    for step in steps {
        current = match step {
            Step::Key(key) => field(current, key)?,
            Step::Index(index) => element(current, *index, binary)?,
        };
    }
    Some(current)
}

/// What `->>` makes of a value: a string's content, other values as they are written, and SQL's
/// NULL for `null`. A string that Postgres could not decode (`\u0000`, half a surrogate pair) is
/// NULL as well, where Postgres raises an error.
pub(super) fn as_text(value: &str) -> Option<Cow<'_, str>> {
    if value == "null" {
        return None;
    }
    if value.starts_with('"') {
        return string_content(value);
    }
    Some(Cow::Borrowed(value))
}

/// The content of a JSON string with its quotes; borrowed unless it has escapes.
pub(super) fn string_content(json: &str) -> Option<Cow<'_, str>> {
    let inner = json.strip_prefix('"')?.strip_suffix('"')?;
    if inner.as_bytes().contains(&b'\\') { unescape(inner).map(Cow::Owned) } else { Some(Cow::Borrowed(inner)) }
}

fn unescape(inner: &str) -> Option<String> {
    let mut text = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        let escape = *rest.as_bytes().get(at + 1)?;
        rest = &rest[at + 1..];
        if escape == b'u' {
            let (character, used) = unicode_escape(rest)?;
            text.push(character);
            rest = rest.get(used..)?;
            continue;
        }
        text.push(match escape {
            b'"' | b'\\' | b'/' => char::from(escape),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            _ => return None,
        });
        rest = &rest[1..];
    }
    text.push_str(rest);
    Some(text)
}

/// Reads `uXXXX`, or `uXXXX\uXXXX` for a surrogate pair, and says how many bytes it took.
fn unicode_escape(text: &str) -> Option<(char, usize)> {
    let unit = |start: usize| {
        let digits = text.get(start..start + 4)?;
        if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        u32::from_str_radix(digits, 16).ok()
    };
    let first = unit(1)?;
    match first {
        0 => None,
        0xD800..=0xDBFF => {
            if text.get(5..7)? != "\\u" {
                return None;
            }
            let second = unit(7)?;
            if !(0xDC00..=0xDFFF).contains(&second) {
                return None;
            }
            let code = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
            Some((char::from_u32(code)?, 11))
        }
        code => Some((char::from_u32(code)?, 5)),
    }
}

/// The value of `key`. Of a key that stands twice the last counts, as in Postgres's `json`.
fn field<'a>(json: &'a str, key: &str) -> Option<&'a str> {
    let mut items = Items::open(json, b'{')?;
    let mut found = None;
    while let Some(name) = items.next_value() {
        items.colon()?;
        let value = items.next_value()?;
        if is_key(name, key) {
            found = Some(value);
        }
        if !items.comma() {
            break;
        }
    }
    found
}

fn is_key(name: &str, key: &str) -> bool {
    match string_content(name) {
        Some(content) => content == key,
        None => false,
    }
}

fn element(json: &str, index: i32, binary: bool) -> Option<&str> {
    let Some(mut items) = Items::open(json, b'[') else {
        // Postgres keeps a jsonb scalar as an array of one, and lets this show.
        let scalar = binary && !json.starts_with('{');
        return (scalar && matches!(index, 0 | -1)).then_some(json);
    };
    let wanted = if index >= 0 {
        usize::try_from(index).ok()?
    } else {
        let back = usize::try_from(index.unsigned_abs()).ok()?;
        items.clone().count().checked_sub(back)?
    };
    items.nth(wanted)
}

/// Walks the values of one container.
#[derive(Clone)]
struct Items<'a> {
    json: &'a str,
    at: usize,
}

impl<'a> Items<'a> {
    fn open(json: &'a str, bracket: u8) -> Option<Self> {
        (json.as_bytes().first() == Some(&bracket)).then_some(Self { json, at: 1 })
    }

    fn skip_blanks(&mut self) -> Option<u8> {
        loop {
            let byte = *self.json.as_bytes().get(self.at)?;
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Some(byte);
            }
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.skip_blanks() == Some(byte);
        if found {
            self.at += 1;
        }
        found
    }

    fn colon(&mut self) -> Option<()> {
        self.take(b':').then_some(())
    }

    fn comma(&mut self) -> bool {
        self.take(b',')
    }

    /// The next value's text, or `None` at the container's end.
    fn next_value(&mut self) -> Option<&'a str> {
        let first = self.skip_blanks()?;
        let start = self.at;
        match first {
            b'"' => self.skip_string()?,
            b'{' | b'[' => self.skip_container()?,
            b'}' | b']' => return None,
            _ => self.skip_scalar(),
        }
        let value = self.json.get(start..self.at)?;
        (!value.is_empty()).then_some(value)
    }

    fn skip_string(&mut self) -> Option<()> {
        let bytes = self.json.as_bytes();
        self.at += 1;
        loop {
            match *bytes.get(self.at)? {
                b'"' => break,
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
        self.at += 1;
        Some(())
    }

    fn skip_container(&mut self) -> Option<()> {
        let mut depth = 0_usize;
        loop {
            match *self.json.as_bytes().get(self.at)? {
                b'"' => {
                    self.skip_string()?;
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return Some(());
            }
        }
    }

    fn skip_scalar(&mut self) {
        let bytes = self.json.as_bytes();
        while let Some(byte) = bytes.get(self.at)
            && !matches!(byte, b',' | b'}' | b']' | b':' | b'"' | b'{' | b'[' | b' ' | b'\t' | b'\n' | b'\r')
        {
            self.at += 1;
        }
    }
}

/// The elements of an array.
impl<'a> Iterator for Items<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let value = self.next_value()?;
        if !self.comma() {
            // Nothing follows the last element.
            self.at = self.json.len();
        }
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(name: &str) -> Step {
        Step::Key(name.into())
    }

    #[test]
    fn a_path_finds_fields_and_elements() {
        let json = r#" {"a" : {"b": [1, "two", {"c": null}], "a": 0}, "n": 1.50} "#;
        assert_eq!(follow(json, &[key("n")], false), Some("1.50"));
        assert_eq!(follow(json, &[key("a"), key("b"), Step::Index(1)], false), Some("\"two\""));
        assert_eq!(follow(json, &[key("a"), key("b"), Step::Index(-1), key("c")], false), Some("null"));
        assert_eq!(follow(json, &[key("b")], false), None);
        assert_eq!(follow(json, &[Step::Index(0)], false), None);
        assert_eq!(follow(json, &[key("a"), key("b"), Step::Index(-4)], false), None);
    }

    #[test]
    fn the_last_of_two_equal_keys_counts() {
        assert_eq!(follow(r#"{"a":1,"\u0061":2}"#, &[key("a")], false), Some("2"));
    }

    #[test]
    fn a_jsonb_scalar_is_an_array_of_one() {
        assert_eq!(follow("1", &[Step::Index(0)], true), Some("1"));
        assert_eq!(follow("1", &[Step::Index(0)], false), None);
    }

    #[test]
    fn escapes_are_decoded() {
        assert_eq!(as_text(r#""a\"\\\/\n\u00e9\ud83d\ude00""#).as_deref(), Some("a\"\\/\né😀"));
        assert_eq!(as_text(r#""\u0000""#), None);
        assert_eq!(as_text(r#""\ud83d""#), None);
        assert_eq!(as_text("null"), None);
        assert_eq!(as_text("[1, 2]").as_deref(), Some("[1, 2]"));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[\\[\\]{}\",:\\\\ua0 é-]{0,40}", index in -3i32..3, binary: bool) {
            let _ = follow(&text, &[key("a"), Step::Index(index)], binary);
            let _ = follow(&text, &[Step::Index(index), key("a")], binary);
            let _ = as_text(&text);
        }
    }
}
