//! Forms of text that Postgres reads as a type, and what lies beside them: each is read alike or not at all, and what is
//! not read is listed in the protocol ("`where`").

use std::collections::HashMap;

use sqlx::PgConnection;
use tidewire::filter::{Column, ColumnType, Filter, MAX_FILTER_BYTES, Server};

use super::conditions::Dice;
use super::{Image, Tally, columns, compare, images, in_c, run, server};

/// Mutations of each form.
const MUTATIONS: usize = 40;

/// A type, and whether Postgres reads forms of it that are not read here.
struct Kind {
    name: &'static str,
    kind: ColumnType,
    /// Between bars.
    forms: &'static str,
    /// What the protocol lists as not read.
    unread: fn(&str) -> bool,
}

fn nothing(_: &str) -> bool {
    false
}

/// Hexadecimal floats and NaN with a payload, which C reads.
fn c_floats(form: &str) -> bool {
    let form = form.to_ascii_lowercase();
    form.contains("0x") || form.contains("nan(")
}

/// Of dates, times and intervals only the listed forms are read.
fn anything(_: &str) -> bool {
    true
}

const INTEGERS: &str = "0|-0|+7| 7 |\t7\n|007|32767|32768|-32768|-32769|2147483647|-2147483648|2147483648|9223372036854775807\
    |-9223372036854775808|9223372036854775808|| |-|+|- 7|7 7|1.0|1e3|0x1f|0X1F|-0x1f|+0x1f|0x|0x_1f|0x1_f|0x1f_\
    |0o17|0O17|0b101|0B1|0b2|0o8|1_000|1__000|_1|1_|1_0_0|0_1|0x7fff|0x8000|-0x8000|0x7fffffffffffffff\
    |0x8000000000000000|-0x8000000000000000|0xffffffffffffffffffffffffffffffffffff|٣|7\u{a0}|infinity|nan|0b\
    |0x 1";
const NUMERICS: &str = "0|-0.0|.5|5.|.|-.5|1.50|1e3|1E3|1e+3|1e-3|1e|e1|1e1.5|NaN|nan|-NaN|+NaN|Infinity|-infinity|+Infinity|inf\
    |-inf|+inf|INF|infinit|infinityx| 1 |1 2|1,5|0x1f|-0x1f|0x1.8|0o17|0b11|1_000|1_000.5|1_000._5|1_.5|1._5\
    |1.5_5|1e1_0|1e_1|1_e1|_1|1_|0x_1|0xffffffffffffffff|1e131071|1e131072|1e-16383|1e-16384|00.10|- 1\
    |123456789012345678901234567890.123|nan | inf |0x|x";
const FLOATS: &str = "0|-0|1.5|.5|5.|.|1e3|1e400|-1e400|1e-400|1e-310|1e-45|1e-46|3.4e38|3.5e38|NaN|nan|-nan|+NaN|Infinity\
    |-Infinity|+infinity|inf|-INF|infinit|in|0x1f|0x1p3|-0x1|nan(1)|nan()|1_0|1e|e1|1e+5|1d|1f| 1 |1 2||--1|+-1\
    |1.5.5|0e400|0.1|16777217|9007199254740993|1e23|123456789012345678901234567890";
const BOOLS: &str = "t|T|tr|true|TRUE|truex|f|fa|false|y|ye|yes|yess|n|no|on|ON|o|of|off|offf|1|0|2|01|-1|| | t |\tyes\n|null\
    |tru e";
const UUIDS: &str = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11|A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11|a0eebc999c0b4ef8bb6d6bb9bd380a11\
    |{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}|a0ee-bc99-9c0b-4ef8-bb6d-6bb9-bd38-0a11\
    |{a0eebc999c0b4ef8bb6d6bb9bd380a11| a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11|a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a1\
    |a0e-ebc99-9c0b-4ef8-bb6d-6bb9bd380a11||{}";
const DATES: &str = "2026-11-20|20261120| 20261120 |2026-1-2|2026-01-02 BC|20261120 BC|2026-02-29|2024-02-29|20260229|20261301\
    |00010101|00000101|0000-01-01|261120|epoch|EPOCH| epoch |infinity|-infinity|+infinity|Infinity|inf|now|today\
    |tomorrow|yesterday|J2451187|Nov 20, 2026|20-Nov-2026|11/20/2026|2026/11/20|2026.11.20|2026-Nov-20|2026-324\
    |2026.324|Friday 2026-11-20|2026-11-20T|2026-11-20 10:00|20261120T10:00|20261120T101010|20261120 101010\
    |2026-11-20T10|2026-11-20T1000|2026-11-20 10:00:60|2026-11-20 24:00|2026-11-20 24:00:01|2026-11-20 25:00\
    |2026-11-20 10:00 BC|2026-11-20 BC 10:00|2026-11-20 10:00+02|2026-11-20 10:00 +02:30|2026-11-20+02\
    |2026-11-20Z|2026-11-20 Z|2026-11-20 10:00 UTC|2026-11-20 10:00 PST|2026-11-20 10:00 Europe/Berlin\
    |2026-11-20 10:00 PM|2026-11-20 10:00:00.123456789|2026-11-20 10:00:00.9999999|2026-11-20 23:59:59.9999999\
    |2026-11-20 10:00:00.|2026-11-20 10:00:00,5|12026-11-20|99-01-01|2026-11-20 AD|AD 2026-11-20\
    |2026-11-20 allballs|allballs|5874897-12-31|5874898-01-01|294276-12-31|294277-01-01|4714-11-24 BC\
    |4714-11-23 BC|2026-11-20 10|2026-11-20 10:00z|2026-11-20t10:00|2026-11-20  10:00|2026-11-20T 10:00\
    |2026-11-20 T10:00||2026-11-20 10:00+15:59|2026-11-20 10:00+16|2026-11-20 10:00-0530|2026-11-20 10:00+5:3\
    |1999-12-31 23:59:60|2026-11-20 10:00+02:30:15|2026-11-20 10:00+00:60|20261120 10:00:00+02 BC|2026-11-00\
    |2026-00-10|-2026-11-20|20261120000000|2026112|202611200|2026-11-20 1:2:3|2026-11-20 100:00|2026-011-20\
    |2026-11-020";
const TIMES: &str = "10:00|1:2:3|10|1000|100000|10:00:00.5|10:00:00.|10:00:00.0000005|23:59:59.9999999|24:00|24:00:00.1|24:01\
    |25:00|10:60|10:00:60|10:00:61|23:59:60|10 AM|10:00 PM|10:00PM|allballs|now|10:00+02|10:00 +02|10:00+02:30\
    |10:00-0530|10:00Z|10:00 UTC|10:00 PST|T10:00|t100000|2026-11-20 10:00|10:00 2026-11-20|epoch|infinity|\
    | 10:00 |10:00:00 BC|10::00|10:00:|:10:00|-10:00|10:00+16|10:00+15:59:59|10:00+1|10:00+12345|010:00|10:000\
    |10.5";
const INTERVALS: &str = "1 day|1.5 days|-1.5 days|1.5 day 1.5 hours|0.1 days|0.000001 days|1.5 weeks|1.5 mons|0.1 mon|1.5 years\
    |0.25 year|0.1 years|1.999999 years|1.5 hours|0.1 mins|1.5|1.0000005|1 day 2 days|1 day 2 hours 3 hours\
    |1:30 1 hour|1 hour 1:30|1 week 1 day|1 week 1 week|infinity|-infinity|+infinity|INFINITY|inf|1 day ago\
    |@ 1 day|@ 1 day ago|1-2|-1-2|1-2 3 4:05:06|3 4:05:06|1:30|1:30:15|1:30.5|1.5:30|100:00|-1:30|+1:30|1:60\
    |1:30:60|1:30:60.5|1:30:61|1:30:15.1234567|P1Y2M3DT4H5M6.5S|P1.5D|P0.5M|P1.5Y|P0.1Y|P1W|PT1.5H|P-1D|P+1D\
    |P1D2D|PT1H1H|P1DT|PT|P|p1d|P1d|PT1S1|P1|P0001-02-03T04:05:06|P20261120T040506|P1H|P1Y-2M|P.5D|P1e1D|1 Year\
    |1 YEARS|1y|1 y|1m|1 m|1 mon|1 min|1 mins|1 s|1sec|1 h|1 w|1 d|1 c|1 century|1 decade|1 millennium|1 ms|1 us\
    |1 millisecond|1 quarter|1 fortnight|1day|1day2hours|1 day2 hours|day 1|1|-1|+1|1 2|1 day 2|2 1 day\
    |1 day +2:00|1 day - 2:00|1 day -2:00|--1 day|1e3 days|| |2147483647 mons|2147483648 mons|178956970 years\
    |178956971 years|2147483647 days|2147483648 days|2562047788 hours|2562047789 hours|9223372036854 s\
    |9223372036855 s|1.-5 days|1. day|.5 day|1,5 days|1 day, 2 hours|1 day and 2 hours|T1:30|1 hour 30|1:2:3:4|0\
    |-0|00:00:00|1 mon -30 days";

const KINDS: &[Kind] = &[
    Kind { name: "int2", kind: ColumnType::Int2, forms: INTEGERS, unread: nothing },
    Kind { name: "int4", kind: ColumnType::Int4, forms: INTEGERS, unread: nothing },
    Kind { name: "int8", kind: ColumnType::Int8, forms: INTEGERS, unread: nothing },
    Kind { name: "numeric", kind: ColumnType::Numeric, forms: NUMERICS, unread: long_digit_forms },
    Kind { name: "float4", kind: ColumnType::Float4, forms: FLOATS, unread: c_floats },
    Kind { name: "float8", kind: ColumnType::Float8, forms: FLOATS, unread: c_floats },
    Kind { name: "bool", kind: ColumnType::Bool, forms: BOOLS, unread: nothing },
    Kind { name: "uuid", kind: ColumnType::Uuid, forms: UUIDS, unread: nothing },
    Kind { name: "date", kind: ColumnType::Date, forms: DATES, unread: anything },
    Kind { name: "timestamp", kind: ColumnType::Timestamp, forms: DATES, unread: anything },
    Kind { name: "timestamptz", kind: ColumnType::TimestampTz, forms: DATES, unread: anything },
    Kind { name: "time", kind: ColumnType::Time, forms: TIMES, unread: anything },
    Kind { name: "timetz", kind: ColumnType::TimeTz, forms: TIMES, unread: anything },
    Kind { name: "interval", kind: ColumnType::Interval, forms: INTERVALS, unread: anything },
];

/// A whole number in another base above 128 bits; and blanks before an exponent's digits, which servers before 16 read.
fn long_digit_forms(form: &str) -> bool {
    let is_long = form.trim_start_matches(['-', '+', ' ']).starts_with('0') && form.len() > 34;
    is_long || form.trim().contains([' ', '\t', '\n'])
}

/// What must be read, of the types where not everything is.
const READ: &[(&str, &[&str])] = &[
    ("date", &["20261120", "epoch", "2026-1-2", "2026-11-20 10:00+02"]),
    ("timestamp", &["20261120", "20261120 10:00", "epoch"]),
    ("timestamptz", &["20261120", "epoch", "2026-11-20T10:00:00Z"]),
    ("interval", &["1.5 days", "P1.5D", "0.25 year", "1.5 mons", "1.5 weeks", "0.1 mins", "1:30:60"]),
];

/// As Postgres writes the text after reading it; NULL: it does not read it.
const READS: &str = "CREATE FUNCTION filter_reads(kind text, form text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    written text;
BEGIN
    EXECUTE format('SELECT %L::%s::text', form, kind) INTO written;
    RETURN written;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END $$";

fn mutated(dice: &mut Dice, form: &str) -> String {
    const INSERTED: &[char] =
        &['0', '1', '9', '-', '+', '.', ':', ' ', '_', 'x', 'e', 'T', 'Z', 'P', 'D', 'n', 'b', 'E', '\t', ',', '/'];
    let mut characters: Vec<char> = form.chars().collect();
    for _ in 0..=dice.below(2) {
        let at = dice.below(characters.len() + 1);
        let inserted = INSERTED[dice.below(INSERTED.len())];
        match dice.below(4) {
            0 => characters.insert(at, inserted),
            1 if at < characters.len() => drop(characters.remove(at)),
            2 if at < characters.len() => characters[at] = inserted,
            _ if at + 1 < characters.len() => characters.swap(at, at + 1),
            _ => characters.push(inserted),
        }
    }
    characters.into_iter().collect()
}

#[tokio::test]
async fn a_text_is_read_as_postgres_reads_it_or_not_at_all() {
    let database = crate::support::postgres::database().await;
    in_c(&database.pool, async |connection| read_alike(connection, 20_261_128).await).await;
}

async fn read_alike(connection: &mut PgConnection, seed: u64) {
    run(connection, READS).await;
    let server = server(connection).await;
    let mut dice = Dice::new(seed);
    for kind in KINDS {
        let mut forms: Vec<String> = kind.forms.split('|').map(str::to_owned).collect();
        let must = READ.iter().filter(|(name, _)| *name == kind.name).flat_map(|(_, forms)| *forms);
        forms.extend(must.map(|form| (*form).to_owned()));
        let listed = forms.len();
        for form in kind.forms.split('|') {
            forms.extend((0..MUTATIONS).map(|_| mutated(&mut dice, form)));
        }
        let written: Vec<Option<String>> =
            sqlx::query_scalar("SELECT filter_reads($1, form) FROM unnest($2::text[]) form")
                .bind(kind.name)
                .bind(&forms)
                .fetch_all(&mut *connection)
                .await
                .unwrap();
        let mut read = 0;
        for (form, written) in forms.iter().zip(&written) {
            read += usize::from(check(kind, form, written.as_deref(), server));
        }
        assert!(read * 10 > listed, "{} forms of {} are read", read, kind.name);
        for (_, must) in READ.iter().filter(|(name, _)| *name == kind.name) {
            for form in *must {
                let at = forms.iter().position(|known| known == form).unwrap();
                assert!(check(kind, form, written[at].as_deref(), server), "{form} is not read as {}", kind.name);
            }
        }
    }
}

/// Whether the form is read here; panics where it is read and Postgres reads it otherwise or not.
fn check(kind: &Kind, form: &str, written: Option<&str>, server: Server) -> bool {
    let columns = [Column::new("t", ColumnType::Text), Column::new("v", kind.kind)];
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let name = kind.name;
    let says = |condition: &str| {
        let filter =
            Filter::compile_for(condition, &columns, server).unwrap_or_else(|error| panic!("{condition}: {error}"));
        let row = HashMap::from([("t".to_owned(), serde_json::value::to_raw_value(form).unwrap())]);
        filter.eval(&Image(row))
    };
    let is_null = says(&format!("t::{name} IS NULL")).unwrap();
    // A literal is read as a row's text is, and refused where that is NULL.
    let literal = Filter::compile_for(&format!("v = {}", quoted(form)), &columns, server);
    assert_eq!(literal.is_err(), is_null, "{name}: {form:?} as a literal and as a row's text");
    match written {
        None => assert!(is_null, "{name}: {form:?} is read here, and not by Postgres"),
        Some(_) if is_null => assert!((kind.unread)(form), "{name}: {form:?} is not read here, and is by Postgres"),
        // More than a condition may have.
        Some(written) if written.len() > MAX_FILTER_BYTES / 2 => {}
        Some(written) => {
            let same = says(&format!("t::{name} = {}", quoted(written)));
            assert_eq!(same, Some(true), "{name}: {form:?} is {written} in Postgres");
        }
    }
    !is_null
}

/// Types that meet, where the rules are special.
const TABLE: &str = "CREATE TYPE filter_pair AS (a int, b json);
    CREATE DOMAIN filter_couple AS filter_pair;
    CREATE TABLE filter_rows (n int, nm name, t text, v varchar(100), c char(70), pair filter_pair, couple filter_couple,
                              list int[], ids int4range, iv interval, j json, jb jsonb, d date, i int);
    INSERT INTO filter_rows
    SELECT row_number() OVER (), text::name, text, text, text, pair::filter_pair, pair::filter_couple, list::int[],
           ids::int4range, iv::interval, j::json, j::jsonb, '2026-11-20', 31
    FROM (VALUES ('a', '(1,2)', '{}', 'empty', '1 day', '{\"a\": null}'),
                 (repeat('x', 63), '(,)', '{NULL}', '[1,2)', '36:00', '[null]'),
                 (repeat('x', 62) || 'é', '(1,)', NULL, NULL, '-1 day', '{}'),
                 (repeat('x', 64), NULL, '{1}', '(,)', '178000000 years', '\"null\"'),
                 (NULL, '(,null)', '{1,2}', '[5,5]', NULL, NULL)) AS r (text, pair, list, ids, iv, j)";

/// Conditions over [`TABLE`], between semicolons; `X` is 63 letters x.
const CONDITIONS: &str = "nm = 'X'; nm = 'Xx'; nm <> 'Xx'; nm < 'Xx'; nm >= 'Xy'; nm = 'Xx'::text; nm = t; nm <> t; t = nm; nm = v\
    ; v < nm; nm = nm; nm = c; c = nm; nm IN ('a', 'X'); nm IN ('a', 'Xx'); nm IN ('Xx')\
    ; nm IN ('a'::text, 'Xx'::text); nm IN ('a'::text); nm IN (t, 'a', 'b'); nm IN (t, v); nm NOT IN ('a', NULL)\
    ; nm BETWEEN 'a' AND 'Xx'; nm BETWEEN t AND 'z'; nm IS DISTINCT FROM 'Xx'; nm IS NOT DISTINCT FROM 'a'\
    ; nm LIKE 'X%'; nm LIKE 'Xx'; nm ILIKE 'A'; nm::text = 'Xx'; nm::text = 'X'; nm::int = 1; nm::date IS NULL\
    ; nm IS NULL; nm IS NOT NULL; 'Xx' = nm; 'a' < nm; nm = 1; nm = 'é'; t IN (nm, 'a', 'Xx'); t IN (nm, 'a')\
    ; c IN (nm, 'a', 'b'); c IN ('a'::text, 'b'::text); v IN ('Xx', 'a'); pair IS NULL; pair IS NOT NULL\
    ; NOT (pair IS NULL); couple IS NULL; couple IS NOT NULL; pair = '(1,2)'; pair IS DISTINCT FROM NULL\
    ; pair IS NULL OR i = 31; pair IN ('(1,2)'); list IS NULL; list IS NOT NULL; ids IS NULL; ids IS NOT NULL\
    ; iv = '36:00'; iv > '1.5 days'; iv = '1.5 days'; iv < 'infinity'; iv > '-infinity'\
    ; iv = 'infinity'::interval; iv BETWEEN '-infinity' AND 'infinity'; iv IN ('1.5 days', '24 hours')\
    ; j -> 'a' IS NULL; jb -> 'a' IS NULL; j ->> 'a' IS NULL; jb -> 0 IS NULL; jb ->> 0 IS NULL; j IS NULL\
    ; jb IS NOT NULL; d = '20261120'; d > 'epoch'; d = '2026-11-20'::timestamp; d IN ('20261120', 'epoch')\
    ; i = '0x1f'; i = '0x1f'::int; i = '3_1'; i IN ('0b11111', '1'); i = 0x1f; i = 3_1; i = '31'::numeric\
    ; i = '0x1f'::numeric; i = '0x1f'::float8; i = '3_1'::float8; i > E'3\\x30'; t = E'\\141'; t = E'\\u0061'\
    ; t = U&'\\0061'; t = $$a$$; t = N'a'; d = 'now'; d = 'today'; d < 'tomorrow'; d = 'J2451187'\
    ; d = 'Nov 20, 2026'; iv = '1 day ago'; d = date 'epoch'; iv = interval '1.5 days'; iv = interval '1' day\
    ; d = date '20261120'";

#[tokio::test]
async fn types_with_rules_of_their_own_meet_as_in_postgres() {
    let database = crate::support::postgres::database().await;
    in_c(&database.pool, async |connection| meet_alike(connection).await).await;
}

async fn meet_alike(connection: &mut PgConnection) {
    run(connection, TABLE).await;
    let server = server(connection).await;
    let columns = columns(connection).await;
    let images = images(connection).await;
    let mut dice = Dice::new(7);
    let mut tally = Tally::default();
    let conditions: Vec<String> = CONDITIONS.split("; ").map(|text| text.replace('X', &"x".repeat(63))).collect();
    let answers: Vec<String> = sqlx::query_scalar("SELECT * FROM filter_oracle($1)")
        .bind(&conditions)
        .fetch_all(&mut *connection)
        .await
        .unwrap();
    for (condition, answer) in conditions.iter().zip(&answers) {
        compare(condition, answer, &columns, &images, server, &mut dice, &mut tally);
    }
    assert!(tally.answered * 2 > conditions.len(), "{tally:?}");
}

/// Listed in the protocol: an image renders both alike.
#[test]
fn json_null_is_taken_for_null() {
    let columns = [Column::new("j", ColumnType::Json), Column::new("jb", ColumnType::Jsonb)];
    let image = Image(serde_json::from_str(r#"{"j": null, "jb": null}"#).unwrap());
    for condition in ["j IS NULL", "jb IS NULL", "j -> 'a' IS NULL", "jb -> 0 IS NULL", "j ->> 'a' IS NULL"] {
        assert_eq!(Filter::compile(condition, &columns).unwrap().eval(&image), Some(true), "{condition}");
    }
}

/// Rows carry it from Postgres 17 on, whatever wrote the filter.
#[test]
fn an_infinite_interval_is_read_from_a_row() {
    let columns = [Column::new("iv", ColumnType::Interval)];
    let eval = |condition: &str, row: &str| {
        let filter = Filter::compile_for(condition, &columns, Server::from_version_num(170_000)).unwrap();
        filter.eval(&Image(serde_json::from_str(row).unwrap()))
    };
    for (row, verdicts) in
        [(r#"{"iv": "infinity"}"#, [true, false, false]), (r#"{"iv": "-infinity"}"#, [false, true, false])]
    {
        let found = ["iv > '1000 years'", "iv = '-infinity'", "iv IN ('1 day', '2 days')"].map(|text| eval(text, row));
        assert_eq!(found, verdicts.map(Some), "{row}");
    }
}
