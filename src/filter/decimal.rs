//! Exact decimals of any size, compared where they lie.
//!
//! A [`Decimal`] borrows the digits of the text it was read from: comparing a `numeric` column
//! with a constant allocates nothing, and an exponent costs nothing however large it is, since
//! numbers are compared by magnitude and digits and are never expanded. Limits are those of
//! Postgres's `numeric`.

use std::cmp::Ordering;

use super::value::Fault;

/// Digits before the decimal point that Postgres's `numeric` can hold.
const MAX_INTEGER_DIGITS: i64 = 131_072;
/// Digits after the decimal point that Postgres's `numeric` can hold.
const MAX_SCALE: i64 = 16_383;
/// An exponent beyond this is out of range whatever the digits are: the text of a number is
/// itself bounded by a row's size, far below this.
const MAX_EXPONENT: i64 = 1_000_000_000;

/// Declared in Postgres's order: everything finite lies between the infinities, NaN above all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    NegativeInfinity,
    Negative,
    Zero,
    Positive,
    PositiveInfinity,
    NaN,
}

/// `0.d₁d₂d₃… × 10^magnitude` with `d₁ ≠ 0` and no trailing zeros; the digits are `lead` followed
/// by `tail`. Equal numbers have equal parts whatever their scale was.
#[derive(Clone, Copy, Debug)]
pub(super) struct Decimal<'a> {
    class: Class,
    lead: &'a [u8],
    tail: &'a [u8],
    magnitude: i64,
}

/// A decimal that owns its digits.
#[derive(Clone, Debug)]
pub(super) struct OwnedDecimal {
    class: Class,
    digits: Box<[u8]>,
    magnitude: i64,
}

impl<'a> Decimal<'a> {
    const fn special(class: Class) -> Self {
        Self { class, lead: &[], tail: &[], magnitude: 0 }
    }

    /// Reads what Postgres's `numeric_in` reads, without surrounding blanks.
    pub(super) fn parse(text: &'a str) -> Result<Self, Fault> {
        let bytes = text.as_bytes();
        let (negative, body) = match bytes {
            [b'-', rest @ ..] => (true, rest),
            [b'+', rest @ ..] => (false, rest),
            _ => (false, bytes),
        };
        if !matches!(body.first(), Some(b'0'..=b'9' | b'.')) {
            return Self::parse_special(text, body, negative);
        }
        let whole_len = count_digits(body);
        let (whole, rest) = body.split_at(whole_len);
        let (fraction, rest) = match rest {
            [b'.', rest @ ..] => rest.split_at(count_digits(rest)),
            _ => (&rest[..0], rest),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(Fault::Syntax);
        }
        let exponent = match rest {
            [] => 0,
            [b'e' | b'E', rest @ ..] => parse_exponent(rest)?,
            _ => return Err(Fault::Syntax),
        };
        Self::from_parts(negative, whole, fraction, exponent)
    }

    fn parse_special(text: &str, body: &[u8], negative: bool) -> Result<Self, Fault> {
        if text.eq_ignore_ascii_case("nan") {
            return Ok(Self::special(Class::NaN));
        }
        if body.eq_ignore_ascii_case(b"infinity") || body.eq_ignore_ascii_case(b"inf") {
            return Ok(Self::special(if negative { Class::NegativeInfinity } else { Class::PositiveInfinity }));
        }
        Err(Fault::Syntax)
    }

    fn from_parts(negative: bool, whole: &'a [u8], fraction: &'a [u8], exponent: i64) -> Result<Self, Fault> {
        if length(fraction) - exponent > MAX_SCALE {
            return Err(Fault::Range);
        }
        let whole = trim_leading_zeros(whole);
        let (lead, tail, magnitude) = if whole.is_empty() {
            let significant = trim_leading_zeros(fraction);
            let zeros = length(fraction) - length(significant);
            (significant, &fraction[..0], exponent - zeros)
        } else {
            (whole, fraction, exponent + length(whole))
        };
        let tail = trim_trailing_zeros(tail);
        let lead = if tail.is_empty() { trim_trailing_zeros(lead) } else { lead };
        if lead.is_empty() {
            return Ok(Self::special(Class::Zero));
        }
        if magnitude > MAX_INTEGER_DIGITS {
            return Err(Fault::Range);
        }
        Ok(Self { class: if negative { Class::Negative } else { Class::Positive }, lead, tail, magnitude })
    }

    /// An integer as a decimal; `buffer` holds its digits.
    pub(super) fn of_int(value: i64, buffer: &'a mut [u8; 20]) -> Self {
        let mut rest = value.unsigned_abs();
        let mut start = buffer.len();
        while rest > 0 {
            start -= 1;
            buffer[start] = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        let digits = &buffer[start..];
        if digits.is_empty() {
            return Self::special(Class::Zero);
        }
        Self {
            class: if value < 0 { Class::Negative } else { Class::Positive },
            magnitude: length(digits),
            lead: trim_trailing_zeros(digits),
            tail: &[],
        }
    }

    /// Postgres's order of `numeric`: NaN equals NaN and is above everything.
    pub(super) fn compare(&self, other: &Self) -> Ordering {
        let by_size = || self.magnitude.cmp(&other.magnitude).then_with(|| self.digits().cmp(other.digits()));
        match self.class.cmp(&other.class) {
            Ordering::Equal => match self.class {
                Class::Positive => by_size(),
                Class::Negative => by_size().reverse(),
                _ => Ordering::Equal,
            },
            unequal => unequal,
        }
    }

    /// The nearest double; like Postgres, refuses what would overflow or vanish.
    pub(super) fn to_f64(self) -> Result<f64, Fault> {
        self.to_float(|text| text.parse().ok(), f64::NAN, f64::INFINITY, |value| value.is_finite() && *value != 0.0)
    }

    /// The nearest single, under the same rules.
    pub(super) fn to_f32(self) -> Result<f32, Fault> {
        self.to_float(|text| text.parse().ok(), f32::NAN, f32::INFINITY, |value| value.is_finite() && *value != 0.0)
    }

    fn to_float<F>(
        self,
        read: impl FnOnce(&str) -> Option<F>,
        nan: F,
        infinity: F,
        sound: impl FnOnce(&F) -> bool,
    ) -> Result<F, Fault>
    where
        F: std::ops::Neg<Output = F> + Default,
    {
        match self.class {
            Class::NaN => Ok(nan),
            Class::PositiveInfinity => Ok(infinity),
            Class::NegativeInfinity => Ok(-infinity),
            Class::Zero => Ok(F::default()),
            Class::Positive | Class::Negative => {
                let value = read(&self.scientific()).ok_or(Fault::Range)?;
                if sound(&value) { Ok(value) } else { Err(Fault::Range) }
            }
        }
    }

    /// The nearest integer, halves away from zero, as Postgres casts `numeric` to integers.
    pub(super) fn to_i64(self) -> Result<i64, Fault> {
        match self.class {
            Class::Zero => return Ok(0),
            Class::Positive | Class::Negative => {}
            _ => return Err(Fault::Range),
        }
        // More than 19 digits before the point cannot fit; none and no leading half is zero.
        if self.magnitude > 19 {
            return Err(Fault::Range);
        }
        if self.magnitude < 0 {
            return Ok(0);
        }
        let mut digits = self.digits();
        let mut total: i128 = 0;
        for _ in 0..self.magnitude {
            total = total * 10 + i128::from(digits.next().map_or(0, |digit| digit - b'0'));
        }
        if digits.next().is_some_and(|digit| digit >= b'5') {
            total += 1;
        }
        if self.class == Class::Negative {
            total = -total;
        }
        i64::try_from(total).map_err(|_| Fault::Range)
    }

    pub(super) fn to_owned(self) -> OwnedDecimal {
        OwnedDecimal { class: self.class, digits: self.digits().collect(), magnitude: self.magnitude }
    }

    /// Equal numbers, and only those, write equal bytes.
    pub(super) fn write_key(&self, mut push: impl FnMut(&[u8])) {
        push(&[self.class as u8]);
        push(&self.magnitude.to_be_bytes());
        push(self.lead);
        push(self.tail);
    }

    /// One text for each number: `-0.15e3`.
    pub(super) fn scientific(self) -> String {
        let sign = match self.class {
            Class::NaN => return "NaN".to_owned(),
            Class::PositiveInfinity => return "Infinity".to_owned(),
            Class::NegativeInfinity => return "-Infinity".to_owned(),
            Class::Zero => return "0".to_owned(),
            Class::Positive => "",
            Class::Negative => "-",
        };
        let digits: String = self.digits().map(char::from).collect();
        format!("{sign}0.{digits}e{}", self.magnitude)
    }

    fn digits(&self) -> impl Iterator<Item = u8> + use<'a> {
        self.lead.iter().chain(self.tail).copied()
    }
}

impl OwnedDecimal {
    pub(super) fn view(&self) -> Decimal<'_> {
        Decimal { class: self.class, lead: &self.digits, tail: &[], magnitude: self.magnitude }
    }

    pub(super) fn negated(mut self) -> Self {
        self.class = match self.class {
            Class::NegativeInfinity => Class::PositiveInfinity,
            Class::Negative => Class::Positive,
            Class::Positive => Class::Negative,
            Class::PositiveInfinity => Class::NegativeInfinity,
            same => same,
        };
        self
    }
}

fn parse_exponent(text: &[u8]) -> Result<i64, Fault> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        _ => (false, text),
    };
    if digits.is_empty() || count_digits(digits) != digits.len() {
        return Err(Fault::Syntax);
    }
    let mut exponent: i64 = 0;
    for digit in digits {
        exponent = exponent * 10 + i64::from(digit - b'0');
        if exponent > MAX_EXPONENT {
            return Err(Fault::Range);
        }
    }
    Ok(if negative { -exponent } else { exponent })
}

fn count_digits(text: &[u8]) -> usize {
    text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len())
}

fn trim_leading_zeros(digits: &[u8]) -> &[u8] {
    let start = digits.iter().position(|digit| *digit != b'0').unwrap_or(digits.len());
    &digits[start..]
}

fn trim_trailing_zeros(digits: &[u8]) -> &[u8] {
    let end = digits.iter().rposition(|digit| *digit != b'0').map_or(0, |last| last + 1);
    &digits[..end]
}

fn length(digits: &[u8]) -> i64 {
    i64::try_from(digits.len()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(left: &str, right: &str) -> Ordering {
        let left = Decimal::parse(left).expect("left is a number");
        let right = Decimal::parse(right).expect("right is a number");
        left.compare(&right)
    }

    #[test]
    fn scale_and_notation_do_not_matter() {
        for (left, right) in [
            ("1.50", "1.5"),
            ("0", "-0.000"),
            ("1e3", "1000"),
            ("0.00012", "12e-5"),
            (".5", "0.5"),
            ("5.", "5"),
            ("NaN", "nan"),
            ("inf", "Infinity"),
        ] {
            assert_eq!(order(left, right), Ordering::Equal, "{left} {right}");
        }
    }

    #[test]
    fn order_is_that_of_postgres() {
        let ascending = [
            "-Infinity",
            "-1e100",
            "-10.5",
            "-10.25",
            "-0.001",
            "0",
            "1e-20",
            "0.5",
            "0.55",
            "5",
            "10",
            "99",
            "100.0001",
            "1e100",
            "Infinity",
            "NaN",
        ];
        for pair in ascending.windows(2) {
            assert_eq!(order(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(order(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
    }

    #[test]
    fn hostile_exponents_are_refused_at_no_cost() {
        for text in ["1e1000000", "1e99999999999999999999", "1e-20000", "1e131072"] {
            assert!(Decimal::parse(text).is_err(), "{text}");
        }
        assert!(Decimal::parse("1e131071").is_ok());
    }

    #[test]
    fn malformed_numbers_are_refused() {
        for text in ["", "-", ".", "e5", "1e", "1e+", "1x", "1..2", "--1", "-NaN", "0x10", "1_000"] {
            assert!(Decimal::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn integers_become_the_same_decimals_as_their_text() {
        for value in [0, 1, -1, 10, 1000, i64::MAX, i64::MIN] {
            let mut buffer = [0; 20];
            let text = value.to_string();
            let read = Decimal::parse(&text).expect("an integer is a number");
            assert_eq!(Decimal::of_int(value, &mut buffer).compare(&read), Ordering::Equal);
            assert_eq!(read.to_i64().ok(), Some(value));
        }
    }

    #[test]
    fn rounding_to_integers_goes_away_from_zero() {
        for (text, rounded) in [("0.5", 1), ("-0.5", -1), ("0.49", 0), ("2.5", 3), ("0.05", 0), ("1e-9", 0)] {
            assert_eq!(Decimal::parse(text).and_then(Decimal::to_i64).ok(), Some(rounded), "{text}");
        }
    }
}
