//! `tidewire keys`: make, list and revoke API keys.
//!
//! A key is shown when it is made and never again; everything else here is safe to paste into a ticket.

mod check;

use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, bail};
use chrono::{DateTime, TimeDelta, Utc};
use clap::{Args, Subcommand};
use serde_json::json;

use crate::auth::key::{ApiKey, KeyId};
use crate::auth::scope::{DEFAULT_MAX_CONNECTIONS, OpSet, Scopes, TableScope};
use crate::auth::store::{self, CreateKeyError, KeyInfo, Revocation};
use crate::cli::connect::explained;
use crate::event::Operation;
use crate::postgres::Pool;
use crate::table_name::TablePattern;

pub use self::check::{Findings, check};

/// Longest life of a key that expires, days: a century.
const MAX_EXPIRES_IN_DAYS: i64 = 36_500;

/// Make, list and revoke API keys
#[derive(Args, Clone, Debug)]
#[command(after_help = "\
Tables, columns and conditions are checked when a key is made: what can never work is refused, what does not work yet
(a table that is not there or not tracked) is a warning.

Examples:
  tidewire keys create --name web --table public.orders --column id --column status --condition \"status <> 'draft'\"
  tidewire keys create --name audit --table '*' --table 'event:*' --history --expires-in 90d
  tidewire keys create --name ops --admin
  tidewire keys list --json
  tidewire keys revoke 4fT0aZ81kQxM")]
pub struct KeysArgs {
    #[command(subcommand)]
    command: Command,
    /// Print JSON for machines
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Subcommand, Clone, Debug)]
enum Command {
    /// Make a key; it is shown once
    Create(Box<Create>),
    /// List all keys, without their secrets
    List,
    /// Revoke a key; its connections close within a second
    Revoke {
        /// The key's id: the part between the first two underscores
        key_id: KeyId,
    },
}

/// What a new key may do. `--op`, `--column`, `--hide-column` and `--condition` hold for every `--table` given with them;
/// for tables that differ, give `--scopes`.
#[derive(Args, Clone, Debug)]
struct Create {
    /// What the key is for
    #[arg(long)]
    name: String,
    /// A table it may read: table, schema.table, schema.*, * (every table), event:type, event:* (repeat for more)
    #[arg(long = "table", value_name = "TABLE")]
    tables: Vec<TablePattern>,
    /// Only this operation: insert, update, delete, truncate, event (repeat for more)
    #[arg(long = "op", value_name = "OP", requires = "tables", value_parser = operation)]
    ops: Vec<Operation>,
    /// Only this column (repeat for more)
    #[arg(long = "column", value_name = "COLUMN", requires = "tables")]
    columns: Vec<String>,
    /// Not this column (repeat for more)
    #[arg(long = "hide-column", value_name = "COLUMN", requires = "tables")]
    hidden_columns: Vec<String>,
    /// Only rows that satisfy this SQL condition
    #[arg(long, value_name = "SQL", requires = "tables")]
    condition: Option<String>,
    /// May use the administrative resources
    #[arg(long)]
    admin: bool,
    /// May begin at the oldest event that is kept (`from: "oldest"`); resuming from a cursor needs no such right
    #[arg(long)]
    history: bool,
    /// Connections over the whole cluster
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_CONNECTIONS)]
    max_connections: u32,
    /// Everything: every table and domain event, history, administration
    #[arg(long, conflicts_with_all = ["tables", "scopes"])]
    all: bool,
    /// A file with the scopes as JSON
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tables", "admin", "history", "max_connections"])]
    scopes: Option<PathBuf>,
    /// Life of the key, such as 12h, 30d or 52w; without it the key never expires
    #[arg(long, value_name = "TIME")]
    expires_in: Option<Life>,
}

/// Runs the command against this database, and prints to standard output.
///
/// # Errors
/// Scopes that cannot be, an unknown key, Postgres away, a closed standard output.
#[expect(clippy::disallowed_methods, reason = "the edge: ages are shown by the clock on the wall")]
pub async fn run(args: KeysArgs, pool: &Pool) -> anyhow::Result<()> {
    let mut out = Vec::new();
    match args.command {
        Command::Create(create) => self::create(&create, args.json, pool, &mut out).await?,
        Command::List => {
            let keys = match store::list(pool).await {
                Ok(keys) => keys,
                Err(error) => return Err(explained(pool, error).await.context("the keys could not be read")),
            };
            show_list(&keys, args.json, Utc::now(), &mut out)?;
        }
        Command::Revoke { key_id } => {
            let revocation = match store::revoke(pool, &key_id).await {
                Ok(revocation) => revocation,
                Err(error) => return Err(explained(pool, error).await.context("the key could not be revoked")),
            };
            show_revocation(&key_id, revocation, args.json, &mut out)?;
        }
    }
    std::io::stdout().lock().write_all(&out)?;
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "the edge: a life in days begins now")]
async fn create(create: &Create, json: bool, pool: &Pool, out: &mut impl Write) -> anyhow::Result<()> {
    let scopes = create.scopes()?;
    let found = match check(pool, &scopes).await {
        Err(error) => {
            return Err(explained(pool, error).await.context("the scopes could not be checked against the database"));
        }
        Ok(found) => found,
    };
    if !found.errors.is_empty() {
        bail!("no key was made, it could not work:\n  {}", found.errors.join("\n  "));
    }
    let expires_at = create.expires_in.map(|life| Utc::now() + life.0);
    let key = match store::create_key(pool, &create.name, &scopes, expires_at).await {
        Err(CreateKeyError::Database(error)) => {
            return Err(explained(pool, error).await.context("the key could not be stored"));
        }
        key => key?,
    };
    let created = Created { key: &key, name: &create.name, scopes: &scopes, expires_at, warnings: &found.warnings };
    show_created(&created, json, out)
}

impl Create {
    fn scopes(&self) -> anyhow::Result<Scopes> {
        if self.all {
            return Ok(Scopes::all(self.max_connections));
        }
        if let Some(path) = &self.scopes {
            let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
            return serde_json::from_str(&text).with_context(|| format!("{} holds no scopes", path.display()));
        }
        if self.tables.is_empty() && !self.admin {
            bail!("this key could do nothing: give --table, --admin, --scopes or --all");
        }
        let ops = if self.ops.is_empty() { OpSet::ALL } else { self.ops.iter().copied().collect() };
        let entry = |pattern: &TablePattern| TableScope {
            ops,
            columns: (!self.columns.is_empty()).then(|| self.columns.clone()),
            hidden_columns: self.hidden_columns.clone(),
            condition: self.condition.clone(),
            ..TableScope::new(pattern.clone())
        };
        Ok(Scopes::new(self.tables.iter().map(entry).collect(), self.admin, self.history, self.max_connections)?)
    }
}

/// A key to be shown, once.
struct Created<'a> {
    key: &'a ApiKey,
    name: &'a str,
    scopes: &'a Scopes,
    expires_at: Option<DateTime<Utc>>,
    warnings: &'a [String],
}

fn show_created(created: &Created<'_>, json: bool, out: &mut impl Write) -> anyhow::Result<()> {
    let Created { key, name, scopes, expires_at, warnings } = created;
    if json {
        let shown = json!({
            "key_id": key.id(), "key": key.expose(), "name": name, "scopes": scopes, "expires_at": expires_at,
            "warnings": warnings,
        });
        writeln!(out, "{shown}")?;
        return Ok(());
    }
    writeln!(out, "{}\n", key.expose())?;
    writeln!(out, "This is the only time that this key is shown: store it now. The database holds its hash alone.")?;
    writeln!(out, "Id {}, for {:?}, {}.", key.id(), name, expiry(*expires_at))?;
    writeln!(out, "It may {}.", summary(scopes))?;
    for warning in *warnings {
        writeln!(out, "Warning: {}", plain(warning))?;
    }
    Ok(())
}

/// Without what steers a terminal.
fn plain(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}

fn show_list(keys: &[KeyInfo], json: bool, now: DateTime<Utc>, out: &mut impl Write) -> anyhow::Result<()> {
    if json {
        writeln!(out, "{}", serde_json::to_string(keys)?)?;
        return Ok(());
    }
    if keys.is_empty() {
        writeln!(out, "There are no keys. `tidewire keys create --help` shows how to make one.")?;
        return Ok(());
    }
    let width = keys.iter().map(|key| key.name.chars().count()).max().unwrap_or(0).clamp(4, 40);
    writeln!(out, "{:12}  {:width$}  {:8}  {:16}  {:16}  MAY", "ID", "NAME", "STATE", "LAST USED", "EXPIRES")?;
    for key in keys {
        let state = match (key.is_active, key.expires_at) {
            (false, _) => "revoked",
            (true, Some(at)) if at <= now => "expired",
            (true, _) => "active",
        };
        let scopes = serde_json::from_value::<Scopes>(key.scopes.clone());
        let may = scopes.as_ref().map_or_else(|error| format!("(unreadable: {error})"), summary);
        writeln!(
            out,
            "{:12}  {:width$}  {state:8}  {:16}  {:16}  {may}",
            key.key_id,
            key.name.escape_debug().to_string(),
            minute(key.last_used_at),
            minute(key.expires_at),
        )?;
    }
    Ok(())
}

fn show_revocation(key_id: &KeyId, revocation: Revocation, json: bool, out: &mut impl Write) -> anyhow::Result<()> {
    match revocation {
        Revocation::UnknownKey => bail!("there is no key {key_id}: see `tidewire keys list`"),
        _ if json => writeln!(out, "{}", json!({"key_id": key_id, "result": revocation}))?,
        Revocation::Revoked => writeln!(out, "Key {key_id} is revoked; its connections close within a second.")?,
        Revocation::AlreadyRevoked => writeln!(out, "Key {key_id} was revoked before.")?,
    }
    Ok(())
}

fn minute(at: Option<DateTime<Utc>>) -> String {
    at.map_or_else(|| "never".to_owned(), |at| at.format("%Y-%m-%d %H:%M").to_string())
}

fn expiry(at: Option<DateTime<Utc>>) -> String {
    at.map_or_else(|| "never expires".to_owned(), |at| format!("expires {} UTC", at.format("%Y-%m-%d %H:%M")))
}

/// Scopes in a few words: "read public.orders (INSERT; only id; where x = 1), history, 1000 connections".
fn summary(scopes: &Scopes) -> String {
    let mut parts: Vec<String> = scopes.tables().iter().map(table_summary).collect();
    match parts.first_mut() {
        Some(first) => first.insert_str(0, "read "),
        None => parts.push("read nothing".to_owned()),
    }
    parts.extend(scopes.history().then(|| "history".to_owned()));
    parts.extend(scopes.admin().then(|| "administration".to_owned()));
    parts.push(format!("{} connections", scopes.max_connections()));
    parts.join(", ")
}

fn table_summary(scope: &TableScope) -> String {
    if scope.ops.is_empty() {
        return format!("{} (nothing)", scope.pattern);
    }
    let mut limits = Vec::new();
    if !scope.ops.is_all() {
        limits.push(scope.ops.iter().map(Operation::as_str).collect::<Vec<_>>().join(" "));
    }
    limits.extend(scope.columns.as_ref().map(|columns| format!("only {}", columns.join(" "))));
    limits.extend((!scope.hidden_columns.is_empty()).then(|| format!("without {}", scope.hidden_columns.join(" "))));
    limits.extend(scope.condition.as_ref().map(|condition| format!("where {condition}")));
    let limits = if limits.is_empty() { String::new() } else { format!(" ({})", limits.join("; ")) };
    format!("{}{limits}", scope.pattern)
}

/// A key's life, from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Life(TimeDelta);

impl FromStr for Life {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("{text:?} is no time: write a number and s, m, h, d or w, such as 30d");
        let unit = text.chars().last().ok_or_else(refused)?;
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3_600,
            'd' => 86_400,
            'w' => 7 * 86_400,
            _ => return Err(refused()),
        };
        let number: u32 = text[..text.len() - 1].parse().map_err(|_| refused())?;
        let life = TimeDelta::seconds(i64::from(number) * seconds);
        match life {
            life if life.is_zero() => Err("a key that expires at once is of no use".to_owned()),
            life if life.num_days() > MAX_EXPIRES_IN_DAYS => Err(format!("at most {MAX_EXPIRES_IN_DAYS}d")),
            life => Ok(Self(life)),
        }
    }
}

fn operation(text: &str) -> Result<Operation, String> {
    Operation::parse(&text.to_ascii_uppercase())
        .filter(|operation| *operation != Operation::Schema)
        .ok_or_else(|| "one of insert, update, delete, truncate, event".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    #[derive(Parser, Debug)]
    struct Program {
        #[command(flatten)]
        keys: KeysArgs,
    }

    fn scopes(line: &[&str]) -> Result<Scopes, String> {
        let words = ["tidewire", "create", "--name", "test"].iter().chain(line);
        let program = Program::try_parse_from(words).map_err(|error| error.to_string())?;
        let Command::Create(create) = program.keys.command else { panic!("not create") };
        create.scopes().map_err(|error| error.to_string())
    }

    #[test]
    fn options_hold_for_every_table_given_with_them() {
        let made = scopes(&[
            "--table",
            "orders",
            "--table",
            "sales.*",
            "--op",
            "insert",
            "--op",
            "UPDATE",
            "--column",
            "id",
            "--hide-column",
            "cost",
            "--condition",
            "id > 5",
            "--history",
            "--max-connections",
            "7",
        ])
        .unwrap();
        for name in ["public.orders", "sales.lines"] {
            let access = made.table(name).unwrap();
            assert_eq!(access.ops, OpSet::INSERT.with(OpSet::UPDATE));
            assert!(access.columns.allows("id") && !access.columns.allows("cost"));
            assert_eq!(access.condition.as_deref(), Some("id > 5"));
        }
        assert_eq!((made.admin(), made.history(), made.max_connections()), (false, true, 7));
        assert_eq!(
            summary(&made),
            "read public.orders (INSERT UPDATE; only id; without cost; where id > 5), \
             sales.* (INSERT UPDATE; only id; without cost; where id > 5), history, 7 connections"
        );
    }

    #[test]
    fn a_key_that_could_do_nothing_is_not_made() {
        assert!(scopes(&[]).unwrap_err().contains("could do nothing"));
        assert!(scopes(&["--op", "insert"]).unwrap_err().contains("--table"));
        assert!(scopes(&["--table", "a b"]).unwrap_err().contains("double quotes"));
        assert!(scopes(&["--table", "a", "--op", "schema"]).unwrap_err().contains("one of insert"));
        assert!(scopes(&["--table", "a", "--table", "public.a"]).unwrap_err().contains("two entries"));
        assert!(scopes(&["--all", "--table", "a"]).is_err());
        assert_eq!(summary(&scopes(&["--admin"]).unwrap()), "read nothing, administration, 1000 connections");
        assert_eq!(scopes(&["--all", "--max-connections", "9"]).unwrap(), Scopes::all(9));
    }

    #[test]
    fn lives_are_read_with_their_unit() {
        assert_eq!("30d".parse(), Ok(Life(TimeDelta::days(30))));
        assert_eq!("2w".parse(), Ok(Life(TimeDelta::days(14))));
        for text in ["", "d", "30", "-1d", "1.5h", "0s", "4000000000w", "1é", "é"] {
            assert!(text.parse::<Life>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_secret_is_shown_once_and_the_sentence_says_so() {
        let key = ApiKey::generate(&mut StdRng::seed_from_u64(1));
        let mut out = Vec::new();
        let scopes = Scopes::all(5);
        let warnings = ["a \u{1b} warning".to_owned()];
        let created = Created { key: &key, name: "web", scopes: &scopes, expires_at: None, warnings: &warnings };
        show_created(&created, false, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.matches(key.expose()).count(), 1);
        assert!(text.contains("only time that this key is shown"));
        assert!(text.contains("Warning: a ") && !text.contains('\u{1b}'), "{text}");
        let mut out = Vec::new();
        show_created(&created, true, &mut out).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value["key"], key.expose());
        assert_eq!(value["key_id"], key.id().as_str());
    }

    #[test]
    fn a_list_tells_each_keys_state() {
        let now = DateTime::UNIX_EPOCH + TimeDelta::days(10);
        let info = |is_active, expires_at| KeyInfo {
            key_id: "abcdefghijkl".to_owned(),
            name: "we\u{1b}b".to_owned(),
            scopes: json!({"tables": [{"table": "public.orders"}]}),
            created_at: DateTime::UNIX_EPOCH,
            last_used_at: None,
            is_active,
            expires_at,
        };
        let keys = [info(true, None), info(true, Some(now)), info(false, Some(now))];
        let mut out = Vec::new();
        show_list(&keys, false, now, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let states: Vec<_> = text.lines().skip(1).map(|line| line.split_whitespace().nth(2).unwrap()).collect();
        assert_eq!(states, ["active", "expired", "revoked"]);
        assert!(!text.contains('\u{1b}'), "a name cannot steer the terminal");
        let mut out = Vec::new();
        show_list(&keys, true, now, &mut out).unwrap();
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&out).unwrap().as_array().unwrap().len(), 3);
    }
}
