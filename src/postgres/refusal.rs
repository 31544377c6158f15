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

/// PgBouncer, with its own settings, about what only a server knows.
const POOLER_SAYS: &str = "unsupported startup parameter";

fn is_final(error: &Error) -> bool {
    match error {
        Error::Database(answer) => {
            answer.code().is_some_and(|code| FINAL.contains(&code.as_ref())) || answer.message().contains(POOLER_SAYS)
        }
        // The server speaks no TLS though it is demanded, or its certificate is not trusted.
        Error::Tls(_) | Error::Configuration(_) => true,
        Error::Io(cause) => is_certificate(cause),
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
        Error::Tls(cause) => tls(&cause.to_string()),
        Error::Io(cause) if is_certificate(cause) => tls(&cause.to_string()),
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

/// rustls reports a certificate that it refuses as the failure of the handshake's reads and writes.
fn is_certificate(cause: &std::io::Error) -> bool {
    cause.kind() == std::io::ErrorKind::InvalidData && cause.to_string().contains("certificate")
}

fn tls(cause: &str) -> String {
    format!("TLS: {cause}. {}", tls_remedy(cause))
}

fn tls_remedy(cause: &str) -> &'static str {
    for (word, remedy) in TLS_REMEDIES {
        if cause.contains(word) {
            return remedy;
        }
    }
    "Check sslmode in the URL, and the server's ssl and certificate"
}

/// By the word in what rustls says.
const TLS_REMEDIES: &[(&str, &str)] = &[
    (
        "UnsupportedCertVersion",
        "The server's certificate is X.509 version 1, which this program cannot read whatever the sslmode: give the server one of version 3 (openssl x509 -req with -extfile, or openssl req -x509 -addext subjectAltName=DNS:…), or, on a network that you trust, connect with sslmode=disable",
    ),
    (
        "CaUsedAsEndEntity",
        "The server shows a certificate authority's certificate as its own, as a self-signed one is by default: issue it with basicConstraints=CA:FALSE (openssl req -x509 -addext basicConstraints=critical,CA:FALSE), sign one with that authority, or use sslmode=require, which does not verify it",
    ),
    (
        "UnknownIssuer",
        "Nobody known here has signed the server's certificate: name the authority's certificate as sslrootcert in the URL, or use sslmode=require, which does not verify it",
    ),
    (
        "NotValidForName",
        "The server's certificate is for another name: connect by a name in its subjectAltName, or use sslmode=verify-ca, which does not compare it",
    ),
    (
        "not valid for name",
        "The server's certificate is for another name: connect by a name in its subjectAltName, or use sslmode=verify-ca, which does not compare it",
    ),
    ("xpired", "Renew the server's certificate, or set the clock of this host"),
];

fn remedy(code: &str, said: &str) -> Option<&'static str> {
    Some(match code {
        _ if said.contains(POOLER_SAYS) => {
            "This is a pooler: database_url must be the server's own address, the pooler's goes to --pooled-url"
        }
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
        let cut = std::io::Error::new(std::io::ErrorKind::InvalidData, "received corrupt message");
        assert!(!is_final(&Error::Io(cut)));
        assert!(is_final(&Error::Tls("server does not support TLS".into())));
    }

    /// As rustls words them. Found in review: neither the cause nor the remedy was named.
    #[test]
    fn a_refused_certificate_has_its_remedy() {
        for (cause, remedy) in [
            ("Other(OtherError(UnsupportedCertVersion))", "version 3"),
            ("Other(OtherError(CaUsedAsEndEntity))", "CA:FALSE"),
            ("UnknownIssuer", "sslrootcert"),
            ("certificate not valid for name \"h\"", "verify-ca"),
            ("certificate expired: verification time …", "Renew"),
        ] {
            let said = format!("invalid peer certificate: {cause}");
            let refused = Error::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, said));
            assert!(is_final(&refused), "{cause}");
            assert!(shown(&refused).contains(remedy), "{}", shown(&refused));
        }
    }

    #[test]
    fn every_refusal_has_its_remedy() {
        for code in FINAL.iter().filter(|code| !["22023", "42704"].contains(code)) {
            assert!(remedy(code, "").is_some(), "{code}");
        }
        assert!(remedy("28000", "no pg_hba.conf entry for host").unwrap().contains("pg_hba.conf"));
    }
}
