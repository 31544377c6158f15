//! The query of a request, read strictly: what cannot be decoded, comes twice or has no meaning is refused by name.
//!
//! The query of an event stream is its subscription. A second `where` or a misspelt one that was passed over would show
//! more than was asked for, and nobody would notice.

use axum::http::StatusCode;

use crate::http::problem::Problem;
use crate::protocol::error::ErrorCode;

/// Characters of a client's text that an error repeats.
const SHOWN_CHARS: usize = 40;

/// Parameters and their values, decoded, in their order.
#[derive(Debug, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Decodes `application/x-www-form-urlencoded` text.
    ///
    /// # Errors
    /// 400 for a `%` without two hexadecimal digits behind it, and for bytes that are not UTF-8.
    pub fn read(raw: Option<&str>) -> Result<Self, Problem> {
        let mut pairs = Vec::new();
        for pair in raw.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = decode(name).map_err(|why| bad(format!("the parameter {}: {why}", shown(name))))?;
            let value = decode(value).map_err(|why| bad(format!("the value of {}: {why}", shown(&name))))?;
            pairs.push((name, value));
        }
        Ok(Self(pairs))
    }

    /// The same without one parameter.
    #[must_use]
    pub fn without(mut self, unwanted: &str) -> Self {
        self.0.retain(|(name, _)| name != unwanted);
        self
    }

    /// The names, in their order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Every value of a parameter that may be repeated.
    #[must_use]
    pub fn all(&self, wanted: &str) -> Vec<String> {
        self.0.iter().filter(|(name, _)| name == wanted).map(|(_, value)| value.clone()).collect()
    }

    /// The value of a parameter that may come once.
    ///
    /// # Errors
    /// 400 when it comes again.
    pub fn one(&self, wanted: &str) -> Result<Option<&str>, Problem> {
        let mut values = self.0.iter().filter(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
        let first = values.next();
        match values.next() {
            None => Ok(first),
            Some(_) => Err(bad(format!("the parameter {wanted} comes more than once: give it once"))),
        }
    }

    /// Refuses every parameter but these.
    ///
    /// # Errors
    /// 400 with the name of the first other one.
    pub fn only(&self, known: &[&str]) -> Result<(), Problem> {
        match self.names().find(|name| !known.contains(name)) {
            None => Ok(()),
            Some(name) => {
                Err(bad(format!("there is no parameter {}: this resource takes {}", shown(name), known.join(", "))))
            }
        }
    }
}

fn bad(what: String) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, ErrorCode::BadMessage, what)
}

/// Enough of a text to find it again.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(SHOWN_CHARS).collect();
    format!("{short:?}")
}

fn decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
                match (digit(), digit()) {
                    (Some(high), Some(low)) => (high * 16 + low) as u8,
                    _ => return Err("a % stands for two hexadecimal digits: write % itself as %25"),
                }
            }
            other => other,
        });
    }
    String::from_utf8(bytes).map_err(|_| "its bytes are not UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_decoded_as_forms_are() {
        let query = Query::read(Some("table=a.b&&where=n+%3D+%27%C3%A4%25%27&flag&empty=&a%3Db=c=d")).unwrap();
        let want = [("table", "a.b"), ("where", "n = 'ä%'"), ("flag", ""), ("empty", ""), ("a=b", "c=d")];
        assert_eq!(query.0, want.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert!(Query::read(None).unwrap().0.is_empty());
    }

    #[test]
    fn what_cannot_be_decoded_is_refused() {
        for text in ["where=%", "where=%2", "where=%zz", "where=%+1", "where=%ff", "%c3=1", "where=%c3%28"] {
            assert!(Query::read(Some(text)).is_err(), "{text}");
        }
    }
}
