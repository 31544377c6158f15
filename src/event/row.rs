//! A row image seen column by column, without decoding any value.
//!
//! Pure. The values are the raw JSON texts that Postgres rendered; numbers of any size pass through untouched.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use smallvec::SmallVec;

/// The columns of one image, in the order in which they were rendered.
#[derive(Debug, Default)]
pub struct Row<'a>(SmallVec<[(Cow<'a, str>, &'a RawValue); 12]>);

impl<'a> Row<'a> {
    /// Takes apart one JSON object.
    ///
    /// # Errors
    /// When the text is not a JSON object.
    pub fn parse(text: &'a str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// Names and raw values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &'a str)> {
        self.0.iter().map(|(name, value)| (name.as_ref(), value.get()))
    }

    /// The raw value of a column; None when the image lacks it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&'a str> {
        self.0.iter().find(|(column, _)| column == name).map(|(_, value)| value.get())
    }

    /// As [`Row::get`], trying the position first: two images of one table mostly agree on it.
    #[must_use]
    pub fn at(&self, index: usize, name: &str) -> Option<&'a str> {
        match self.0.get(index) {
            Some((column, value)) if column == name => Some(value.get()),
            _ => self.get(name),
        }
    }
}

impl<'de> serde::Deserialize<'de> for Row<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RowVisitor)
    }
}

struct RowVisitor;

impl<'de> Visitor<'de> for RowVisitor {
    type Value = Row<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a row as a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut columns = SmallVec::new();
        while let Some(Name(name)) = map.next_key()? {
            columns.push((name, map.next_value()?));
        }
        Ok(Row(columns))
    }
}

/// Borrows the name unless it has escapes; a plain `Cow` would always be owned.
struct Name<'a>(Cow<'a, str>);

impl<'de> serde::Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameVisitor;
        impl<'de> Visitor<'de> for NameVisitor {
            type Value = Name<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a column name")
            }
            fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Borrowed(name)))
            }
            fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(NameVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_keep_their_text() {
        let row = Row::parse(r#"{"id":12345678901234567890123,"a\"b":{"x": 1},"n":null}"#).unwrap();
        assert_eq!(row.get("id"), Some("12345678901234567890123"));
        assert_eq!(row.get("a\"b"), Some(r#"{"x": 1}"#));
        assert_eq!(row.get("n"), Some("null"));
        assert_eq!(row.get("missing"), None);
        assert_eq!(row.at(7, "n"), Some("null"));
    }

    #[test]
    fn what_is_not_an_object_is_refused() {
        assert!(Row::parse("[1]").is_err());
        assert!(Row::parse("{\"a\":").is_err());
    }
}
