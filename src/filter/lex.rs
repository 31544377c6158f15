//! The text of a condition cut into tokens with their positions.
//!
//! Stands on sqlparser's tokenizer with the Postgres dialect. Only the tokenizer is used: the
//! crate's parser stops silently at what it does not know, recurses deeply and follows other
//! precedences, while this language is small enough to be parsed exactly (`parse`).

use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::tokenizer::{Location, Token, Tokenizer};

use super::FilterError;

/// A token with the position of its first character, counted from 1.
#[derive(Clone, Debug)]
pub(super) struct Lexeme {
    pub(super) at: usize,
    pub(super) token: Tok,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Tok {
    /// An unquoted word, folded to lower case as Postgres folds: ASCII only.
    Word(String),
    /// A quoted identifier, verbatim.
    Quoted(String),
    Number(String),
    Text(String),
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Arrow,
    LongArrow,
    Plus,
    Minus,
    DoubleColon,
    Open,
    Close,
    Comma,
    /// Anything that the language does not have, as it was written.
    Foreign(String),
    End,
}

impl Tok {
    /// How messages name the token.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Word(word) | Self::Number(word) | Self::Foreign(word) => format!("\"{word}\""),
            Self::Quoted(name) => format!("identifier \"{name}\""),
            Self::Text(_) => "a string".to_owned(),
            Self::End => "the end of the text".to_owned(),
            other => format!("\"{}\"", other.symbol()),
        }
    }

    fn symbol(&self) -> &'static str {
        match self {
            Self::Equal => "=",
            Self::NotEqual => "<>",
            Self::Less => "<",
            Self::LessOrEqual => "<=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
            Self::Arrow => "->",
            Self::LongArrow => "->>",
            Self::Plus => "+",
            Self::Minus => "-",
            Self::DoubleColon => "::",
            Self::Open => "(",
            Self::Close => ")",
            Self::Comma => ",",
            _ => "?",
        }
    }
}

/// All tokens of `text`, without blanks and comments, with [`Tok::End`] as the last.
pub(super) fn tokens(text: &str) -> Result<Vec<Lexeme>, FilterError> {
    let lines = Lines::of(text);
    let spanned = Tokenizer::new(&PostgreSqlDialect {}, text)
        .tokenize_with_location()
        .map_err(|error| FilterError::new(lines.position(error.location), error.message))?;
    let mut lexemes = Vec::with_capacity(spanned.len() + 1);
    for spanned in spanned {
        let at = lines.position(spanned.span.start);
        match spanned.token {
            Token::Whitespace(_) | Token::EOF => {}
            Token::CustomBinaryOperator(symbols) => push_operators(&symbols, at, &mut lexemes),
            token => lexemes.push(Lexeme { at, token: translate(token) }),
        }
    }
    lexemes.push(Lexeme { at: text.chars().count() + 1, token: Tok::End });
    Ok(lexemes)
}

fn translate(token: Token) -> Tok {
    match token {
        Token::Word(word) => match word.quote_style {
            Some(_) => Tok::Quoted(word.value),
            None => Tok::Word(word.value.to_ascii_lowercase()),
        },
        Token::Number(digits, false) => Tok::Number(digits),
        Token::SingleQuotedString(text) | Token::EscapedStringLiteral(text) => Tok::Text(text),
        Token::Eq => Tok::Equal,
        Token::Neq => Tok::NotEqual,
        Token::Lt => Tok::Less,
        Token::LtEq => Tok::LessOrEqual,
        Token::Gt => Tok::Greater,
        Token::GtEq => Tok::GreaterOrEqual,
        Token::Arrow => Tok::Arrow,
        Token::LongArrow => Tok::LongArrow,
        Token::Plus => Tok::Plus,
        Token::Minus => Tok::Minus,
        Token::DoubleColon => Tok::DoubleColon,
        Token::LParen => Tok::Open,
        Token::RParen => Tok::Close,
        Token::Comma => Tok::Comma,
        other => Tok::Foreign(other.to_string()),
    }
}

/// The tokenizer runs operators and signs together (`<>-1` becomes `<>-`). Postgres's rule: an
/// operator ends in a sign only if it has one of the symbols below in it; here `!=` is spared.
/// Source: PostgreSQL manual, "Operators" in "Lexical Structure".
fn push_operators(symbols: &str, at: usize, lexemes: &mut Vec<Lexeme>) {
    let keeps_sign = symbols.contains(['~', '!', '@', '#', '%', '^', '&', '|', '`', '?']);
    let operator = if keeps_sign { symbols } else { symbols.trim_end_matches(['+', '-']) };
    let mut offset = 0;
    if !operator.is_empty() {
        offset = operator.len();
        lexemes.push(Lexeme { at, token: operator_token(operator) });
    }
    for (index, sign) in symbols.bytes().enumerate().skip(offset) {
        lexemes.push(Lexeme { at: at + index, token: if sign == b'-' { Tok::Minus } else { Tok::Plus } });
    }
}

fn operator_token(operator: &str) -> Tok {
    match operator {
        "=" => Tok::Equal,
        "<>" | "!=" => Tok::NotEqual,
        "<" => Tok::Less,
        "<=" => Tok::LessOrEqual,
        ">" => Tok::Greater,
        ">=" => Tok::GreaterOrEqual,
        "->" => Tok::Arrow,
        "->>" => Tok::LongArrow,
        other => Tok::Foreign(other.to_owned()),
    }
}

/// Turns the tokenizer's lines and columns into one count of characters.
struct Lines {
    /// Characters before each line.
    starts: Vec<usize>,
}

impl Lines {
    fn of(text: &str) -> Self {
        let after_breaks =
            text.chars().enumerate().filter(|(_, character)| *character == '\n').map(|(index, _)| index + 1);
        Self { starts: std::iter::once(0).chain(after_breaks).collect() }
    }

    fn position(&self, location: Location) -> usize {
        let line = usize::try_from(location.line).unwrap_or(1).saturating_sub(1);
        let column = usize::try_from(location.column).unwrap_or(1).max(1);
        self.starts.get(line).copied().unwrap_or(0) + column
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<(usize, Tok)> {
        tokens(text).expect("a text of sound tokens").into_iter().map(|lexeme| (lexeme.at, lexeme.token)).collect()
    }

    #[test]
    fn signs_part_from_operators_as_in_postgres() {
        for operator in ["=", "<>", "<", "<=", ">", ">=", "->", "->>"] {
            let cut = cut(&format!("a{operator}-1"));
            assert_eq!(cut[1], (2, operator_token(operator)), "{operator}");
            assert_eq!(cut[2], (2 + operator.len(), Tok::Minus), "{operator}");
            assert_eq!(cut[3].1, Tok::Number("1".into()), "{operator}");
        }
    }

    #[test]
    fn positions_count_characters_over_lines() {
        let cut = cut("é =\n  'ü' -- end");
        let places: Vec<_> = cut.iter().map(|(at, _)| *at).collect();
        assert_eq!(places, [1, 3, 7, 17]);
    }

    #[test]
    fn words_fold_and_quoted_names_do_not() {
        assert_eq!(cut("AbÉ")[0].1, Tok::Word("abÉ".into()));
        assert_eq!(cut("\"A\"\"b\"")[0].1, Tok::Quoted("A\"b".into()));
    }

    #[test]
    fn an_unfinished_string_is_refused_where_it_begins() {
        let error = tokens("a = 'x").expect_err("an open string");
        assert_eq!(error.position, 5);
    }
}
