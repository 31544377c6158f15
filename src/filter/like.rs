//! `LIKE` and `ILIKE` patterns, compiled once.
//!
//! A pattern is cut at its `%` into segments; segments are then found from left to right, which
//! needs no backtracking. Segments without `_` use the standard library's linear search; for those
//! with `_` the length is bounded, so that no pattern makes a row cost more than a bounded multiple
//! of its size.

use std::borrow::Cow;

/// Characters of a segment that contains `_` and floats between two `%`: each byte of the text
/// costs at most this many comparisons.
const MAX_FLOATING_WILDCARDS: usize = 64;

#[derive(Clone, Debug)]
pub(super) struct Pattern {
    /// Folds ASCII letters, as `ILIKE` in collation "C".
    fold: bool,
    /// Never empty. Empty segments stand where `%` begins or ends the pattern.
    segments: Vec<Segment>,
    /// Normal text, for canonical form.
    text: String,
}

#[derive(Clone, Debug, Default)]
struct Segment {
    pieces: Vec<Piece>,
    /// The whole segment's text when it has no `_`.
    literal: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Piece {
    Exactly(char),
    AnyOne,
}

/// Why a pattern is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PatternFault {
    /// It ends with its escape character.
    DanglingEscape,
    /// A part between two `%` mixes `_` with too many characters.
    TooManyWildcards,
}

impl PatternFault {
    pub(super) fn reason(self) -> String {
        match self {
            Self::DanglingEscape => {
                "the LIKE pattern must not end with its escape character; write it twice".to_owned()
            }
            Self::TooManyWildcards => format!(
                "a part of a LIKE pattern that contains _ and stands between two % may have at most \
                 {MAX_FLOATING_WILDCARDS} characters; shorten it"
            ),
        }
    }
}

impl Pattern {
    /// `escape` is backslash unless the condition says otherwise; `None` means no escape at all.
    pub(super) fn compile(pattern: &str, escape: Option<char>, fold: bool) -> Result<Self, PatternFault> {
        let mut segments = vec![Segment::default()];
        let mut text = String::with_capacity(pattern.len());
        let mut characters = pattern.chars();
        while let Some(character) = characters.next() {
            let piece = if Some(character) == escape {
                Piece::Exactly(characters.next().ok_or(PatternFault::DanglingEscape)?)
            } else if character == '%' {
                segments.push(Segment::default());
                text.push('%');
                continue;
            } else if character == '_' {
                Piece::AnyOne
            } else {
                Piece::Exactly(character)
            };
            let piece = piece.folded(fold);
            piece.write(&mut text);
            if let Some(segment) = segments.last_mut() {
                segment.pieces.push(piece);
            }
        }
        let last = segments.len() - 1;
        for (place, segment) in segments.iter_mut().enumerate() {
            segment.literal = segment.pieces.iter().map(|piece| piece.literal()).collect();
            let floats = place > 0 && place < last;
            if floats && segment.literal.is_none() && segment.pieces.len() > MAX_FLOATING_WILDCARDS {
                return Err(PatternFault::TooManyWildcards);
            }
        }
        Ok(Self { fold, segments, text })
    }

    /// The pattern with backslash as its escape: equal texts match alike.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn folds(&self) -> bool {
        self.fold
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        let text = if self.fold && text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            Cow::Owned(text.to_ascii_lowercase())
        } else {
            Cow::Borrowed(text)
        };
        let Some((first, others)) = self.segments.split_first() else {
            return text.is_empty();
        };
        let Some(rest) = first.strip_prefix(&text) else {
            return false;
        };
        let Some((last, floating)) = others.split_last() else {
            return rest.is_empty();
        };
        let Some(mut rest) = last.strip_suffix(rest) else {
            return false;
        };
        for segment in floating {
            match segment.skip_past(rest) {
                Some(after) => rest = after,
                None => return false,
            }
        }
        true
    }
}

impl Segment {
    fn strip_prefix<'a>(&self, text: &'a str) -> Option<&'a str> {
        if let Some(literal) = &self.literal {
            return text.strip_prefix(literal.as_str());
        }
        let mut characters = text.chars();
        for piece in &self.pieces {
            if !piece.accepts(characters.next()?) {
                return None;
            }
        }
        Some(characters.as_str())
    }

    fn strip_suffix<'a>(&self, text: &'a str) -> Option<&'a str> {
        if let Some(literal) = &self.literal {
            return text.strip_suffix(literal.as_str());
        }
        let mut characters = text.chars();
        for piece in self.pieces.iter().rev() {
            if !piece.accepts(characters.next_back()?) {
                return None;
            }
        }
        Some(characters.as_str())
    }

    /// What follows the segment's leftmost occurrence.
    fn skip_past<'a>(&self, text: &'a str) -> Option<&'a str> {
        if let Some(literal) = &self.literal {
            let at = text.find(literal.as_str())?;
            return text.get(at + literal.len()..);
        }
        text.char_indices().find_map(|(at, _)| self.strip_prefix(&text[at..]))
    }
}

impl Piece {
    fn folded(self, fold: bool) -> Self {
        match self {
            Self::Exactly(character) if fold => Self::Exactly(character.to_ascii_lowercase()),
            other => other,
        }
    }

    fn accepts(self, character: char) -> bool {
        match self {
            Self::AnyOne => true,
            Self::Exactly(expected) => character == expected,
        }
    }

    fn literal(self) -> Option<char> {
        match self {
            Self::Exactly(character) => Some(character),
            Self::AnyOne => None,
        }
    }

    fn write(self, text: &mut String) {
        match self {
            Self::AnyOne => text.push('_'),
            Self::Exactly(character) => {
                if matches!(character, '%' | '_' | '\\') {
                    text.push('\\');
                }
                text.push(character);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn like(text: &str, pattern: &str) -> bool {
        Pattern::compile(pattern, Some('\\'), false).expect("a sound pattern").matches(text)
    }

    #[test]
    fn wildcards_match_as_in_sql() {
        for (text, pattern) in [
            ("", ""),
            ("", "%"),
            ("abc", "abc"),
            ("abc", "a%"),
            ("abc", "%c"),
            ("abc", "_b_"),
            ("abc", "%_c"),
            ("abc", "a%%c"),
            ("aXbXc", "a%b%c"),
            ("héé", "h__"),
            ("héé", "%_é"),
            ("a%c", "a\\%c"),
            ("a_c", "a\\_c"),
            ("a\\c", "a\\\\c"),
            ("abab", "%ab"),
            ("xaybz", "%a_b%"),
        ] {
            assert!(like(text, pattern), "{text} {pattern}");
        }
        for (text, pattern) in [
            ("a", ""),
            ("", "_"),
            ("abc", "ab"),
            ("abc", "b%"),
            ("abc", "%b"),
            ("abc", "a\\%c"),
            ("ab", "ab%b"),
            ("aba", "ab%ba"),
            ("ABC", "abc"),
        ] {
            assert!(!like(text, pattern), "{text} {pattern}");
        }
    }

    #[test]
    fn ilike_folds_ascii_only() {
        let pattern = Pattern::compile("É%b", Some('\\'), true).expect("a sound pattern");
        assert!(pattern.matches("ÉaB"));
        assert!(!pattern.matches("éaB"));
    }

    #[test]
    fn another_escape_makes_backslash_plain() {
        let pattern = Pattern::compile("a!%\\", Some('!'), false).expect("a sound pattern");
        assert!(pattern.matches("a%\\"));
        assert_eq!(pattern.text(), "a\\%\\\\");
        let plain = Pattern::compile("a\\", None, false).expect("a sound pattern");
        assert!(plain.matches("a\\"));
    }

    #[test]
    fn bad_patterns_are_refused() {
        let fault = |pattern: &str| Pattern::compile(pattern, Some('\\'), false).err();
        assert_eq!(fault("a\\"), Some(PatternFault::DanglingEscape));
        assert_eq!(fault(&format!("%_{}%", "a".repeat(64))), Some(PatternFault::TooManyWildcards));
        assert_eq!(fault(&format!("_{}%", "a".repeat(64))), None);
    }
}
