//! What a server can be reached by beside the connection on which it was asked: the body of an OFFERS frame.
//!
//! All integers are little-endian. Told on a connection whose ends have proved who they are, and to be kept
//! secret: token and key are good for one connection of whoever was told.
//!
//! ```text
//!  0            32           64     65
//!  +------------+------------+-------+-----------------------------+
//!  | token      | key        | count | count times:                |
//!  |            |            | u8    |                             |
//!  +------------+------------+-------+-----------------------------+
//!  0        1        2                        3
//!  +--------+--------+------------------------+--------------------+
//!  | packet | length | provider               | length | address   |   both UTF-8
//!  | version| u8     |                        | u8     |           |
//!  +--------+--------+------------------------+--------------------+
//! ```

use std::fmt;

pub const TOKEN_BYTES: usize = 32;
pub const KEY_BYTES: usize = 32;
/// More providers than there are.
pub const OFFERS_MAX: usize = 8;

/// A malformed OFFERS body.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("malformed offers")]
pub struct OffersError;

/// One way to reach a server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Of its packets.
    pub version: u8,
    pub provider: String,
    /// `host:port`. A host of zeroes is the one that was asked.
    pub address: String,
}

/// All of them, with what to prove by who one is.
#[derive(Clone, PartialEq, Eq)]
pub struct Offers {
    pub token: [u8; TOKEN_BYTES],
    pub key: [u8; KEY_BYTES],
    pub offers: Vec<Offer>,
}

impl fmt::Debug for Offers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing of what is secret.
        f.debug_tuple("Offers").field(&self.offers).finish()
    }
}

impl Offers {
    /// # Errors
    /// More offers, or longer texts, than can be told.
    pub fn encode(&self) -> Result<Vec<u8>, OffersError> {
        if self.offers.len() > OFFERS_MAX {
            return Err(OffersError);
        }
        let mut bytes = [&self.token[..], &self.key, &[self.offers.len() as u8]].concat();
        for Offer { version, provider, address } in &self.offers {
            bytes.push(*version);
            for text in [provider, address] {
                bytes.push(u8::try_from(text.len()).map_err(|_| OffersError)?);
                bytes.extend_from_slice(text.as_bytes());
            }
        }
        Ok(bytes)
    }

    /// # Errors
    /// Bytes that are none, or more than one.
    pub fn decode(bytes: &[u8]) -> Result<Offers, OffersError> {
        let (token, bytes) = bytes.split_first_chunk().ok_or(OffersError)?;
        let (key, bytes) = bytes.split_first_chunk().ok_or(OffersError)?;
        let (count, mut bytes) = bytes.split_first().ok_or(OffersError)?;
        if usize::from(*count) > OFFERS_MAX {
            return Err(OffersError);
        }
        let mut offers = Vec::new();
        for _ in 0..*count {
            let (version, rest) = bytes.split_first().ok_or(OffersError)?;
            let (provider, rest) = text(rest)?;
            let (address, rest) = text(rest)?;
            offers.push(Offer { version: *version, provider, address });
            bytes = rest;
        }
        if bytes.is_empty() { Ok(Offers { token: *token, key: *key, offers }) } else { Err(OffersError) }
    }
}

fn text(bytes: &[u8]) -> Result<(String, &[u8]), OffersError> {
    let (length, bytes) = bytes.split_first().ok_or(OffersError)?;
    let (text, rest) = bytes.split_at_checked(usize::from(*length)).ok_or(OffersError)?;
    Ok((std::str::from_utf8(text).map_err(|_| OffersError)?.to_owned(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_and_nothing_else(
            token: [u8; TOKEN_BYTES], key: [u8; KEY_BYTES], cut in any::<prop::sample::Index>(),
            offers in prop::collection::vec(("[a-z;_]{0,20}", "[0-9.:]{0,40}", 0u8..9), 0..=OFFERS_MAX),
        ) {
            let offers = offers.into_iter().map(|(provider, address, version)| Offer { version, provider, address });
            let offers = Offers { token, key, offers: offers.collect() };
            let mut bytes = offers.encode().unwrap();
            prop_assert_eq!(Offers::decode(&bytes), Ok(offers));
            let cut = cut.index(bytes.len());
            prop_assert_eq!(Offers::decode(&bytes[..cut]), Err(OffersError));
            bytes.push(0);
            prop_assert_eq!(Offers::decode(&bytes), Err(OffersError));
        }

        #[test]
        fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Offers::decode(&bytes);
        }
    }
}
