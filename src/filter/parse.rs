//! Tokens to syntax: exactly the language of `where`, with Postgres's precedences.
//!
//! Precedence climbing over a handful of operators (PostgreSQL manual, "Operator Precedence"); like
//! there, comparisons do not chain. Every node knows the position to blame. Depth is bounded
//! while parsing, chains of `AND` and `OR` are flat, so that nothing that walks, prints or drops the
//! tree can run out of stack. Knows no columns and no types' rules.

use super::FilterError;
use super::lex::{self, Lexeme, Tok};
use super::syntax::{Comparison, Kind, MAX_DEPTH, Syntax, too_deep};
use super::typename;

/// Postgres's precedences, loosest first. A right operand is parsed one step tighter than its
/// operator.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Or,
    And,
    Not,
    Is,
    Compare,
    Match,
    Arrow,
    Cast,
}

impl Level {
    fn tighter(self) -> Self {
        match self {
            Self::Or => Self::And,
            Self::And => Self::Not,
            Self::Not => Self::Is,
            Self::Is => Self::Compare,
            Self::Compare => Self::Match,
            Self::Match => Self::Arrow,
            Self::Arrow | Self::Cast => Self::Cast,
        }
    }
}

/// Parses a whole condition.
pub(super) fn parse(text: &str) -> Result<Syntax, FilterError> {
    let mut parser = Parser { lexemes: lex::tokens(text)?, next: 0, depth: 0 };
    let syntax = parser.expression(Level::Or)?;
    match parser.peek() {
        Tok::End => Ok(syntax),
        _ => Err(parser.unexpected("AND, OR, a comparison or the end")),
    }
}

pub(super) struct Parser {
    lexemes: Vec<Lexeme>,
    next: usize,
    depth: u16,
}

/// What follows an operand, once `NOT` is taken off.
enum Infix {
    Or,
    And,
    Is,
    Compare(Comparison),
    In,
    Between,
    Like { fold: bool },
    Path { text: bool },
    Cast,
}

impl Infix {
    fn level(&self) -> Level {
        match self {
            Self::Or => Level::Or,
            Self::And => Level::And,
            Self::Is => Level::Is,
            Self::Compare(_) => Level::Compare,
            Self::In | Self::Between | Self::Like { .. } => Level::Match,
            Self::Path { .. } => Level::Arrow,
            Self::Cast => Level::Cast,
        }
    }
}

impl Parser {
    pub(super) fn peek(&self) -> &Tok {
        self.peek_at(0)
    }

    pub(super) fn peek_at(&self, ahead: usize) -> &Tok {
        let index = self.next + ahead;
        self.lexemes.get(index).map_or(&Tok::End, |lexeme| &lexeme.token)
    }

    pub(super) fn position(&self) -> usize {
        let lexeme = self.lexemes.get(self.next).or(self.lexemes.last());
        lexeme.map_or(1, |lexeme| lexeme.at)
    }

    pub(super) fn advance(&mut self, count: usize) {
        self.next += count;
    }

    pub(super) fn is_word(&self, ahead: usize, word: &str) -> bool {
        matches!(self.peek_at(ahead), Tok::Word(found) if found == word)
    }

    pub(super) fn take_word(&mut self, word: &str) -> bool {
        let found = self.is_word(0, word);
        self.advance(usize::from(found));
        found
    }

    fn take(&mut self, token: &Tok) -> bool {
        let found = self.peek() == token;
        self.advance(usize::from(found));
        found
    }

    fn expect(&mut self, token: &Tok, wanted: &str) -> Result<(), FilterError> {
        if self.take(token) { Ok(()) } else { Err(self.unexpected(wanted)) }
    }

    fn expect_word(&mut self, word: &str) -> Result<(), FilterError> {
        if self.take_word(word) { Ok(()) } else { Err(self.unexpected(&word.to_ascii_uppercase())) }
    }

    pub(super) fn unexpected(&self, wanted: &str) -> FilterError {
        let found = self.peek();
        let reason = match found {
            Tok::Foreign(_) => {
                format!("{} is not part of the language of conditions; expected {wanted}", found.describe())
            }
            _ => format!("found {}, expected {wanted}", found.describe()),
        };
        FilterError::new(self.position(), reason)
    }

    fn expression(&mut self, level: Level) -> Result<Syntax, FilterError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(too_deep(self.position()));
        }
        let mut left = self.prefix()?;
        // The level of the last operator where that one does not chain.
        let mut closed: Option<Level> = None;
        while let Some((infix, negated)) = self.peek_infix() {
            let here = infix.level();
            if here < level {
                break;
            }
            if closed == Some(here) {
                let reason = "comparisons do not chain; use AND, or parentheses";
                return Err(FilterError::new(self.position(), reason.to_owned()));
            }
            let chains = match infix {
                Infix::Compare(_) | Infix::In | Infix::Between | Infix::Like { .. } => false,
                Infix::Is => !self.is_distinct_test(),
                _ => true,
            };
            closed = (!chains).then_some(here);
            left = self.infix(left, &infix, negated)?;
        }
        self.depth -= 1;
        Ok(left)
    }

    fn is_distinct_test(&self) -> bool {
        self.is_word(1, "distinct") || self.is_word(1, "not") && self.is_word(2, "distinct")
    }

    /// The operator that stands next, and whether `NOT` is before it.
    fn peek_infix(&self) -> Option<(Infix, bool)> {
        let negated = self.is_word(0, "not");
        let infix = match self.peek_at(usize::from(negated)) {
            Tok::Word(word) => match word.as_str() {
                "in" => Infix::In,
                "between" => Infix::Between,
                "like" => Infix::Like { fold: false },
                "ilike" => Infix::Like { fold: true },
                "or" if !negated => Infix::Or,
                "and" if !negated => Infix::And,
                "is" if !negated => Infix::Is,
                _ => return None,
            },
            _ if negated => return None,
            Tok::Equal => Infix::Compare(Comparison::Equal),
            Tok::NotEqual => Infix::Compare(Comparison::NotEqual),
            Tok::Less => Infix::Compare(Comparison::Less),
            Tok::LessOrEqual => Infix::Compare(Comparison::LessOrEqual),
            Tok::Greater => Infix::Compare(Comparison::Greater),
            Tok::GreaterOrEqual => Infix::Compare(Comparison::GreaterOrEqual),
            Tok::Arrow => Infix::Path { text: false },
            Tok::LongArrow => Infix::Path { text: true },
            Tok::DoubleColon => Infix::Cast,
            _ => return None,
        };
        Some((infix, negated))
    }

    fn infix(&mut self, left: Syntax, infix: &Infix, negated: bool) -> Result<Syntax, FilterError> {
        let at = self.position();
        self.advance(1 + usize::from(negated));
        let tighter = infix.level().tighter();
        let syntax = match infix {
            Infix::Or => chain(at, left, self.expression(tighter)?, false),
            Infix::And => chain(at, left, self.expression(tighter)?, true),
            Infix::Is => self.is_test(at, left),
            Infix::Compare(comparison) => {
                let right = self.expression(tighter)?;
                Syntax::new(at, Kind::Compare(*comparison, Box::new(left), Box::new(right)))
            }
            Infix::In => self.in_list(at, left),
            Infix::Between => self.between(at, left),
            Infix::Like { fold } => self.like(at, left, *fold),
            Infix::Path { text } => {
                let key = self.expression(tighter)?;
                Syntax::new(at, Kind::Path { json: Box::new(left), key: Box::new(key), text: *text })
            }
            Infix::Cast => {
                let kind = typename::parse(self)?;
                Syntax::new(at, Kind::Cast(Box::new(left), kind))
            }
        }?;
        negate_if(negated, syntax)
    }

    /// After `IS`.
    fn is_test(&mut self, at: usize, left: Syntax) -> Result<Syntax, FilterError> {
        let negated = self.take_word("not");
        let kind = if self.take_word("null") {
            Kind::IsNull(Box::new(left))
        } else if self.take_word("true") {
            Kind::IsTruth(Box::new(left), Some(true))
        } else if self.take_word("false") {
            Kind::IsTruth(Box::new(left), Some(false))
        } else if self.take_word("unknown") {
            Kind::IsTruth(Box::new(left), None)
        } else if self.take_word("distinct") {
            self.expect_word("from")?;
            let right = self.expression(Level::Is.tighter())?;
            Kind::Distinct(Box::new(left), Box::new(right))
        } else {
            return Err(self.unexpected("NULL, DISTINCT FROM, TRUE, FALSE or UNKNOWN"));
        };
        negate_if(negated, Syntax::new(at, kind)?)
    }

    fn in_list(&mut self, at: usize, item: Syntax) -> Result<Syntax, FilterError> {
        self.expect(&Tok::Open, "a list in parentheses")?;
        let mut elements = Vec::new();
        loop {
            elements.push(self.expression(Level::Or)?);
            if !self.take(&Tok::Comma) {
                break;
            }
        }
        self.expect(&Tok::Close, "a comma or a closing parenthesis")?;
        Syntax::new(at, Kind::In(Box::new(item), elements))
    }

    fn between(&mut self, at: usize, item: Syntax) -> Result<Syntax, FilterError> {
        let symmetric = self.take_word("symmetric");
        if !symmetric {
            self.take_word("asymmetric");
        }
        let low = self.expression(Level::Match.tighter())?;
        self.expect_word("and")?;
        let high = self.expression(Level::Match.tighter())?;
        Syntax::new(at, Kind::Between { item: Box::new(item), low: Box::new(low), high: Box::new(high), symmetric })
    }

    fn like(&mut self, at: usize, item: Syntax, fold: bool) -> Result<Syntax, FilterError> {
        let pattern = self.expression(Level::Match.tighter())?;
        let escape =
            if self.take_word("escape") { Some(Box::new(self.expression(Level::Match.tighter())?)) } else { None };
        Syntax::new(at, Kind::Like { item: Box::new(item), pattern: Box::new(pattern), escape, fold })
    }

    fn prefix(&mut self) -> Result<Syntax, FilterError> {
        let at = self.position();
        match self.peek().clone() {
            Tok::Open => {
                self.advance(1);
                let inner = self.expression(Level::Or)?;
                if *self.peek() == Tok::Comma {
                    let reason = "rows of several values are not part of the language; compare each column";
                    return Err(FilterError::new(self.position(), reason.to_owned()));
                }
                self.expect(&Tok::Close, "a closing parenthesis")?;
                Ok(inner)
            }
            Tok::Number(digits) => {
                self.advance(1);
                Syntax::new(at, Kind::Number(digits))
            }
            Tok::Text(text) => {
                self.advance(1);
                Syntax::new(at, Kind::Text(text))
            }
            Tok::Minus => {
                self.advance(1);
                negative(at, self.expression(Level::Cast)?)
            }
            Tok::Plus => {
                self.advance(1);
                self.expression(Level::Cast)
            }
            Tok::Quoted(name) => {
                self.advance(1);
                self.column(at, name)
            }
            Tok::Word(word) => self.word(at, word),
            _ => Err(self.unexpected("a column, a literal, NOT or an opening parenthesis")),
        }
    }

    fn word(&mut self, at: usize, word: String) -> Result<Syntax, FilterError> {
        if word == "cast" {
            return self.cast(at);
        }
        if let Some(kind) = typename::before_literal(self)? {
            let literal = self.prefix()?;
            return Syntax::new(at, Kind::Cast(Box::new(literal), kind));
        }
        self.advance(1);
        match word.as_str() {
            "not" => {
                let inner = self.expression(Level::Not)?;
                Syntax::new(at, Kind::Not(Box::new(inner)))
            }
            "null" => Syntax::new(at, Kind::Null),
            "true" => Syntax::new(at, Kind::Bool(true)),
            "false" => Syntax::new(at, Kind::Bool(false)),
            _ if typename::is_reserved(&word) => Err(FilterError::new(
                at,
                format!("\"{word}\" is a reserved word of SQL; a column of this name is written in double quotes"),
            )),
            _ => self.column(at, word),
        }
    }

    fn cast(&mut self, at: usize) -> Result<Syntax, FilterError> {
        self.advance(1);
        self.expect(&Tok::Open, "an opening parenthesis")?;
        let inner = self.expression(Level::Or)?;
        self.expect_word("as")?;
        let kind = typename::parse(self)?;
        self.expect(&Tok::Close, "a closing parenthesis")?;
        Syntax::new(at, Kind::Cast(Box::new(inner), kind))
    }

    fn column(&self, at: usize, name: String) -> Result<Syntax, FilterError> {
        match self.peek() {
            Tok::Open => Err(FilterError::new(
                at,
                format!("functions such as {name}() are not part of the language; compare the column itself"),
            )),
            Tok::Foreign(symbol) if symbol == "." => {
                Err(FilterError::new(at, "a column is written without its table's name".to_owned()))
            }
            _ => Syntax::new(at, Kind::Column(name)),
        }
    }
}

fn negate_if(negated: bool, syntax: Syntax) -> Result<Syntax, FilterError> {
    if negated {
        let at = syntax.at;
        Syntax::new(at, Kind::Not(Box::new(syntax)))
    } else {
        Ok(syntax)
    }
}

/// `left AND right` or `left OR right`, as one flat node.
fn chain(at: usize, left: Syntax, right: Syntax, and: bool) -> Result<Syntax, FilterError> {
    let mut parts = match left {
        Syntax { kind: Kind::And(parts), .. } if and => parts,
        Syntax { kind: Kind::Or(parts), .. } if !and => parts,
        left => vec![left],
    };
    parts.push(right);
    Syntax::new(at, if and { Kind::And(parts) } else { Kind::Or(parts) })
}

/// A sign directly before a number belongs to it, so that the least integer can be written.
fn negative(at: usize, inner: Syntax) -> Result<Syntax, FilterError> {
    let kind = match inner {
        Syntax { kind: Kind::Number(digits), .. } => Kind::Number(match digits.strip_prefix('-') {
            Some(positive) => positive.to_owned(),
            None => format!("-{digits}"),
        }),
        inner => Kind::Negated(Box::new(inner)),
    };
    Syntax::new(at, kind)
}
