//! `database_url` with several hosts, as libpq writes it: `postgres://user:pw@a:5432,b:5433/db`.
//!
//! Pure. sqlx reads URLs of one host; this splits one URL into one for each host.

use std::str::FromStr;

use sqlx::postgres::PgConnectOptions;

/// The text is not a usable URL. The URL itself is never shown: it may hold a password.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// Not `postgres://…`.
    #[error("database_url must begin with postgres:// or postgresql://")]
    Scheme,
    /// Nothing between `//` and `/`.
    #[error("database_url names no host")]
    NoHost,
    /// sqlx refused a part.
    #[error(
        "database_url is malformed; the form is postgres://user:password@host:port[,host:port…]/database?options (percent-encode special characters)"
    )]
    Malformed,
}

/// Connection options, one for each host in the order of the URL.
///
/// # Errors
/// [`UrlError`].
pub fn hosts(text: &str) -> Result<Vec<PgConnectOptions>, UrlError> {
    split(text)?.iter().map(|one| PgConnectOptions::from_str(one).map_err(|_| UrlError::Malformed)).collect()
}

fn split(text: &str) -> Result<Vec<String>, UrlError> {
    let (scheme, rest) = text.split_once("://").ok_or(UrlError::Scheme)?;
    if scheme != "postgres" && scheme != "postgresql" {
        return Err(UrlError::Scheme);
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    let (credentials, list) = match authority.rsplit_once('@') {
        Some((credentials, list)) => (format!("{credentials}@"), list),
        None => (String::new(), authority),
    };
    // `target_session_attrs` is what we do anyway; sqlx does not know it.
    let tail = without_parameter(tail, "target_session_attrs");
    if list.is_empty() {
        // A Unix socket: the host stands in the query.
        return if tail.contains("host=") {
            Ok(vec![format!("{scheme}://{credentials}{tail}")])
        } else {
            Err(UrlError::NoHost)
        };
    }
    Ok(list.split(',').map(|host| format!("{scheme}://{credentials}{host}{tail}")).collect())
}

fn without_parameter(tail: &str, name: &str) -> String {
    let Some((path, query)) = tail.split_once('?') else { return tail.to_owned() };
    let kept: Vec<&str> =
        query.split('&').filter(|pair| pair.split('=').next() != Some(name) && !pair.is_empty()).collect();
    if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_gets_the_rest_of_the_url() {
        let urls = split("postgres://me:p%40w@a:1,b:2/db?target_session_attrs=read-write&sslmode=prefer").unwrap();
        assert_eq!(urls, ["postgres://me:p%40w@a:1/db?sslmode=prefer", "postgres://me:p%40w@b:2/db?sslmode=prefer"]);
        assert_eq!(split("postgresql://h/db?target_session_attrs=any").unwrap(), ["postgresql://h/db"]);
        assert_eq!(hosts("postgres://me@[::1]:5433/db").unwrap().len(), 1);
    }

    #[test]
    fn an_error_does_not_repeat_the_password() {
        for text in ["mysql://me:hush@h/db", "hush", "postgres://me:hush@/db", "postgres://me:hush@h:notaport/db"] {
            let error = hosts(text).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hush"), "{error:?}");
        }
    }
}
