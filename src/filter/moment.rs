//! Dates, times and timestamps as Postgres counts them: days and microseconds since 2000-01-01,
//! UTC.
//!
//! Reads the ISO forms (`2026-11-20`, `2026-11-20T10:00:00.5+02:00`, `0044-03-15 BC`,
//! `infinity`), which is all that Postgres writes under `DateStyle=ISO`, and what people write in
//! a condition, `20261120` and `epoch` among it. Postgres's other input forms (`Jan 8, 1999`, `now`,
//! zone names) are refused. No zone database and no clock: a time without an offset is UTC.

use std::cmp::Ordering;

use super::server::Server;
use super::value::Fault;

/// `-infinity` and `infinity` of timestamps, as Postgres stores them.
pub(super) const INSTANT_MIN: i64 = i64::MIN;
pub(super) const INSTANT_MAX: i64 = i64::MAX;
/// `-infinity` and `infinity` of dates.
pub(super) const DATE_MIN: i32 = i32::MIN;
pub(super) const DATE_MAX: i32 = i32::MAX;

const MICROS_PER_SECOND: i64 = 1_000_000;
const MICROS_PER_MINUTE: i64 = 60 * MICROS_PER_SECOND;
const MICROS_PER_HOUR: i64 = 60 * MICROS_PER_MINUTE;
const MICROS_PER_DAY: i64 = 24 * MICROS_PER_HOUR;

/// 4714-11-24 BC, the first day of Postgres's calendar (Julian day 0).
const FIRST_DAY: i64 = -2_451_545;
/// The day after the last `date`, 5874897-12-31.
const DAYS_END: i64 = 2_147_483_494 - 2_451_545;
/// The instant after the last `timestamp`, 294276-12-31 24:00.
const INSTANTS_END: i64 = 9_223_371_331_200_000_000;
/// Postgres allows offsets below sixteen hours.
const MAX_OFFSET_HOURS: i64 = 15;
/// Digits of a year; the last date has seven.
const MAX_YEAR_DIGITS: usize = 7;
/// Digits of `YYYYMMDD`.
const COMPACT_DIGITS: usize = 8;
/// 1970-01-01.
const UNIX_EPOCH: i64 = -10_957;

/// A `time with time zone`. Ordered by its UTC time, then by its zone, west above east.
#[derive(Clone, Copy, Debug)]
pub(super) struct ZonedTime {
    micros: i64,
    /// Seconds east of Greenwich.
    offset: i64,
}

impl ZonedTime {
    /// A time in UTC.
    pub(super) fn utc(micros: i64) -> Self {
        Self { micros, offset: 0 }
    }

    /// UTC time, then zone: the order of the pairs is the order of the times.
    pub(super) fn parts(self) -> (i64, i64) {
        (self.micros - self.offset * MICROS_PER_SECOND, -self.offset)
    }

    pub(super) fn compare(self, other: Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

/// Midnight of a date, saturating where timestamps do not reach.
pub(super) fn midnight(days: i32) -> i64 {
    match days {
        DATE_MIN => INSTANT_MIN,
        DATE_MAX => INSTANT_MAX,
        days => (i64::from(days) * 24 * 3600)
            .checked_mul(MICROS_PER_SECOND)
            // Above every finite timestamp, below infinity, as Postgres orders it.
            .unwrap_or(INSTANT_MAX - 1),
    }
}

/// The day of an instant, as `timestamp::date`.
pub(super) fn day_of(instant: i64) -> i32 {
    match instant {
        INSTANT_MIN => DATE_MIN,
        INSTANT_MAX => DATE_MAX,
        // Timestamps span 110 million days.
        instant => i32::try_from(instant.div_euclid(MICROS_PER_DAY)).unwrap_or(DATE_MAX),
    }
}

/// `date`; a time of day after it is checked and dropped, as Postgres does.
pub(super) fn parse_date(text: &str, server: Server) -> Result<i32, Fault> {
    if let Some(sign) = parse_infinity(text, server) {
        return Ok(if sign < 0 { DATE_MIN } else { DATE_MAX });
    }
    let stamp = parse_stamp(text)?;
    if !(FIRST_DAY..DAYS_END).contains(&stamp.days) {
        return Err(Fault::Range);
    }
    i32::try_from(stamp.days).map_err(|_| Fault::Range)
}

/// `timestamp`: an offset in the text is ignored, as Postgres does.
pub(super) fn parse_timestamp(text: &str, server: Server) -> Result<i64, Fault> {
    parse_instant(text, false, server)
}

/// `timestamp with time zone`: an offset in the text counts, without one the text is UTC.
pub(super) fn parse_timestamptz(text: &str, server: Server) -> Result<i64, Fault> {
    parse_instant(text, true, server)
}

fn parse_instant(text: &str, zoned: bool, server: Server) -> Result<i64, Fault> {
    if let Some(sign) = parse_infinity(text, server) {
        return Ok(if sign < 0 { INSTANT_MIN } else { INSTANT_MAX });
    }
    let stamp = parse_stamp(text)?;
    if stamp.days < FIRST_DAY {
        return Err(Fault::Range);
    }
    let offset = if zoned { stamp.offset.unwrap_or(0) * MICROS_PER_SECOND } else { 0 };
    let instant = i128::from(stamp.days) * i128::from(MICROS_PER_DAY) + i128::from(stamp.micros) - i128::from(offset);
    match i64::try_from(instant) {
        Ok(instant) if (FIRST_DAY * MICROS_PER_DAY..INSTANTS_END).contains(&instant) => Ok(instant),
        _ => Err(Fault::Range),
    }
}

/// `time`: microseconds since midnight, up to and with 24:00. An offset is ignored.
pub(super) fn parse_time(text: &str) -> Result<i64, Fault> {
    Ok(parse_zoned_time(text)?.micros)
}

/// `time with time zone`; without an offset it is UTC.
pub(super) fn parse_zoned_time(text: &str) -> Result<ZonedTime, Fault> {
    let mut scan = Scan::new(text);
    let micros = scan.time_of_day()?;
    scan.blanks();
    let offset = scan.offset()?;
    scan.blanks();
    scan.end()?;
    Ok(ZonedTime { micros, offset: offset.unwrap_or(0) })
}

fn parse_infinity(text: &str, server: Server) -> Option<i8> {
    let text = text.trim_matches(is_blank);
    let signed = server.reads_signed_infinity();
    if text.eq_ignore_ascii_case("infinity") || signed && text.eq_ignore_ascii_case("+infinity") {
        Some(1)
    } else if text.eq_ignore_ascii_case("-infinity") {
        Some(-1)
    } else {
        None
    }
}

struct Stamp {
    days: i64,
    micros: i64,
    offset: Option<i64>,
}

fn parse_stamp(text: &str) -> Result<Stamp, Fault> {
    let mut scan = Scan::new(text);
    if text.trim_matches(is_blank).eq_ignore_ascii_case("epoch") {
        return Ok(Stamp { days: UNIX_EPOCH, micros: 0, offset: None });
    }
    let year_digits = scan.digits();
    let (year, month, day) = if year_digits.len() == COMPACT_DIGITS {
        let (year, rest) = year_digits.split_at(4);
        (number(year), number(&rest[..2]), number(&rest[2..]))
    } else if (4..=MAX_YEAR_DIGITS).contains(&year_digits.len()) {
        scan.expect(b'-')?;
        let month = scan.one_or_two()?;
        scan.expect(b'-')?;
        (number(year_digits), month, scan.one_or_two()?)
    } else {
        return Err(Fault::Syntax);
    };
    let mut micros = 0;
    let mut offset = None;
    let marked = scan.letter_t();
    let separated = marked || scan.blanks();
    let follows = scan.peek().is_some_and(|byte| byte.is_ascii_digit());
    if marked && !follows {
        return Err(Fault::Syntax);
    }
    if separated && follows {
        micros = scan.time_of_day()?;
        scan.blanks();
        offset = scan.offset()?;
        scan.blanks();
    }
    let before_christ = scan.era();
    scan.blanks();
    scan.end()?;
    // There is no year 0: 1 BC is the astronomers' year 0.
    if year == 0 {
        return Err(Fault::Range);
    }
    let year = if before_christ { 1 - year } else { year };
    Ok(Stamp { days: days_from_civil(year, month, day)?, micros, offset })
}

/// Days since 2000-01-01 in the proleptic Gregorian calendar.
fn days_from_civil(year: i64, month: i64, day: i64) -> Result<i64, Fault> {
    let leap = year.rem_euclid(4) == 0 && (year.rem_euclid(100) != 0 || year.rem_euclid(400) == 0);
    let last = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return Err(Fault::Range),
    };
    if !(1..=last).contains(&day) {
        return Err(Fault::Range);
    }
    // Years that begin in March put the leap day at the end; eras of 400 years repeat exactly.
    let (march_year, march_month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let era = march_year.div_euclid(400);
    let year_of_era = march_year.rem_euclid(400);
    let day_of_year = (153 * march_month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    // 2000-03-01 begins an era, 60 days after 2000-01-01.
    Ok((era - 5) * 146_097 + day_of_era + 60)
}

/// The blanks of C's `isspace`, which Postgres's input functions skip.
pub(super) fn is_blank(character: char) -> bool {
    matches!(character, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

fn number(digits: &[u8]) -> i64 {
    // Callers bound the digits, so this cannot overflow.
    digits.iter().fold(0, |total, digit| total * 10 + i64::from(digit - b'0'))
}

/// A reader of short ASCII forms.
struct Scan<'a> {
    rest: &'a [u8],
}

impl<'a> Scan<'a> {
    fn new(text: &'a str) -> Self {
        Self { rest: text.trim_matches(is_blank).as_bytes() }
    }

    fn peek(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        if found {
            self.rest = &self.rest[1..];
        }
        found
    }

    fn expect(&mut self, byte: u8) -> Result<(), Fault> {
        if self.take(byte) { Ok(()) } else { Err(Fault::Syntax) }
    }

    fn end(&self) -> Result<(), Fault> {
        if self.rest.is_empty() { Ok(()) } else { Err(Fault::Syntax) }
    }

    fn digits(&mut self) -> &'a [u8] {
        let end = self.rest.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        self.rest = rest;
        digits
    }

    fn one_or_two(&mut self) -> Result<i64, Fault> {
        let digits = self.digits();
        if matches!(digits.len(), 1 | 2) { Ok(number(digits)) } else { Err(Fault::Syntax) }
    }

    fn blanks(&mut self) -> bool {
        let before = self.rest.len();
        while self.peek().is_some_and(|byte| is_blank(char::from(byte))) {
            self.rest = &self.rest[1..];
        }
        self.rest.len() < before
    }

    fn letter_t(&mut self) -> bool {
        self.take(b'T') || self.take(b't')
    }

    /// `HH:MM[:SS[.ffffff]]` in microseconds; 24:00 is the end of the day.
    fn time_of_day(&mut self) -> Result<i64, Fault> {
        let hour = self.one_or_two()?;
        self.expect(b':')?;
        let minute = self.one_or_two()?;
        let (second, fraction) = if self.take(b':') { (self.one_or_two()?, self.fraction()) } else { (0, 0) };
        // Postgres takes a leap second as the first of the next minute.
        if minute > 59 || second > 60 {
            return Err(Fault::Range);
        }
        let micros = hour * MICROS_PER_HOUR + minute * MICROS_PER_MINUTE + second * MICROS_PER_SECOND + fraction;
        if hour > 24 || micros > MICROS_PER_DAY {
            return Err(Fault::Range);
        }
        Ok(micros)
    }

    /// Microseconds of `.ffffff`, rounded as Postgres rounds them: through a double.
    fn fraction(&mut self) -> i64 {
        if !self.take(b'.') {
            return 0;
        }
        let digits = self.digits();
        if digits.len() <= 6 {
            let scale = (digits.len()..6).fold(1, |scale, _| scale * 10);
            return number(digits) * scale;
        }
        let part = std::str::from_utf8(digits)
            .ok()
            .and_then(|digits| format!("0.{digits}").parse::<f64>().ok())
            .unwrap_or(0.0);
        // At most 1_000_000, so the conversion is exact.
        (part * 1e6).round_ties_even() as i64
    }

    /// `Z`, `UTC`, `+HH`, `+HHMM`, `+HH:MM[:SS]`, in seconds east.
    fn offset(&mut self) -> Result<Option<i64>, Fault> {
        let sign = match self.peek() {
            Some(b'+') => 1,
            Some(b'-') => -1,
            _ => return Ok(self.utc_name().then_some(0)),
        };
        self.rest = &self.rest[1..];
        let digits = self.digits();
        let (hours, minutes, seconds) = match digits.len() {
            1 | 2 => {
                let minutes = if self.take(b':') { self.one_or_two()? } else { 0 };
                let seconds = if self.take(b':') { self.one_or_two()? } else { 0 };
                (number(digits), minutes, seconds)
            }
            3 | 4 => (number(digits) / 100, number(digits) % 100, 0),
            _ => return Err(Fault::Syntax),
        };
        if hours > MAX_OFFSET_HOURS || minutes > 59 || seconds > 59 {
            return Err(Fault::Range);
        }
        Ok(Some(sign * (hours * 3600 + minutes * 60 + seconds)))
    }

    fn utc_name(&mut self) -> bool {
        self.word(b"utc") || self.word(b"gmt") || self.word(b"z")
    }

    /// Whether the era is before Christ; `AD` may be said too.
    fn era(&mut self) -> bool {
        let before = self.word(b"bc");
        if !before {
            self.word(b"ad");
        }
        before
    }

    fn word(&mut self, word: &[u8]) -> bool {
        let found = self.rest.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word))
            && !self.rest.get(word.len()).is_some_and(u8::is_ascii_alphabetic);
        if found {
            self.rest = &self.rest[word.len()..];
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_epoch_is_the_first_of_january_2000() {
        assert_eq!(parse_date("2000-01-01", Server::default()).ok(), Some(0));
        assert_eq!(parse_date("1970-01-01", Server::default()).ok(), Some(-10_957));
        assert_eq!(parse_date("2000-03-01", Server::default()).ok(), Some(60));
        assert_eq!(parse_date("4714-11-24 BC", Server::default()).ok(), Some(-2_451_545));
        assert_eq!(parse_date("4714-11-23 BC", Server::default()).ok(), None);
        assert_eq!(parse_date("5874897-12-31", Server::default()).map(i64::from).ok(), Some(DAYS_END - 1));
    }

    #[test]
    fn offsets_count_only_where_the_type_has_a_zone() {
        let text = "2000-01-01 02:00:00+02";
        assert_eq!(parse_timestamptz(text, Server::default()).ok(), Some(0));
        assert_eq!(parse_timestamp(text, Server::default()).ok(), Some(2 * MICROS_PER_HOUR));
        assert_eq!(parse_timestamptz("2000-01-01T00:00:00Z", Server::default()).ok(), Some(0));
        assert_eq!(parse_timestamptz("1999-12-31T18:30-0530", Server::default()).ok(), Some(0));
    }

    #[test]
    fn impossible_moments_are_refused() {
        for text in [
            "2001-02-29",
            "2000-13-01",
            "2000-00-01",
            "0000-01-01",
            "2000011",
            "2000-01-01T",
            "2000-01-01 25:00",
            "2000-01-01 10:60",
            "2000-01-01 10:00 Mars/Base",
            "now",
            "",
            "2000-01-01x",
            "2000-01-01 10:00+16",
            "99-01-01",
        ] {
            assert!(parse_timestamptz(text, Server::default()).is_err(), "{text}");
        }
    }

    #[test]
    fn infinity_lies_beyond_every_date() {
        assert_eq!(parse_date("-infinity", Server::default()).ok(), Some(DATE_MIN));
        let last = parse_date("5874897-12-31", Server::default()).expect("the last date");
        assert!(midnight(last) < midnight(DATE_MAX));
        assert!(midnight(last) >= INSTANTS_END);
    }

    #[test]
    fn times_with_zones_are_ordered_by_utc_then_by_zone() {
        let time = |text| parse_zoned_time(text).expect("a time");
        assert_eq!(time("10:00+02").compare(time("08:00Z")), Ordering::Less);
        assert_eq!(time("10:00+02").compare(time("10:00+02:00")), Ordering::Equal);
        assert_eq!(time("10:00+02").compare(time("10:00+01")), Ordering::Less);
    }
}
