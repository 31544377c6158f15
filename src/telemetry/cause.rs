//! An error with its causes as one line, each fact once.
//!
//! Libraries disagree on whether an error's text holds that of its cause; sqlx's does, so that a plain chain says
//! everything twice.

/// The error's text and those of its causes, most general first, without what was said already.
#[must_use]
pub fn told(error: &anyhow::Error) -> String {
    let mut told = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if told.contains(text.trim()) {
            continue;
        }
        if !told.is_empty() {
            told.push_str(": ");
        }
        told.push_str(text.trim());
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Outer(#[source] std::io::Error);

    /// Found in use: `no Postgres reached: X: X`.
    #[test]
    fn a_cause_that_was_told_already_is_not_told_again() {
        let refused = || std::io::Error::other("Connection refused");
        let error = anyhow::Error::new(Outer(refused())).context("waiting for Postgres");
        assert_eq!(format!("{error:#}"), "waiting for Postgres: Connection refused: Connection refused");
        assert_eq!(told(&error), "waiting for Postgres: Connection refused");
        let error = anyhow::Error::new(refused()).context("the port").context("the node");
        assert_eq!(told(&error), "the node: the port: Connection refused");
    }
}
