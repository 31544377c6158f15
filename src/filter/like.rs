//! `LIKE` and `ILIKE` patterns, compiled once.
//!
//! A pattern is cut at its `%` into segments; segments are then found from left to right, which
//! needs no backtracking. Segments are looked for by their longest run of characters, at the speed
//! of memory where that is rare; for those with `_` the length is bounded, so that no pattern makes
//! a row cost more than a bounded multiple of its size.

use std::borrow::Cow;

use memchr::memmem;

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
    /// Else its longest run of characters, and how many pieces stand before it.
    run: (usize, String),
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
            if segment.literal.is_none() {
                segment.run = longest_run(&segment.pieces);
            }
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
        if self.fold { self.matches_folded(&folded(Cow::Borrowed(text))) } else { self.matches_folded(text) }
    }

    /// How often a text of the greatest cost is read through.
    pub(super) fn passes(&self) -> usize {
        let floating = self.segments.get(1..self.segments.len().saturating_sub(1)).unwrap_or_default();
        let wild = floating.iter().filter(|segment| segment.literal.is_none()).map(|segment| segment.pieces.len());
        if floating.is_empty() { 0 } else { wild.max().unwrap_or(1).max(1) }
    }

    /// As [`Pattern::matches`], of a text that [`folded`] gave if the pattern folds.
    pub(super) fn matches_folded(&self, text: &str) -> bool {
        let Some((first, others)) = self.segments.split_first() else {
            return text.is_empty();
        };
        let Some(rest) = first.strip_prefix(text) else {
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
            let at = memmem::find(text.as_bytes(), literal.as_bytes())?;
            return text.get(at + literal.len()..);
        }
        let (before, run) = &self.run;
        if run.is_empty() {
            return self.strip_prefix(text);
        }
        let finder = memmem::Finder::new(run.as_bytes());
        // The segment begins `before` characters ahead of its run, so the leftmost run that fits is that of the
        // leftmost occurrence.
        let mut from = 0;
        loop {
            let at = from + finder.find(text.as_bytes().get(from..)?)?;
            let start = text.get(..at)?.char_indices().rev().nth(before.saturating_sub(1)).map(|(start, _)| start);
            let start = if *before == 0 { Some(at) } else { start };
            if let Some(rest) = start.and_then(|start| self.strip_prefix(text.get(start..)?)) {
                return Some(rest);
            }
            from = at + text.get(at..)?.chars().next().map_or(1, char::len_utf8);
        }
    }
}

/// The text with its ASCII letters in lower case, as `ILIKE` in collation "C" compares it.
pub(super) fn folded(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) { Cow::Owned(text.to_ascii_lowercase()) } else { text }
}

fn longest_run(pieces: &[Piece]) -> (usize, String) {
    let mut longest = (0, String::new());
    let mut before = 0;
    for part in pieces.split(|piece| *piece == Piece::AnyOne) {
        let run: String = part.iter().filter_map(|piece| piece.literal()).collect();
        if run.len() > longest.1.len() {
            longest = (before, run);
        }
        before += part.len() + 1;
    }
    longest
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

    /// Segments with `_` are looked for by their runs: against the plainest matcher there is.
    #[test]
    fn every_short_pattern_matches_every_short_text_as_a_naive_matcher_says() {
        fn naive(text: &[char], pattern: &[char]) -> bool {
            match pattern.split_first() {
                None => text.is_empty(),
                Some(('%', rest)) => (0..=text.len()).any(|at| naive(&text[at..], rest)),
                Some((piece, rest)) => {
                    text.first().is_some_and(|first| *piece == '_' || first == piece) && naive(&text[1..], rest)
                }
            }
        }
        fn words(alphabet: &[char], length: usize) -> Vec<Vec<char>> {
            let mut all = vec![Vec::new()];
            let mut last = all.clone();
            for _ in 0..length {
                let longer = |word: &Vec<char>, letter: &char| word.iter().chain([letter]).copied().collect();
                last = last.iter().flat_map(|word| alphabet.iter().map(move |letter| longer(word, letter))).collect();
                all.extend(last.iter().cloned());
            }
            all
        }
        let texts = words(&['a', 'é'], 6);
        for pattern in words(&['a', 'é', '_', '%'], 5) {
            let compiled = Pattern::compile(&pattern.iter().collect::<String>(), None, false).expect("a sound pattern");
            for text in &texts {
                let (whole, wanted) = (text.iter().collect::<String>(), naive(text, &pattern));
                assert_eq!(compiled.matches(&whole), wanted, "{whole:?} {pattern:?}");
            }
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
