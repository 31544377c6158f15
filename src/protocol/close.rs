//! The close codes and what a client does after each.

/// What a client does after a close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Connect to any node, with the usual jitter, and resume from the last position.
    Resume,
    /// Reconnecting unchanged would end the same way.
    Stop,
}

macro_rules! close_codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $reason:literal, $advice:ident;)*) => {
        /// A WebSocket close code that the server sends.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum CloseCode { $($(#[$doc])* $name = $code,)* }

        impl CloseCode {
            /// Every code, for tables and tests.
            pub const ALL: &'static [CloseCode] = &[$(CloseCode::$name,)*];

            /// The number on the wire.
            #[must_use]
            pub const fn code(self) -> u16 { self as u16 }

            /// The reason text of the close frame.
            #[must_use]
            pub const fn reason(self) -> &'static str { match self { $(CloseCode::$name => $reason,)* } }

            /// What a client does next.
            #[must_use]
            pub const fn advice(self) -> Advice { match self { $(CloseCode::$name => Advice::$advice,)* } }

            /// The code of this number, if the server has it.
            #[must_use]
            pub fn from_code(code: u16) -> Option<Self> {
                match code { $($code => Some(CloseCode::$name),)* _ => None }
            }
        }
    };
}

close_codes! {
    /// The client said goodbye.
    Normal = 1000, "bye", Resume;
    /// The server goes away without a drain.
    GoingAway = 1001, "going away", Resume;
    /// The bytes were not WebSocket.
    Protocol = 1002, "protocol error", Resume;
    /// A binary frame.
    Unsupported = 1003, "only text messages are understood", Stop;
    /// The text was not UTF-8.
    NotUtf8 = 1007, "not UTF-8", Stop;
    /// A message above `message_bytes`.
    TooLarge = 1009, "message too large", Stop;
    /// The server hit an internal error.
    Internal = 1011, "internal error", Resume;
    /// The node restarts, after `drain`.
    Restart = 1012, "restart", Resume;
    /// Try again later.
    TryLater = 1013, "try again later", Resume;
    /// An error of the server's own.
    ServerError = 4004, "server error", Resume;
    /// No whole frame was accepted for the slow-consumer limit.
    Slow = 4008, "slow consumer", Resume;
    /// The server found a gap in what it was about to send.
    Gap = 4010, "gap", Resume;
    /// Nothing came from the client for two heartbeats.
    NoPong = 4012, "no pong", Resume;
    /// The client sent more than `messages_per_s` and insisted.
    RateLimited = 4013, "rate limited", Resume;
    /// The live socket's token expired.
    TokenExpired = 4014, "token expired", Resume;
    /// The message was not understood.
    BadMessage = 4400, "bad message", Stop;
    /// No valid credential.
    Unauthenticated = 4401, "unauthenticated", Stop;
    /// Not allowed.
    Forbidden = 4403, "forbidden", Stop;
    /// No common protocol version.
    Version = 4406, "version", Stop;
    /// No `auth` message in time.
    AuthTimeout = 4408, "authentication timeout", Stop;
    /// The key has too many connections.
    TooManyConnections = 4429, "too many connections for this key", Resume;
    /// The key was revoked.
    KeyRevoked = 4440, "key revoked", Stop;
    /// The key expired.
    KeyExpired = 4441, "key expired", Stop;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_found_by_its_number() {
        for code in CloseCode::ALL {
            assert_eq!(CloseCode::from_code(code.code()), Some(*code));
        }
        assert_eq!(CloseCode::from_code(4999), None);
    }

    #[test]
    fn a_reason_fits_a_close_frame() {
        // RFC 6455, 5.5: a control frame carries at most 125 bytes, two of them the code.
        assert!(CloseCode::ALL.iter().all(|code| code.reason().len() <= 123));
    }
}
