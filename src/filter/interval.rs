//! Intervals, reduced to what Postgres compares: one number of microseconds, with days of 24
//! hours and months of 30 days.
//!
//! Reads ISO 8601 (`P1Y2M3DT4H5M6.5S`, each part with its own sign), which is what rows carry, and
//! of Postgres's other forms the plain one (`1.5 days 2 hours`, `-3 mons`, `04:05:06`). Fractions
//! have at most six digits, and of a year only the quarters are read: what is left of another one
//! differs between versions.

use super::moment;
use super::server::Server;
use super::value::Fault;

const MICROS_PER_SECOND: i128 = 1_000_000;
const MICROS_PER_DAY: i128 = 86_400 * MICROS_PER_SECOND;
const DAYS_PER_MONTH: i128 = 30;
/// An amount's fraction is in millionths. A second's are microseconds.
const FRACTION: i128 = MICROS_PER_SECOND;
/// `infinity` and `-infinity`, beyond every finite length.
const INFINITY: i128 = i128::MAX;
const MINUS_INFINITY: i128 = i128::MIN;
/// Postgres counts months and days in 32 bits; more digits than this cannot be in range.
const MAX_DIGITS: usize = 10;

/// Months, days and microseconds, as Postgres stores them.
#[derive(Default)]
struct Parts {
    months: i128,
    days: i128,
    micros: i128,
}

impl Parts {
    fn total(&self) -> Result<i128, Fault> {
        let fits = i32::try_from(self.months).is_ok()
            && i32::try_from(self.days).is_ok()
            && i64::try_from(self.micros).is_ok();
        if !fits {
            return Err(Fault::Range);
        }
        Ok((self.months * DAYS_PER_MONTH + self.days) * MICROS_PER_DAY + self.micros)
    }

    fn add(&mut self, amount: Amount, unit: Unit) -> Result<(), Fault> {
        let Amount { whole, fraction } = amount;
        match unit {
            Unit::Years if fraction * 12 % FRACTION != 0 => return Err(Fault::Syntax),
            Unit::Years => self.months += whole * 12 + fraction * 12 / FRACTION,
            Unit::Months => {
                self.months += whole;
                self.add_days(fraction * DAYS_PER_MONTH);
            }
            Unit::Weeks => {
                self.days += whole * 7;
                self.add_days(fraction * 7);
            }
            Unit::Days => {
                self.days += whole;
                self.add_days(fraction);
            }
            Unit::Hours => self.micros += (whole * FRACTION + fraction) * 3600,
            Unit::Minutes => self.micros += (whole * FRACTION + fraction) * 60,
            Unit::Seconds => self.micros += whole * FRACTION + fraction,
        }
        Ok(())
    }

    /// Millionths of days: whole days, and the rest in hours.
    fn add_days(&mut self, millionths: i128) {
        self.days += millionths / FRACTION;
        self.micros += millionths % FRACTION * (MICROS_PER_DAY / FRACTION);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Years,
    Months,
    Weeks,
    Days,
    Hours,
    Minutes,
    Seconds,
}

/// A signed number; `fraction` is in millionths and has the same sign.
struct Amount {
    whole: i128,
    fraction: i128,
}

/// The interval's length in microseconds. Blanks may stand around all forms but that of ISO 8601.
pub(super) fn parse(text: &str, server: Server) -> Result<i128, Fault> {
    if server.reads_infinite_intervals() {
        let is = |word: &str| text.trim_matches(moment::is_blank).eq_ignore_ascii_case(word);
        if is("infinity") || is("+infinity") {
            return Ok(INFINITY);
        }
        if is("-infinity") {
            return Ok(MINUS_INFINITY);
        }
    }
    let parts = match text.strip_prefix('P') {
        Some(rest) => parse_iso(rest)?,
        None => parse_plain(text)?,
    };
    parts.total()
}

fn parse_iso(text: &str) -> Result<Parts, Fault> {
    let mut parts = Parts::default();
    let mut rest = text;
    let mut in_time = false;
    if rest.is_empty() {
        return Err(Fault::Syntax);
    }
    while !rest.is_empty() {
        if !in_time && let Some(after) = rest.strip_prefix('T') {
            in_time = true;
            rest = after;
            continue;
        }
        let end = rest.find(|character: char| character.is_ascii_alphabetic()).ok_or(Fault::Syntax)?;
        let unit = match (rest.as_bytes().get(end), in_time) {
            (Some(b'Y'), false) => Unit::Years,
            (Some(b'M'), false) => Unit::Months,
            (Some(b'W'), false) => Unit::Weeks,
            (Some(b'D'), false) => Unit::Days,
            (Some(b'H'), true) => Unit::Hours,
            (Some(b'M'), true) => Unit::Minutes,
            (Some(b'S'), true) => Unit::Seconds,
            _ => return Err(Fault::Syntax),
        };
        if rest.starts_with('+') {
            return Err(Fault::Syntax);
        }
        parts.add(parse_amount(&rest[..end])?, unit)?;
        rest = &rest[end + 1..];
    }
    Ok(parts)
}

fn parse_plain(text: &str) -> Result<Parts, Fault> {
    let mut parts = Parts::default();
    // Postgres takes each unit once, and a clock for all three of its own.
    let mut seen = Vec::new();
    let mut take = |units: &[Unit]| {
        let fresh = units.iter().all(|unit| !seen.contains(unit));
        seen.extend_from_slice(units);
        if fresh { Ok(()) } else { Err(Fault::Syntax) }
    };
    let mut words = text.split_ascii_whitespace().peekable();
    if words.peek().is_none() {
        return Err(Fault::Syntax);
    }
    while let Some(word) = words.next() {
        if word.contains(':') {
            take(&[Unit::Hours, Unit::Minutes, Unit::Seconds])?;
            parts.micros += parse_clock(word)?;
            continue;
        }
        let end = word.find(|character: char| character.is_ascii_alphabetic()).unwrap_or(word.len());
        let (number, glued) = word.split_at(end);
        let unit = match (glued, words.peek()) {
            // A last number without a unit counts seconds.
            ("", None) => Unit::Seconds,
            ("", Some(name)) => parse_unit(name)?,
            (name, _) => parse_unit(name)?,
        };
        if glued.is_empty() {
            words.next();
        }
        take(&[unit])?;
        parts.add(parse_amount(number)?, unit)?;
    }
    Ok(parts)
}

fn parse_unit(name: &str) -> Result<Unit, Fault> {
    let name = name.to_ascii_lowercase();
    Ok(match name.as_str() {
        "y" | "year" | "years" => Unit::Years,
        "mon" | "mons" | "month" | "months" => Unit::Months,
        "w" | "week" | "weeks" => Unit::Weeks,
        "d" | "day" | "days" => Unit::Days,
        "h" | "hour" | "hours" => Unit::Hours,
        "m" | "min" | "mins" | "minute" | "minutes" => Unit::Minutes,
        "s" | "sec" | "secs" | "second" | "seconds" => Unit::Seconds,
        _ => return Err(Fault::Syntax),
    })
}

/// `[-]HH:MM[:SS[.ffffff]]`.
fn parse_clock(text: &str) -> Result<i128, Fault> {
    let (sign, body) = split_sign(text);
    // A fraction is of seconds; `1:30.5` is minutes and seconds in Postgres.
    if body.rsplit_once(':').is_some_and(|(before, _)| before.contains('.'))
        || body.matches(':').count() < 2 && body.contains('.')
    {
        return Err(Fault::Syntax);
    }
    let mut fields = body.split(':');
    let mut field = || fields.next().map(parse_amount).transpose();
    let (Some(hours), Some(minutes)) = (field()?, field()?) else {
        return Err(Fault::Syntax);
    };
    let seconds = field()?.unwrap_or(Amount { whole: 0, fraction: 0 });
    if fields.next().is_some() || body.contains(['-', '+']) {
        return Err(Fault::Syntax);
    }
    if minutes.whole > 59 || seconds.whole > 60 {
        return Err(Fault::Range);
    }
    let mut parts = Parts::default();
    parts.add(hours, Unit::Hours)?;
    parts.add(minutes, Unit::Minutes)?;
    parts.add(seconds, Unit::Seconds)?;
    Ok(sign * parts.micros)
}

fn parse_amount(text: &str) -> Result<Amount, Fault> {
    let (sign, body) = split_sign(text);
    let (whole, fraction) = match body.split_once('.') {
        Some((_, "")) => return Err(Fault::Syntax),
        Some(parts) => parts,
        None => (body, ""),
    };
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) {
        return Err(Fault::Syntax);
    }
    // Beyond microseconds Postgres rounds; those digits are refused rather than guessed.
    if whole.len() > MAX_DIGITS || fraction.len() > 6 {
        return Err(Fault::Range);
    }
    let whole: i128 = whole.parse().map_err(|_| Fault::Syntax)?;
    let fraction: i128 = format!("{fraction:0<6}").parse().map_err(|_| Fault::Syntax)?;
    Ok(Amount { whole: sign * whole, fraction: sign * fraction })
}

fn split_sign(text: &str) -> (i128, &str) {
    match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<i128, Fault> {
        parse(text, Server::default())
    }

    #[test]
    fn forms_of_the_same_length_are_equal() {
        for (left, right) in [
            ("P1M", "30 days"),
            ("P1D", "24:00:00"),
            ("PT0S", "0 days"),
            ("P-1Y2DT-3.5S", "-1 year 2 days -00:00:03.5"),
            ("PT25H0.000001S", "25h 0.000001 s"),
            ("P1W", "7d"),
            ("1 minute 5", "65"),
            ("1.5 days", "36:00"),
            ("P1.5D", "1 day 12 hours"),
            ("-1.5 mons", "-45 days"),
            ("0.75 years", "9 mons"),
            ("0.1 days", "8640 secs"),
            ("2.25 hours", "02:15"),
        ] {
            assert_eq!(read(left), read(right), "{left} {right}");
            assert!(read(left).is_ok(), "{left}");
        }
    }

    #[test]
    fn what_is_not_an_interval_is_refused() {
        for text in [
            "",
            "P",
            "P1",
            "1 fortnight",
            "P1H",
            "P1Y-",
            "P+1D",
            "1:2:3:4",
            "1:-2",
            "1.5:30",
            "1:30.5",
            "1:3.0",
            "1.:30",
            "1.day",
            " P1D",
            "P1D ",
            "0.1 years",
            "1 day 2 days",
            "1:00 1 hour",
            "0.0000001 s",
            "99999999999 days",
            "infinity",
            "é",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn infinity_is_read_where_the_server_reads_it() {
        let later = Server::from_version_num(170_000);
        assert!(parse("infinity", later).unwrap() > parse("178000000 years", later).unwrap());
        assert!(parse("-INFINITY", later).unwrap() < parse("-178000000 years", later).unwrap());
        assert_eq!(parse("infinity", Server::from_version_num(160_004)), Err(Fault::Syntax));
    }
}
