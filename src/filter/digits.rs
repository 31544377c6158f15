//! Numbers as only Postgres 16 and later read them: `0x1f`, `0o17`, `0b101`, `1_000`.
//!
//! Texts come without a sign. An underscore stands between two digits, or between a base's prefix and its first digit.

use super::value::Fault;

/// Whether the text is not in plain decimal notation.
pub(super) fn is_written_otherwise(text: &str) -> bool {
    base(text).is_some() || text.contains('_')
}

/// A whole number. Above 128 bits it is out of range.
pub(super) fn read_integer(text: &str) -> Result<u128, Fault> {
    let (radix, digits) = base(text).unwrap_or((10, text));
    let mut value: u128 = 0;
    // A prefix may be followed by an underscore, a number may not begin with one.
    let mut after_digit = radix != 10;
    let mut ended = false;
    for character in digits.chars() {
        if character == '_' {
            if !after_digit {
                return Err(Fault::Syntax);
            }
            (after_digit, ended) = (false, false);
            continue;
        }
        let digit = character.to_digit(radix).ok_or(Fault::Syntax)?;
        value =
            value.checked_mul(radix.into()).and_then(|value| value.checked_add(digit.into())).ok_or(Fault::Range)?;
        (after_digit, ended) = (true, true);
    }
    if ended { Ok(value) } else { Err(Fault::Syntax) }
}

/// A number of any kind, in plain decimal notation.
pub(super) fn plain_numeric(text: &str) -> Result<String, Fault> {
    if base(text).is_some() {
        return read_integer(text).map(|value| value.to_string());
    }
    let bytes = text.as_bytes();
    let is_digit = |index: Option<usize>| index.and_then(|index| bytes.get(index)).is_some_and(u8::is_ascii_digit);
    let between_digits = |at: usize| bytes[at] != b'_' || is_digit(at.checked_sub(1)) && is_digit(Some(at + 1));
    if !(0..bytes.len()).all(between_digits) {
        return Err(Fault::Syntax);
    }
    Ok(text.replace('_', ""))
}

/// The base that a prefix names, and what follows it.
fn base(text: &str) -> Option<(u32, &str)> {
    let (prefix, digits) = text.split_at_checked(2)?;
    match prefix {
        "0x" | "0X" => Some((16, digits)),
        "0o" | "0O" => Some((8, digits)),
        "0b" | "0B" => Some((2, digits)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_in_every_base_and_grouping() {
        for (text, value) in
            [("0x1f", 31), ("0X_1F", 31), ("0o17", 15), ("0b101", 5), ("1_000", 1_000), ("1_0_0", 100), ("0x1_f", 31)]
        {
            assert!(is_written_otherwise(text), "{text}");
            assert_eq!(read_integer(text), Ok(value), "{text}");
            assert_eq!(plain_numeric(text), Ok(value.to_string()), "{text}");
        }
        assert_eq!(plain_numeric("1_0.5_0e1_0").as_deref(), Ok("10.50e10"));
        assert_eq!(read_integer("0xffffffffffffffffffffffffffffffff0"), Err(Fault::Range));
    }

    #[test]
    fn an_underscore_stands_between_digits_only() {
        for text in ["_1", "1_", "1__0", "0x", "0x_", "0xg", "0b2", "0x1_", "1_x", "0_x1"] {
            assert_eq!(read_integer(text), Err(Fault::Syntax), "{text}");
        }
        for text in ["_1", "1_", "1__0", "1_.5", "1._5", "1e_5", "1_e5"] {
            assert_eq!(plain_numeric(text), Err(Fault::Syntax), "{text}");
        }
    }
}
