//! RPC bodies: postcard (a compact, non-self-describing serde format with a written
//! specification), bounded in length and refused when bytes are left over.

use crate::limits::RPC_BODY_BYTES_MAX;
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a body could not be written or read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BodyError {
    #[error("a body of {length} bytes exceeds the limit of {limit}")]
    TooLarge { length: usize, limit: usize },
    #[error("the body cannot be serialised: {0}")]
    Encode(postcard::Error),
    #[error("the body does not have the expected form: {0}")]
    Decode(postcard::Error),
    #[error("{bytes} bytes follow the body")]
    Trailing { bytes: usize },
}

impl BodyError {
    /// Whether splitting the message into smaller ones helps.
    pub fn is_too_large(&self) -> bool {
        matches!(self, BodyError::TooLarge { .. })
    }
}

/// The bytes of `value`, at most [`RPC_BODY_BYTES_MAX`] of them.
pub fn encode<T: Serialize>(value: &T) -> Result<Bytes, BodyError> {
    let bytes = postcard::to_stdvec(value).map_err(BodyError::Encode)?;
    check_length(bytes.len())?;
    Ok(Bytes::from(bytes))
}

/// The one value that `bytes` holds, and nothing after it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, BodyError> {
    check_length(bytes.len())?;
    decode_stored(bytes)
}

/// The one value that stored `bytes` hold, and nothing after it: what bounds their length is
/// whoever reads them.
pub fn decode_stored<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, BodyError> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(BodyError::Decode)?;
    if !rest.is_empty() {
        return Err(BodyError::Trailing { bytes: rest.len() });
    }
    Ok(value)
}

fn check_length(length: usize) -> Result<(), BodyError> {
    if length > RPC_BODY_BYTES_MAX {
        return Err(BodyError::TooLarge { length, limit: RPC_BODY_BYTES_MAX });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
    enum Sample {
        Nothing,
        Named { name: Vec<u8>, ino: u64 },
    }

    #[test]
    fn a_value_comes_back_and_one_byte_more_or_less_is_refused() {
        let value = Sample::Named { name: b"caf\xE9".to_vec(), ino: u64::MAX };
        let bytes = encode(&value).unwrap();
        assert_eq!(decode::<Sample>(&bytes), Ok(value));

        let mut longer = bytes.to_vec();
        longer.push(0);
        assert_eq!(decode::<Sample>(&longer), Err(BodyError::Trailing { bytes: 1 }));
        let shorter = &bytes[..bytes.len() - 1];
        assert!(matches!(decode::<Sample>(shorter), Err(BodyError::Decode(_))));
        assert!(matches!(decode::<Sample>(&[7]), Err(BodyError::Decode(_))), "an unknown variant is refused");
        assert_eq!(decode::<Sample>(&[0]), Ok(Sample::Nothing));
    }

    #[test]
    fn the_limit_is_the_last_length_accepted() {
        // Three bytes of length prefix precede a byte string of this size.
        let fits = vec![1u8; RPC_BODY_BYTES_MAX - 3];
        let bytes = encode(&fits).unwrap();
        assert_eq!(bytes.len(), RPC_BODY_BYTES_MAX);
        assert_eq!(decode::<Vec<u8>>(&bytes), Ok(fits));

        let length = RPC_BODY_BYTES_MAX + 1;
        let refused = BodyError::TooLarge { length, limit: RPC_BODY_BYTES_MAX };
        assert_eq!(encode(&vec![1u8; RPC_BODY_BYTES_MAX - 2]), Err(refused.clone()));
        assert!(refused.is_too_large());
        assert_eq!(decode::<Vec<u8>>(&vec![0; length]), Err(refused));
    }
}
