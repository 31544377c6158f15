//! The house's rules, kept by reading the sources and the docs (`docs/ARCHITECTURE.md`, "Floors").
//!
//! Needs no database. Each exception stands here by name, with its reason, and must still be needed. Where a rule is in the
//! way of something better, change the rule in the same commit.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tidewire::config::Settings;
use tidewire::protocol::close::CloseCode;
use tidewire::protocol::error::ErrorCode;
use tidewire::protocol::message::{ResyncReason, Source};
use tidewire::telemetry::metrics::Metrics;

/// Pure rooms: files, or folders with everything in them. No tokio, sqlx, axum; no clock; nothing above them.
const GROUND: &[&str] = &[
    "src/auth/key.rs",
    "src/auth/scope/",
    "src/backoff.rs",
    "src/client/machine.rs",
    "src/client/requests.rs",
    "src/cursor.rs",
    "src/event.rs",
    "src/event/",
    "src/feed.rs",
    "src/feed/",
    "src/filter/",
    "src/follower/belief.rs",
    "src/follower/lookup.rs",
    "src/hub/group.rs",
    "src/hub/group/",
    "src/hub/plan.rs",
    "src/hub/plan/",
    "src/hub/shape.rs",
    "src/schema/diff.rs",
    "src/hub/ring.rs",
    "src/hub/routes.rs",
    "src/hub/shape.rs",
    "src/protocol/",
    "src/schema/diff.rs",
    "src/session/machine.rs",
    "src/table_name.rs",
];

/// What ground rooms may name of this crate. A room's own files may name each other.
const GROUND_MODULES: &[&str] = &[
    "auth::key",
    "auth::scope",
    "backoff",
    "client", // its pure files share the client's types; which of them do I/O is said by GROUND
    "cursor",
    "event",
    "feed",
    "filter",
    "hub::group",
    "hub::plan",
    "hub::ring",
    "hub::routes",
    "hub::shape",
    "mutant", // a constant in every build but the campaign's
    "protocol",
    "schema::diff",
    "session::machine",
    "table_name",
];

/// The first floor: the only SQL in the house.
const FIRST_FLOOR: &[&str] =
    &["src/auth/store/", "src/auth/ticket.rs", "src/log/", "src/postgres/", "src/schema/", "src/source/"];

/// SQL elsewhere, and why.
const SQL_EXCEPTIONS: &[(&str, &str)] = &[
    ("src/relay.rs", "the park lock: taken and freed on the leader's own connection, between two claims"),
    ("src/relay/announce.rs", "pg_notify is this room's whole work"),
    ("src/relay/election.rs", "the leader's lock: on the connection that then relays"),
    ("src/relay/upkeep.rs", "limits of its own session before retention's statements"),
    ("src/dev/", "the roof: plays the administrator and an application"),
    ("src/cli/", "the roof: plays the administrator and, in bench, an application"),
];

/// axum's rooms.
const AXUM: &[&str] = &["src/http.rs", "src/http/"];

/// Longer files have not separated their pure part.
const MAX_LINES: usize = 800;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files below `folder` with one of these endings, relative to the root, in order.
fn files(folder: &str, endings: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(root().join(&folder)) else { continue };
        for entry in entries {
            let entry = entry.unwrap();
            let path = folder.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
            } else {
                found.push(path.to_str().unwrap().to_owned());
            }
        }
    }
    found.retain(|path| endings.iter().any(|ending| path.ends_with(ending)));
    found.sort();
    found
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What a source file says in code, without its tests and comments.
fn code(path: &str) -> String {
    if path.ends_with("/tests.rs") || path.contains("/tests/") {
        return String::new();
    }
    let text = read(path);
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let lines = text.lines().map(|line| match line.trim_start().starts_with("//") {
        true => "",
        false => line.split(" // ").next().unwrap_or_default(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn is_in(path: &str, rooms: &[&str]) -> bool {
    rooms.iter().any(|room| path == *room || (room.ends_with('/') && path.starts_with(room)))
}

/// Whether `text` contains `word`, not as part of a longer name.
fn says(text: &str, word: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(is_name) && !text[at + word.len()..].starts_with(is_name))
}

fn has_sql(code: &str) -> bool {
    ["sqlx::query", "sqlx::raw_sql"].iter().any(|call| code.contains(call))
}

#[track_caller]
fn none(violations: &[String], rule: &str) {
    assert!(violations.is_empty(), "{rule}:\n  {}", violations.join("\n  "));
}

#[test]
fn every_room_that_a_rule_names_exists() {
    let rooms = GROUND.iter().chain(AXUM).chain(SQL_EXCEPTIONS.iter().map(|(room, _)| room));
    let missing: Vec<String> =
        rooms.filter(|room| !root().join(room).exists()).map(|room| (*room).to_owned()).collect();
    none(&missing, "these rooms are gone; take them off the lists");
}

#[test]
fn ground_rooms_are_pure() {
    let mut violations = Vec::new();
    for path in files("src", &[".rs"]).iter().filter(|path| is_in(path, GROUND)) {
        let code = code(path);
        let names = ["tokio", "sqlx", "axum", "tokio_tungstenite"].iter().filter(|name| says(&code, name));
        violations.extend(names.map(|name| format!("{path} names {name}")));
        let clocks = ["Instant::now", "SystemTime::now", "Utc::now", "Local::now", ".elapsed()"];
        let clocks = clocks.iter().filter(|clock| code.contains(**clock));
        violations.extend(clocks.map(|clock| format!("{path} reads a clock: {clock}")));
    }
    none(&violations, "ground rooms do no I/O and are told the time");
}

#[test]
fn ground_rooms_stand_on_ground() {
    let mut violations = Vec::new();
    for path in files("src", &[".rs"]).iter().filter(|path| is_in(path, GROUND)) {
        let code = code(path);
        for (at, _) in code.match_indices("crate::") {
            let name = &code[at + "crate::".len()..];
            let end = name.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').unwrap_or(name.len());
            let allowed = |module: &str| {
                name[..end].strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
            };
            if !GROUND_MODULES.iter().any(|module| allowed(module)) {
                violations.push(format!("{path} names crate::{}", &name[..end]));
            }
        }
    }
    none(&violations, "arrows point down only");
}

#[test]
fn sql_stands_on_the_first_floor_only() {
    let exceptions: Vec<&str> = SQL_EXCEPTIONS.iter().map(|(room, _)| *room).collect();
    let with_sql: Vec<String> = files("src", &[".rs"]).into_iter().filter(|path| has_sql(&code(path))).collect();
    let elsewhere: Vec<String> =
        with_sql.iter().filter(|path| !is_in(path, FIRST_FLOOR) && !is_in(path, &exceptions)).cloned().collect();
    none(&elsewhere, "SQL belongs into the first floor (or into SQL_EXCEPTIONS, with a reason)");
    let idle = exceptions.iter().filter(|room| !with_sql.iter().any(|path| is_in(path, &[room])));
    none(&idle.map(|room| (*room).to_owned()).collect::<Vec<_>>(), "these exceptions are not needed any more");
}

#[test]
fn axum_stays_at_the_edge() {
    let elsewhere = files("src", &[".rs"]).into_iter().filter(|path| says(&code(path), "axum") && !is_in(path, AXUM));
    none(&elsewhere.collect::<Vec<_>>(), "axum is named in http only");
}

#[test]
fn every_file_says_what_it_is_and_stays_readable() {
    let mut violations = Vec::new();
    for path in files("src", &[".rs"]).into_iter().chain(files("tests", &[".rs"])) {
        let text = read(&path);
        if !text.starts_with("//!") {
            violations.push(format!("{path} does not begin with a module doc"));
        }
        let lines = text.lines().count();
        if lines > MAX_LINES {
            violations.push(format!("{path} has {lines} lines, more than {MAX_LINES}"));
        }
    }
    none(&violations, "a head for every file, and an end");
}

#[test]
fn nothing_is_left_for_later() {
    // Put together here, so that this file does not name them.
    let marks =
        [["TO", "DO"], ["FIX", "ME"], ["X", "XX"], ["to", "do!("], ["unimpl", "emented!("]].map(|mark| mark.concat());
    let mut violations = Vec::new();
    for path in
        ["src", "tests", "migrations", "deploy"].iter().flat_map(|top| files(top, &[".rs", ".sql", "Dockerfile"]))
    {
        for (number, line) in read(&path).lines().enumerate() {
            let found = marks.iter().filter(|mark| match mark.strip_suffix('(') {
                Some(call) => line.contains(call),
                None => says(line, mark),
            });
            violations.extend(found.map(|mark| format!("{path}:{} has {mark}", number + 1)));
        }
    }
    none(&violations, "what is unfinished is not merged, what is for later is an issue");
}

/// Names of an enum's variants as `snake_case`, read from its source: for enums whose variants carry data.
fn variants(source: &str, name: &str) -> Vec<String> {
    let body = source.split(&format!("pub enum {name} {{")).nth(1).and_then(|rest| rest.split("\n}").next());
    let body = body.unwrap_or_else(|| panic!("no enum {name}"));
    let starts = body.lines().filter_map(|line| line.strip_prefix("    "));
    let names = starts.filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase()));
    names.map(|line| snake(line.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default())).collect()
}

fn snake(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[test]
fn the_protocols_page_names_everything_on_the_wire() {
    let page = read("docs/PROTOCOL.md");
    let source = read("src/protocol/message.rs");
    let mut names = vec!["events".to_owned()];
    names.extend(["ClientMessage", "ServerMessage", "From"].iter().flat_map(|name| variants(&source, name)));
    assert!(names.len() > 15, "the enums were not found: {names:?}");
    names.extend(ErrorCode::ALL.iter().map(|code| code.as_str().to_owned()));
    names.extend(ResyncReason::ALL.iter().map(|reason| reason.as_str().to_owned()));
    let sources = [Source::Live, Source::Memory, Source::History, Source::Snapshot];
    names.extend(sources.map(|source| source.as_str().to_owned()));
    let is_named = |name: &str| {
        [format!("`{name}`"), format!("`\"{name}\"`"), format!("{{\"{name}\":")].iter().any(|text| page.contains(text))
    };
    let mut missing: Vec<String> = names.into_iter().filter(|name| !is_named(name)).collect();
    let codes = CloseCode::ALL.iter().map(|code| code.code());
    missing
        .extend(codes.filter(|code| !page.contains(&format!("\n| {code} |"))).map(|code| format!("close code {code}")));
    none(&missing, "docs/PROTOCOL.md does not name");
}

#[test]
fn the_runbook_names_every_metric_and_no_other() {
    let page = read("docs/RUNBOOK.md");
    let missing = Metrics::NAMES.iter().filter(|name| !page.contains(&format!("\n| `{name}` |")));
    none(&missing.map(|name| (*name).to_owned()).collect::<Vec<_>>(), "docs/RUNBOOK.md, Metrics, has no line for");

    let roles_and_channels = ["tidewire_owner", "tidewire_app", "tidewire_capture", "tidewire_feed", "tidewire_leader"];
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    let said: BTreeSet<&str> =
        page.match_indices("tidewire_").filter_map(|(at, _)| page[at..].split(|c| !is_name(c)).next()).collect();
    let known = |name: &str| {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        roles_and_channels.contains(&name) || Metrics::NAMES.contains(&name) || Metrics::NAMES.contains(&family)
    };
    let unknown: Vec<String> = said.into_iter().filter(|name| !known(name)).map(str::to_owned).collect();
    none(&unknown, "docs/RUNBOOK.md speaks of metrics that do not exist");
}

#[test]
fn the_runbook_names_every_setting() {
    let page = read("docs/RUNBOOK.md");
    let missing = Settings::VARIABLES.iter().filter(|name| !page.contains(&format!("`{name}`")));
    none(&missing.map(|name| (*name).to_owned()).collect::<Vec<_>>(), "docs/RUNBOOK.md, Settings, has no line for");
}

#[test]
fn a_landed_migration_never_changes() {
    let recorded = read("tests/it/migrations.sha256");
    let recorded: Vec<(&str, &str)> = recorded.lines().filter_map(|line| line.split_once("  ")).collect();
    let mut violations = Vec::new();
    for (want, path) in &recorded {
        match std::fs::read(root().join(path)) {
            Ok(bytes) if hex(&Sha256::digest(&bytes)) == *want => {}
            Ok(_) => {
                violations.push(format!("{path} has changed: databases out there have run it. Add another migration"))
            }
            Err(error) => violations.push(format!("{path}: {error}")),
        }
    }
    for path in files("migrations", &[".sql"]) {
        if !recorded.iter().any(|(_, known)| *known == path) {
            let sum = hex(&Sha256::digest(std::fs::read(root().join(&path)).unwrap()));
            violations.push(format!("new: add this line to tests/it/migrations.sha256\n{sum}  {path}"));
        }
    }
    none(&violations, "migrations");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A page's text without its code blocks.
fn prose(page: &str) -> String {
    page.split("\n```").step_by(2).collect()
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn anchors(path: &str) -> Vec<String> {
    let text = prose(&read(path));
    text.lines().filter(|line| line.starts_with('#')).map(|line| anchor(line.trim_start_matches('#'))).collect()
}

#[test]
fn the_docs_links_lead_somewhere() {
    let mut pages = files("docs", &[".md"]);
    pages.extend(["README.md", "CHANGELOG.md", "CONTRIBUTING.md"].map(str::to_owned));
    let mut broken = Vec::new();
    for page in &pages {
        let text = prose(&read(page));
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://") && !link.starts_with("mailto:")) {
            let (path, wanted) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => PathBuf::from(page),
                _ => Path::new(page).parent().unwrap_or(Path::new("")).join(path),
            };
            let exists = root().join(&target).exists();
            if !exists || (!wanted.is_empty() && !anchors(target.to_str().unwrap()).iter().any(|have| have == wanted)) {
                broken.push(format!("{page}: {link}"));
            }
        }
    }
    none(&broken, "broken links");
}

#[test]
fn ci_runs_the_readmes_test_command() {
    let runs = |page: &str| read(page).lines().any(|line| line.trim() == "cargo test");
    assert!(runs("README.md") && runs(".ci/run"), "README.md and .ci/run each have the line `cargo test`");
}
