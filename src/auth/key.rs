//! API keys as text: `cdc_<id>_<secret><crc>`.
//!
//! - **id**: 12 characters, public, the primary key of `tidewire.api_keys`; fit for logs;
//! - **secret**: 43 characters drawn evenly from 62, which is 256 bits;
//! - **crc**: CRC-32 of everything before it in 6 characters, so that a typo is told from a key that does not exist
//!   without asking the database, and secret scanners match keys exactly.
//!
//! All characters are `[0-9A-Za-z_]`: safe in URLs, selected whole by a double click. The database holds the SHA-256 of
//! the whole text. A slow hash would add nothing to 256 random bits and be a lever for whoever wants to keep nodes busy.
//!
//! Pure: randomness is an argument. Nothing here prints a secret; [`ApiKey::expose`] is the only way to the text.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rand::CryptoRng;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Before the id of every key.
pub const KEY_PREFIX: &str = "cdc_";
/// Characters of an id: 71 bits, so that ids do not meet.
pub const KEY_ID_CHARS: usize = 12;
/// Characters of a secret: 43 · log₂ 62 = 256.03 bits.
pub const SECRET_CHARS: usize = 43;
/// Characters of the checksum: 62⁶ > 2³².
const CRC_CHARS: usize = 6;
/// Characters of a key: prefix, id, `_`, secret, checksum.
pub const KEY_CHARS: usize = KEY_PREFIX.len() + KEY_ID_CHARS + 1 + SECRET_CHARS + CRC_CHARS;

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A whole key, secret included. It has no `Display` and no `Serialize`, and its `Debug` shows the id alone.
#[derive(Clone)]
pub struct ApiKey {
    id: KeyId,
    text: Box<str>,
}

/// The public part of a key. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(Arc<str>);

/// What the database holds of a key. It has no `PartialEq`: [`KeyHash::matches`] compares in constant time.
#[derive(Clone, Copy)]
pub struct KeyHash([u8; 32]);

/// The text is not an API key: cut off, mistyped, or something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not an API key: copy the whole text, from `cdc_` on")]
pub struct MalformedKey;

/// The text is not the id of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not a key id: it has {KEY_ID_CHARS} letters and digits, see `tidewire keys list`")]
pub struct MalformedKeyId;

impl ApiKey {
    /// A new key. Use a generator that the operating system seeds.
    #[must_use]
    pub fn generate<R: CryptoRng + ?Sized>(rng: &mut R) -> Self {
        let mut text = String::with_capacity(KEY_CHARS);
        text.push_str(KEY_PREFIX);
        push_random(&mut text, KEY_ID_CHARS, rng);
        text.push('_');
        push_random(&mut text, SECRET_CHARS, rng);
        let crc = crc_text(text.as_bytes());
        text.extend(crc.iter().copied().map(char::from));
        let id = KeyId(text[KEY_PREFIX.len()..KEY_PREFIX.len() + KEY_ID_CHARS].into());
        Self { id, text: text.into() }
    }

    /// Reads a token.
    ///
    /// # Errors
    /// The shape or the checksum is wrong. Whether the key exists is not asked.
    pub fn parse(token: &str) -> Result<Self, MalformedKey> {
        if token.len() != KEY_CHARS || !token.is_ascii() {
            return Err(MalformedKey);
        }
        let rest = token.strip_prefix(KEY_PREFIX).ok_or(MalformedKey)?;
        let (id, rest) = rest.split_at(KEY_ID_CHARS);
        let secret_and_crc = rest.strip_prefix('_').ok_or(MalformedKey)?;
        let (before_crc, crc) = token.as_bytes().split_at(KEY_CHARS - CRC_CHARS);
        if !is_alphanumeric(id) || !is_alphanumeric(secret_and_crc) || crc_text(before_crc) != crc {
            return Err(MalformedKey);
        }
        Ok(Self { id: KeyId(id.into()), text: token.into() })
    }

    /// The public part.
    #[must_use]
    pub fn id(&self) -> &KeyId {
        &self.id
    }

    /// What to store, or to compare with what is stored.
    #[must_use]
    pub fn hash(&self) -> KeyHash {
        KeyHash(Sha256::digest(self.text.as_bytes()).into())
    }

    /// The whole text, to be shown once to the one who asked for the key. Never log it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.text
    }
}

impl KeyHash {
    /// Reads the stored bytes; none unless they are 32.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes to store.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether both are the same, in a time that does not depend on where they differ.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl KeyId {
    /// Takes an id that the database holds, whatever its shape.
    #[must_use]
    pub fn from_stored(text: &str) -> Self {
        Self(text.into())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for KeyId {
    type Err = MalformedKeyId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() == KEY_ID_CHARS && is_alphanumeric(text) { Ok(Self(text.into())) } else { Err(MalformedKeyId) }
    }
}

fn is_alphanumeric(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// Appends `count` characters, each drawn evenly from the 62.
pub(super) fn push_random<R: CryptoRng + ?Sized>(text: &mut String, count: usize, rng: &mut R) {
    // 6 bits at a time; 62 and 63 are thrown away, since a remainder would favour some characters.
    let mut left = count;
    while left > 0 {
        for byte in rng.next_u64().to_le_bytes() {
            if left > 0 && usize::from(byte & 63) < ALPHABET.len() {
                text.push(char::from(ALPHABET[usize::from(byte & 63)]));
                left -= 1;
            }
        }
    }
}

fn crc_text(bytes: &[u8]) -> [u8; CRC_CHARS] {
    let mut crc = u64::from(crc32fast::hash(bytes));
    let mut text = [0; CRC_CHARS];
    for digit in text.iter_mut().rev() {
        *digit = ALPHABET[usize::try_from(crc % 62).unwrap_or_default()];
        crc /= 62;
    }
    text
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash(..)")
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({})", self.0)
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for KeyId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl Serialize for KeyId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for KeyId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        std::borrow::Cow::<str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn key(seed: u64) -> ApiKey {
        ApiKey::generate(&mut StdRng::seed_from_u64(seed))
    }

    #[test]
    fn debug_shows_neither_secret_nor_hash() {
        let key = key(1);
        let secret = &key.expose()[KEY_PREFIX.len() + KEY_ID_CHARS + 1..];
        let shown = format!("{key:?} {:?}", key.hash());
        assert!(shown.contains(key.id().as_str()));
        assert!((0..secret.len() - 4).all(|at| !shown.contains(&secret[at..at + 4])), "{shown}");
        let bytes = format!("{:?}", key.hash().as_bytes());
        assert!(!shown.contains(bytes.trim_matches(['[', ']'])));
    }

    #[test]
    fn only_its_own_hash_matches_a_key() {
        assert!(key(1).hash().matches(&key(1).hash()));
        assert!(!key(1).hash().matches(&key(2).hash()));
        assert!(KeyHash::from_bytes(key(1).hash().as_bytes()).unwrap().matches(&key(1).hash()));
        assert!(KeyHash::from_bytes(&[0; 31]).is_none());
    }

    #[test]
    fn every_character_of_the_alphabet_is_drawn() {
        let mut text = String::new();
        push_random(&mut text, 10_000, &mut StdRng::seed_from_u64(7));
        assert_eq!(text.len(), 10_000);
        for &letter in ALPHABET {
            let count = text.bytes().filter(|&byte| byte == letter).count();
            assert!((90..=240).contains(&count), "{} {count}", char::from(letter));
        }
    }

    proptest! {
        #[test]
        fn a_generated_key_is_read_back(seed: u64) {
            let made = key(seed);
            let read = ApiKey::parse(made.expose()).unwrap();
            prop_assert_eq!(made.expose().len(), KEY_CHARS);
            prop_assert_eq!(read.id(), made.id());
            prop_assert_eq!(made.id().as_str().parse::<KeyId>(), Ok(made.id().clone()));
            prop_assert!(read.hash().matches(&made.hash()));
        }

        #[test]
        fn one_mistyped_character_is_found(seed: u64, at in 0..KEY_CHARS, with in "[0-9A-Za-z_]") {
            let made = key(seed);
            let mut typo = made.expose().to_owned();
            typo.replace_range(at..=at, &with);
            prop_assume!(typo != made.expose());
            prop_assert_eq!(ApiKey::parse(&typo).unwrap_err(), MalformedKey);
        }

        #[test]
        fn no_text_panics(text in "cdc_.{0,70}|.{0,80}|[0-9a-z_]{66}") {
            prop_assert!(ApiKey::parse(&text).is_err());
        }
    }
}
