//! Random rows and random conditions of the `where` language, as SQL text.

/// A reproducible source of choices (SplitMix64).
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).expect("a small bound");
        usize::try_from(self.roll() % bound).expect("below a small bound")
    }

    pub(super) fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    fn pick<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len())]
    }
}

/// Columns that compare with each other, and how their values are written.
struct Family {
    /// Name, type in `CREATE TABLE`, cast that literals may carry (empty: none), values that fit the column.
    columns: &'static [(&'static str, &'static str, &'static str, &'static [&'static str])],
    /// Literals without quotes.
    bare: &'static [&'static str],
    /// Literals that need a type, beyond the columns' values.
    strings: &'static [&'static str],
    ordered: bool,
}

const INTS: &[&str] = &["0", "1", "-1", "5", "7", "100", "32767", "-32768"];
const LARGE_INTS: &[&str] =
    &["0", "1", "-1", "5", "7", "16777217", "2147483647", "-2147483648", "9007199254740993", "9223372036854775807"];
const DECIMALS: &[&str] = &[
    "0",
    "-0.0",
    "1",
    "1.50",
    "1.5",
    "0.1",
    "5",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e20",
    "-0.001",
    "16777217",
    "9007199254740993",
    "123456789012345678901234567890.1234567890",
    "-123456789012345678901234567890.1234567891",
    "1e-30",
    "100",
    "1e3",
];
const SMALL_DECIMALS: &[&str] = &["0.00", "1.50", "-1.5", "5", "99999999.99", "0.1", "NaN"];
const FLOATS: &[&str] = &[
    "0",
    "-0",
    "1",
    "1.5",
    "0.1",
    "5",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e20",
    "1e-7",
    "16777217",
    "9007199254740993",
    "-1.5",
];
const TEXTS: &[&str] = &[
    "",
    " ",
    "a",
    "A",
    "ab",
    "ab ",
    "b",
    "é",
    "É",
    "ß",
    "😀",
    "a\"b",
    "a\\b",
    "a''b",
    "%",
    "_",
    "a%b",
    "a_b",
    "abab",
    "tab\there",
    "line\nbreak",
    "5",
    " 5 ",
    "true",
    "NaN",
    "\u{1}",
    "zz",
    "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
    "2026-11-20",
    "/",
];
const CHARS: &[&str] = &["", "a", "A", "ab", "ab ", "  b", "é", "a\"b", "%", "abcde", "5"];
const UUIDS: &[&str] = &[
    "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
];
const DATES: &[&str] = &[
    "2026-11-20",
    "2026-11-21",
    "2000-02-29",
    "1969-12-31",
    "0044-03-15 BC",
    "4714-11-24 BC",
    "5874897-12-31",
    "infinity",
    "-infinity",
    "10000-01-01",
];
const TIMESTAMPS: &[&str] = &[
    "2026-11-20 00:00:00",
    "2026-11-20T10:00:00.5",
    "2026-11-20 10:00:00.123456",
    "2026-11-20 10:00:00+02",
    "2026-11-20 12:30:00.5+02:30",
    "2026-11-20 05:00:00.5-05",
    "2026-11-21",
    "1999-12-31 23:59:59.999999",
    "0044-03-15 10:00 BC",
    "294276-12-31 12:00:00",
    "4714-11-25 00:00:00 BC",
    "infinity",
    "-infinity",
];
const TIMES: &[&str] = &["00:00:00", "10:00:00", "10:00:00.5", "23:59:59.999999", "24:00:00", "08:00:00"];
const ZONED_TIMES: &[&str] =
    &["10:00:00+02", "08:00:00Z", "08:00:00+00", "10:00:00.5+05:30", "10:00:00-05", "24:00:00+00", "00:00:00+15:59"];
const INTERVALS: &[&str] = &[
    "0",
    "1 day",
    "24:00:00",
    "1 mon",
    "30 days",
    "-1 year 2 days -00:00:03.5",
    "1 year",
    "12 mons",
    "360 days",
    "00:00:00.000001",
    "P1Y2M3DT4H5M6.5S",
    "2 hours",
    "120 min",
];
const BOOLS: &[&str] = &["true", "false"];
const LABELS: &[&str] = &["new", "paid", "on hold", "Ünïcode \"q\""];

const FAMILIES: &[Family] = &[
    Family {
        columns: &[
            ("i2", "smallint", "int2", INTS),
            ("i4", "integer", "int4", INTS),
            ("i8", "bigint", "int8", LARGE_INTS),
            ("num", "numeric", "numeric", DECIMALS),
            ("money2", "numeric(10,2)", "numeric", SMALL_DECIMALS),
            ("f4", "real", "float4", FLOATS),
            ("f8", "double precision", "float8", FLOATS),
        ],
        bare: &[
            "0",
            "1",
            "-1",
            "5",
            "+7",
            "1.5",
            "1.50",
            "0.1",
            ".5",
            "5.",
            "1e3",
            "1E-7",
            "16777217",
            "2147483648",
            "-2147483648",
            "9007199254740993",
            "9223372036854775807",
            "-9223372036854775808",
            "9223372036854775808",
            "123456789012345678901234567890.1234567890",
            "- 1",
            "-(-5)",
            "(5)",
        ],
        strings: &[" 5 ", "-0", "1e1", "inf", "-Infinity", "nan", "1_0", "x", "99999", "1e-400", ""],
        ordered: true,
    },
    Family {
        columns: &[
            ("t", "text", "text", TEXTS),
            ("t2", "varchar(60)", "varchar", TEXTS),
            ("\"Na me\"", "name", "text", TEXTS),
        ],
        bare: &[
            "(j->>'s')",
            "jb->>'s'",
            "j->'o'->>'s'",
            "(jb->'l')->>0",
            "j->>'n'",
            "jb->'l'->>-1",
            "j->>'o'",
            "jb->>'o'",
            "j->>'e'",
        ],
        strings: &["abc", "Ab"],
        ordered: true,
    },
    Family {
        columns: &[("c", "character(5)", "", CHARS), ("c2", "character(3)", "", &["a", "ab", "", "5"])],
        bare: &["j->>'s'", "'ab'::text", "'ab '::text"],
        strings: &["ab   ", "abcdef", " a"],
        ordered: true,
    },
    Family {
        columns: &[("u", "uuid", "uuid", UUIDS), ("u2", "uuid", "uuid", UUIDS)],
        bare: &["(j->>'u')::uuid", "(t)::uuid"],
        strings: &["A0EEBC999C0B4EF8BB6D6BB9BD380A11", "{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}", "a0eebc99"],
        ordered: true,
    },
    Family {
        columns: &[
            ("d", "date", "date", DATES),
            ("ts", "timestamp", "timestamp", TIMESTAMPS),
            ("tz", "timestamptz", "timestamptz", TIMESTAMPS),
        ],
        bare: &[
            "(j->>'d')::date",
            "(j->>'d')::timestamp",
            "(jb->>'d')::timestamptz",
            "date '2026-11-20'",
            "timestamp with time zone '2026-11-20 01:00+01'",
            "'2026-11-20 10:00'::timestamp::date",
            "date '2026-11-20'::timestamp",
        ],
        strings: &[
            "2026-11-20 24:00",
            "2026-11-20 23:59:60",
            "2026-2-3",
            "2026-02-30",
            " 2026-11-20 ",
            "2026-11-20T00:00:00Z",
        ],
        ordered: true,
    },
    Family {
        columns: &[("tm", "time", "time", TIMES), ("tmz", "timetz", "timetz", ZONED_TIMES)],
        bare: &["time '10:00'", "time with time zone '10:00+02'"],
        strings: &["10:00", "8:0:0", "25:00", "10:00:00.0000005"],
        ordered: true,
    },
    Family {
        columns: &[("iv", "interval", "interval", INTERVALS), ("iv2", "interval", "interval", INTERVALS)],
        bare: &["interval '1 day'", "'2 days'::interval"],
        strings: &["1 week", "1:30", "PT1M"],
        ordered: true,
    },
    Family {
        columns: &[("b", "boolean", "bool", BOOLS), ("b2", "boolean", "bool", BOOLS)],
        bare: &["true", "FALSE", "(i4 > 1)", "(j->>'b')::bool", "(t = 'a')", "(b IS NULL)", "'yes'::bool", "1::bool"],
        strings: &["t", "off", "1", "maybe"],
        ordered: true,
    },
    Family { columns: &[("e", "filter_status", "", LABELS)], bare: &["'paid'"], strings: &[], ordered: false },
];

/// Columns that only paths and `IS NULL` can use.
const OTHERS: &[(&str, &str, &[&str])] = &[
    ("j", "json", DOCUMENTS),
    ("jb", "jsonb", BINARY_DOCUMENTS),
    ("arr", "int[]", &["{}", "{1,NULL}"]),
    ("pt", "point", &["(1,2)"]),
];
const BINARY_DOCUMENTS: &[&str] = &[
    r#"{"n": 7, "s": "ab", "b": true, "o": {"s": "é\"", "l": [1, [2]]}, "l": ["a", null, 5], "u": "A0EEBC999C0B4EF8BB6D6BB9BD380A11", "d": "2026-11-20"}"#,
    r#"{"n": "1.5", "s": null, "o": [], "d": "infinity", "b": "off", "e": 1e3, "5": {"n": 0}}"#,
    r#"{"n": "x", "s": "A\u00e9\ud83d\ude00\t", "l": {}, "o": "plain", "b": "maybe", "u": "nope", "d": "2026-11-20 23:30-05"}"#,
    "{}",
    "[]",
    r#"[{"s": "ab"}, "b", 5]"#,
    "5",
    r#""ab""#,
    "true",
    r#"{"n": NaN0, "s": ""}"#,
];
const DOCUMENTS: &[&str] = &[
    BINARY_DOCUMENTS[0],
    BINARY_DOCUMENTS[1],
    BINARY_DOCUMENTS[2],
    "{}",
    "[]",
    r#"[{"s": "ab"}, "b", 5]"#,
    "5",
    r#""ab""#,
    "true",
    r#" { "n" : 1.50 , "s" : "a" , "s":"b", "\u006f":{"s" : "last" }, "e": [ 1 , {"x":[]} ] } "#,
    r#"{"n": 5e0, "o": {"s": 0.10}, "l": [1.0 ]}"#,
];

/// `CREATE TABLE` and a few hundred `INSERT`s of it.
pub(super) fn table(dice: &mut Dice, rows: usize) -> String {
    let mut names = vec!["n".to_owned()];
    let mut definitions = vec!["n integer".to_owned()];
    let mut pools: Vec<(&str, &[&str])> = Vec::new();
    for family in FAMILIES {
        for (name, definition, _, values) in family.columns {
            names.push((*name).to_owned());
            definitions.push(format!("{name} {definition}"));
            pools.push((definition, values));
        }
    }
    for (name, definition, values) in OTHERS {
        names.push((*name).to_owned());
        definitions.push(format!("{name} {definition}"));
        pools.push((definition, values));
    }
    let mut sql = format!("CREATE TABLE filter_rows ({});", definitions.join(", "));
    for row in 0..rows {
        let values: Vec<String> = pools.iter().map(|(kind, values)| cell(dice, kind, values)).collect();
        sql.push_str(&format!("INSERT INTO filter_rows VALUES ({row}, {});", values.join(", ")));
    }
    sql
}

fn cell(dice: &mut Dice, kind: &str, values: &[&str]) -> String {
    if dice.one_in(6) {
        return "NULL".to_owned();
    }
    let value = loop {
        let value = dice.pick(values);
        if !value.contains("NaN0") {
            break value;
        }
    };
    match kind {
        "boolean" => value.to_owned(),
        _ => string(value),
    }
}

/// A literal; the values' quotes are doubled already.
fn string(value: &str) -> String {
    if value.contains("''") { format!("'{value}'") } else { format!("'{}'", value.replace('\'', "''")) }
}

/// A condition; `depth` bounds its nesting.
pub(super) fn condition(dice: &mut Dice, depth: usize) -> String {
    let nested = depth > 0;
    match dice.below(if nested { 16 } else { 10 }) {
        0..=3 => comparison(dice),
        4 => in_list(dice),
        5 => between(dice),
        6 => like(dice),
        7 => distinct(dice),
        8 => null_test(dice),
        9 => dice
            .pick(&["b", "b2", "NOT b", "(j->>'b')::bool", "NULL", "'t'", "b IS NOT TRUE", "b2 IS UNKNOWN"])
            .to_owned(),
        10 => format!("NOT {}", condition(dice, depth - 1)),
        11 => format!(
            "({}) {}",
            condition(dice, depth - 1),
            dice.pick(&["IS TRUE", "IS NOT FALSE", "IS UNKNOWN", "IS NULL", "= b"])
        ),
        12 | 13 => format!("{} AND {}", condition(dice, depth - 1), condition(dice, depth - 1)),
        14 => format!("({} OR {})", condition(dice, depth - 1), condition(dice, depth - 1)),
        _ => format!("{} OR {}", condition(dice, depth - 1), condition(dice, depth - 1)),
    }
}

fn family(dice: &mut Dice) -> &'static Family {
    // Numbers are where the rules are.
    if dice.one_in(4) { &FAMILIES[0] } else { &FAMILIES[dice.below(FAMILIES.len())] }
}

fn comparison(dice: &mut Dice) -> String {
    let left_family = family(dice);
    // Now and then two that do not fit, which both must refuse.
    let right_family = if dice.one_in(15) { family(dice) } else { left_family };
    let operator =
        if left_family.ordered { dice.pick(&["=", "<>", "<", "<=", ">", ">=", "!="]) } else { dice.pick(&["=", "<>"]) };
    // Postgres reads `!=-1` as an operator `!=-`, which we are kinder to.
    let blank = if operator == "!=" { " " } else { dice.pick(&[" ", " ", ""]) };
    let left = if dice.one_in(2) { column(dice, left_family) } else { operand(dice, left_family) };
    format!("{left}{blank}{operator}{blank}{}", operand(dice, right_family))
}

fn operand(dice: &mut Dice, family: &Family) -> String {
    // Two enum columns may be of two types, which is not known here; so they are refused.
    if dice.one_in(2) && family.ordered { column(dice, family) } else { literal(dice, family) }
}

fn column(dice: &mut Dice, family: &Family) -> String {
    family.columns[dice.below(family.columns.len())].0.to_owned()
}

fn literal(dice: &mut Dice, family: &Family) -> String {
    let (_, _, cast, values) = family.columns[dice.below(family.columns.len())];
    match dice.below(12) {
        0 => "NULL".to_owned(),
        1..=3 => family.bare[dice.below(family.bare.len())].to_owned(),
        4 if !family.strings.is_empty() => string(dice.pick(family.strings)),
        5 | 6 if !cast.is_empty() => format!("{}::{cast}", string(dice.pick(values))),
        7 if cast == "numeric" || cast.starts_with("int") || cast.starts_with("float") => {
            format!("({})::{cast}", dice.pick(&["j->>'n'", "jb->>'n'", "jb->'5'->>'n'", "t", "j->'o'->>'s'"]))
        }
        8 if cast.starts_with("int") || cast.starts_with("float") => {
            format!("{}::{cast}", dice.pick(&["5", "1.5", "2.5", "-1.5", "0.1"]))
        }
        _ => string(dice.pick(values)),
    }
}

fn in_list(dice: &mut Dice) -> String {
    let family = family(dice);
    let item = if dice.one_in(10) { literal(dice, family) } else { column(dice, family) };
    let count = 1 + dice.below(4);
    let elements: Vec<_> = (0..count)
        .map(|_| if dice.one_in(8) && family.ordered { column(dice, family) } else { literal(dice, family) })
        .collect();
    format!("{item} {} ({})", dice.pick(&["IN", "NOT IN"]), elements.join(", "))
}

fn between(dice: &mut Dice) -> String {
    let family = loop {
        let family = family(dice);
        if family.ordered {
            break family;
        }
    };
    let word =
        dice.pick(&["BETWEEN", "NOT BETWEEN", "BETWEEN SYMMETRIC", "NOT BETWEEN SYMMETRIC", "BETWEEN ASYMMETRIC"]);
    format!("{} {word} {} AND {}", operand(dice, family), operand(dice, family), operand(dice, family))
}

fn like(dice: &mut Dice) -> String {
    let item = dice.pick(&["t", "t2", "c", "\"Na me\"", "j->>'s'", "jb->>'s'", "'ab'", "j->>'o'"]);
    let count = dice.below(5);
    let pieces = ["%", "_", "a", "b", "A", "é", "É", " ", "\\%", "\\_", "\\\\", "!%", "\"", "😀", "%%"];
    let pattern: String = (0..count).map(|_| dice.pick(&pieces)).collect();
    let escape = dice.pick(&["", "", "", " ESCAPE '!'", " ESCAPE ''", " ESCAPE '\\'", " ESCAPE '%'", " ESCAPE NULL"]);
    format!("{item} {} '{pattern}'{escape}", dice.pick(&["LIKE", "NOT LIKE", "ILIKE", "NOT ILIKE"]))
}

fn distinct(dice: &mut Dice) -> String {
    let family = family(dice);
    format!("{} IS {}DISTINCT FROM {}", column(dice, family), dice.pick(&["", "NOT "]), operand(dice, family))
}

fn null_test(dice: &mut Dice) -> String {
    let family = family(dice);
    let item = if dice.one_in(2) {
        dice.pick(&[
            "arr",
            "pt",
            "j->'s'",
            "jb->'s'",
            "j->'l'->1",
            "jb->0",
            "j->0->'s'",
            "jb->-1",
            "j->'o'->'l'->1->0",
            "j",
            "jb",
        ])
        .to_owned()
    } else {
        operand(dice, family)
    };
    format!("{item} IS {}NULL", dice.pick(&["", "NOT "]))
}
