//! What a server reads that an older one refuses.

/// The server whose verdicts a filter gives, by `server_version_num`. The default is older than any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Server(u32);

impl Server {
    /// Reads everything: what rows carry was written by the server itself.
    pub(super) const ANY: Self = Self(u32::MAX);

    /// From `server_version_num`, such as 170002.
    #[must_use]
    pub fn from_version_num(number: i32) -> Self {
        Self(u32::try_from(number).unwrap_or_default())
    }

    /// Integers and numerics in hexadecimal, octal and binary, and digits in groups (`1_000`): from 16 on.
    pub(super) fn reads_digit_forms(self) -> bool {
        self.0 >= 160_000
    }

    /// `infinity` as an interval: from 17 on.
    pub(super) fn reads_infinite_intervals(self) -> bool {
        self.0 >= 170_000
    }

    /// `+infinity` as a date or timestamp: from 17 on.
    pub(super) fn reads_signed_infinity(self) -> bool {
        self.0 >= 170_000
    }
}
