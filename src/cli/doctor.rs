//! `tidewire doctor`: what is wrong, or soon will be, and what to run.
//!
//! Looks only; it repairs nothing and waits for no lock. Each check is one question to Postgres; one that cannot be asked
//! is a finding itself.

mod capture;
mod server;
mod traffic;

use std::fmt::Write as _;

use anyhow::bail;

use crate::cli::connect::{DatabaseArgs, Reader, explained};
use crate::cli::{print, print_json};
use crate::dev::shell::pasteable;
use crate::postgres::Pool;
use crate::postgres::{ConnectError, Database};

/// Check the database and say what to run
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Changes nothing. Ends with 1 when something is wrong.")]
pub struct DoctorArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Print JSON for machines
    #[arg(long)]
    json: bool,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// As it should be.
    Fine,
    /// Worth knowing.
    Note,
    /// Costs something, or will.
    Warning,
    /// Changes are lost, late or not captured, or Tidewire cannot work.
    Problem,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// The check.
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is the case.
    pub what: String,
    /// What to run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
}

impl Finding {
    fn fine(check: &'static str, what: impl Into<String>) -> Self {
        Self { check, severity: Severity::Fine, what: what.into(), run: None }
    }

    fn note(check: &'static str, what: impl Into<String>) -> Self {
        Self { severity: Severity::Note, ..Self::fine(check, what) }
    }

    fn warning(check: &'static str, what: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::fine(check, what) }
    }

    fn problem(check: &'static str, what: impl Into<String>) -> Self {
        Self { severity: Severity::Problem, ..Self::fine(check, what) }
    }

    fn run(self, run: impl Into<String>) -> Self {
        Self { run: Some(run.into()), ..self }
    }
}

/// Runs the command.
///
/// # Errors
/// No database named, or something is wrong with it: a warning or a problem was found, Postgres out of reach included.
pub async fn run(args: DoctorArgs) -> anyhow::Result<()> {
    let findings = examine(&args.database.named(Reader::of(args.json))?).await;
    if args.json {
        print_json(&findings)?;
    } else {
        print(&shown(&findings))?;
    }
    match findings.iter().filter(|finding| finding.severity >= Severity::Warning).count() {
        0 => Ok(()),
        1 => bail!("one thing needs attention"),
        count => bail!("{count} things need attention"),
    }
}

/// Every check, the most fundamental first. What rests on a check that failed is not asked.
pub async fn examine(database: &Database) -> Vec<Finding> {
    let mut findings = Vec::new();
    match database.probe().await {
        Ok(()) => findings.push(Finding::fine("connection", "direct, to a primary")),
        Err(error @ ConnectError::Pooler(_)) => {
            let found = Finding::problem("connection", error.to_string());
            findings.push(found.run("give the server's own address as --database-url"));
            return findings;
        }
        Err(error) => {
            findings.push(Finding::problem("connection", error.to_string()));
            return findings;
        }
    }
    // Of several hosts, what follows is about the primary.
    if let Err(error) = database.renew().await {
        findings.push(Finding::problem("connection", error.to_string()));
        return findings;
    }
    let pool = &database.pool();
    findings.extend(server::checks(pool).await);
    match server::schema(pool).await {
        Ok(found) => {
            let usable = found.severity < Severity::Problem;
            findings.push(found);
            if usable {
                findings.extend(server::privileges(pool).await);
                findings.extend(capture::checks(pool).await);
                findings.extend(traffic::checks(pool).await);
            }
        }
        Err(error) => findings.push(Finding::problem("schema", explained(pool, error).await.to_string())),
    }
    findings
}

/// The findings of a question, or that it could not be asked.
fn or_unasked(check: &'static str, asked: Result<Vec<Finding>, sqlx::Error>) -> Vec<Finding> {
    asked.unwrap_or_else(|error| vec![unasked(check, &error)])
}

fn unasked(check: &'static str, error: &sqlx::Error) -> Finding {
    // The server's own words, without where in its source it said them.
    let said = error.as_database_error().map_or_else(|| error.to_string(), |answer| answer.message().to_owned());
    Finding::warning(check, format!("could not be checked: {said}"))
}

/// Gives the rows of `sql`, which has no arguments.
async fn rows(pool: &Pool, sql: &'static str) -> Result<Vec<sqlx::postgres::PgRow>, sqlx::Error> {
    sqlx::query(sql).fetch_all(pool).await
}

fn shown(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut out = String::new();
    for finding in findings {
        let mark = match finding.severity {
            Severity::Fine => "ok     ",
            Severity::Note => "note   ",
            Severity::Warning => "WARNING",
            Severity::Problem => "PROBLEM",
        };
        let _ = writeln!(out, "{mark}  {:width$}  {}", finding.check, finding.what);
        for line in finding.run.iter().flat_map(|run| run.lines()) {
            let _ = writeln!(out, "         {:width$}  run: {}", "", pasteable(line));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_run_stands_below_what_is_wrong() {
        let findings = [
            Finding::fine("version", "Postgres 17.9"),
            Finding::problem("triggers", "a trigger is disabled").run("ALTER TABLE t ENABLE TRIGGER \"!tidewire\""),
        ];
        let text = shown(&findings);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "ok       version   Postgres 17.9");
        assert_eq!(lines[1], "PROBLEM  triggers  a trigger is disabled");
        assert_eq!(lines[2], "                   run: ALTER TABLE t ENABLE TRIGGER \"!tidewire\"");
    }
}
