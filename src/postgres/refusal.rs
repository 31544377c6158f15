//! Why a connection failed, rightly named: what waiting may mend, and what it never will.
//!
//! Pure. By SQLSTATE where the server answered (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).

use sqlx::Error;
use sqlx::postgres::PgDatabaseError;

use super::ConnectError;

/// Sorts a failed connection attempt.
pub(super) fn judged(error: Error) -> ConnectError {
    if is_final(&error) { ConnectError::Refused(error) } else { ConnectError::Unreachable(error) }
}

/// SQLSTATEs of a server that is there and will answer the same next time.
const FINAL: &[&str] = &[
    "28P01", // invalid_password
    "28000", // invalid_authorization_specification: no such role, no entry in pg_hba.conf, may not log in
    "3D000", // invalid_catalog_name: no such database
    "42501", // insufficient_privilege: no CONNECT on the database
    "22023", // invalid_parameter_value: an option in the URL
    "42704", // undefined_object: an unknown setting in the URL's options
];

fn is_final(error: &Error) -> bool {
    match error {
        Error::Database(answer) => answer.code().is_some_and(|code| FINAL.contains(&code.as_ref())),
        // The server speaks no TLS though it is demanded, or its certificate is not trusted.
        Error::Tls(_) | Error::Configuration(_) => true,
        _ => false,
    }
}

/// What happened and what to do, in one sentence each; the server's own words where it answered.
pub(super) fn shown(error: &Error) -> String {
    match error {
        Error::Database(answer) => {
            let code = answer.code().unwrap_or_default();
            let said =
                answer.try_downcast_ref::<PgDatabaseError>().map_or_else(|| answer.message(), PgDatabaseError::message);
            match remedy(&code, said) {
                Some(remedy) => format!("{said}. {remedy}"),
                None => said.to_owned(),
            }
        }
        Error::Tls(cause) => format!("TLS: {cause}. Check sslmode in the URL, and the server's ssl and certificate"),
        Error::Io(cause) => match cause.kind() {
            std::io::ErrorKind::ConnectionRefused => {
                format!("{cause}. Is the server running, and are host and port right?")
            }
            std::io::ErrorKind::NotFound => format!("{cause}. Is there such a socket or file?"),
            _ => cause.to_string(),
        },
        error => error.to_string(),
    }
}

fn remedy(code: &str, said: &str) -> Option<&'static str> {
    Some(match code {
        "28P01" => "Check user and password in the URL",
        "28000" if said.contains("pg_hba.conf") => {
            "Let this host in: a line in the server's pg_hba.conf, then SELECT pg_reload_conf();"
        }
        "28000" if said.contains("not permitted to log in") => "Give it the right: ALTER ROLE … LOGIN;",
        "28000" => "Check the user in the URL, or create the role: CREATE ROLE … LOGIN PASSWORD …;",
        "3D000" => "Check the database in the URL, or create it: CREATE DATABASE …;",
        "42501" => "Give the role the right: GRANT CONNECT ON DATABASE … TO …;",
        "53300" => "Raise max_connections (or the limit of the role or database), or end sessions that nobody needs",
        "55000" => "Allow connections: ALTER DATABASE … ALLOW_CONNECTIONS true;",
        "57P03" => "It takes connections when it is ready",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_time_may_mend_is_waited_for() {
        for code in ["57P03", "53300", "57P01", "08006", "53200", "55000"] {
            assert!(!FINAL.contains(&code), "{code}");
        }
        let refused = Error::Io(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
        assert!(!is_final(&refused) && shown(&refused).contains("Is the server running"));
        assert!(is_final(&Error::Tls("server does not support TLS".into())));
    }

    #[test]
    fn every_refusal_has_its_remedy() {
        for code in FINAL.iter().filter(|code| !["22023", "42704"].contains(code)) {
            assert!(remedy(code, "").is_some(), "{code}");
        }
        assert!(remedy("28000", "no pg_hba.conf entry for host").unwrap().contains("pg_hba.conf"));
    }
}
