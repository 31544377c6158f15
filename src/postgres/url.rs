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
    /// Not one of Postgres's modes.
    #[error(
        "sslmode in database_url must be disable, allow, prefer, require, verify-ca or verify-full (what other programs call no-verify is require: encrypted, the certificate is not verified)"
    )]
    SslMode,
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
    split(text)?.iter().map(|one| options(one)).collect()
}

const SSL_MODES: &[&str] = &["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];

fn options(url: &str) -> Result<PgConnectOptions, UrlError> {
    let modes = url.split_once('?').into_iter().flat_map(|(_, query)| query.split('&'));
    let mut modes = modes.filter_map(|pair| pair.strip_prefix("sslmode=").or_else(|| pair.strip_prefix("ssl-mode=")));
    if modes.any(|mode| !SSL_MODES.iter().any(|known| known.eq_ignore_ascii_case(mode))) {
        return Err(UrlError::SslMode);
    }
    let options = PgConnectOptions::from_str(url).map_err(|_| UrlError::Malformed)?;
    // An IPv6 address stands in brackets in a URL, and without them everywhere else.
    let address = options.get_host().strip_prefix('[').and_then(|host| host.strip_suffix(']')).map(str::to_owned);
    Ok(match address {
        Some(address) => options.host(&address),
        None => options,
    })
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
        // A Unix socket: the host stands in the query, and replaces this one; a URL with a user must have one.
        return if tail.contains("host=") {
            Ok(vec![format!("{scheme}://{credentials}localhost{tail}")])
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

    /// Found in review: what psql takes was looked up with its brackets, or called malformed.
    #[test]
    fn a_url_that_psql_takes_names_the_same_host() {
        for (text, host, port, socket) in [
            ("postgres://u@[::1]:6171/db", "::1", 6171, None),
            ("postgres://u:p@[fe80::1]/db", "fe80::1", 5432, None),
            ("postgresql://[::1]/db", "::1", 5432, None),
            ("postgres://u@/db?host=::1&port=7", "::1", 7, None),
            ("postgres://u:p@/db?host=db.example&port=6000", "db.example", 6000, None),
            ("postgres://u:p@/db?host=/cloudsql/p:r:i", "localhost", 5432, Some("/cloudsql/p:r:i")),
            ("postgres:///db?host=/run/postgresql&port=5433", "localhost", 5433, Some("/run/postgresql")),
            ("postgres://u:p@%2Frun%2Fpostgresql:5433/db", "localhost", 5433, Some("/run/postgresql")),
            ("postgres://u@localhost/db?host=/tmp", "localhost", 5432, Some("/tmp")),
        ] {
            let options = hosts(text).unwrap().remove(0);
            let found = options.get_socket().and_then(|path| path.to_str());
            assert_eq!((options.get_port(), found, options.get_database()), (port, socket, Some("db")), "{text}");
            assert!(socket.is_some() || options.get_host() == host, "{text}: {}", options.get_host());
        }
        let both = hosts("postgres://u@[::1]:1,[::2]:2/db").unwrap();
        assert_eq!(both.iter().map(PgConnectOptions::get_host).collect::<Vec<_>>(), ["::1", "::2"]);
    }

    #[test]
    fn an_unknown_sslmode_is_named_with_those_there_are() {
        for mode in ["no-verify", "on", "", "true"] {
            let error = hosts(&format!("postgres://me:hush@h/db?sslmode={mode}")).unwrap_err().to_string();
            assert!(error.contains("sslmode") && error.contains("verify-full") && !error.contains("hush"), "{error}");
        }
        for mode in SSL_MODES {
            hosts(&format!("postgres://h/db?application_name=x&sslmode={mode}")).unwrap();
        }
    }

    #[test]
    fn an_error_does_not_repeat_the_password() {
        for text in ["mysql://me:hush@h/db", "hush", "postgres://me:hush@/db", "postgres://me:hush@h:notaport/db"] {
            let error = hosts(text).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hush"), "{error:?}");
        }
    }
}
