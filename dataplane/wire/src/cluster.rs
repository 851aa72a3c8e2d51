//! What a cluster fixed at its creation and a node must know before it can read anything else.
//! Kept in every target's superblock.

use crate::policy::Policy;
use serde::{Deserialize, Serialize};

/// Bytes of the superblock set aside for the encoded parameters.
pub const PARAMETERS_BYTES_MAX: usize = 256;

/// Fixed at creation (format 1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClusterParameters {
    /// Format of this record; 1.
    pub format: u8,
    /// Metadata shards.
    pub shards: u16,
    /// Policy of the first volume.
    pub policy: Policy,
    /// m: failure domains that may be lost, the largest any policy promises.
    pub tolerated: u8,
    /// Targets of this node.
    pub targets: u16,
    /// Key of the hash that orders directory entries: secret, so that nobody can make names
    /// collide on purpose.
    pub name_key: [u8; 32],
}

/// Why stored parameters are refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ParametersError {
    #[error("the superblock's cluster parameters cannot be read: {0}")]
    Malformed(String),
    #[error("the superblock's cluster parameters have format {0}, this program knows 1: upgrade it")]
    Format(u8),
}

impl ClusterParameters {
    pub const FORMAT: u8 = 1;

    pub fn encode(&self) -> Vec<u8> {
        let bytes = postcard::to_stdvec(self).expect("a plain record encodes");
        assert!(bytes.len() <= PARAMETERS_BYTES_MAX);
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<ClusterParameters, ParametersError> {
        match bytes.first() {
            None => return Err(ParametersError::Malformed("they are empty".into())),
            Some(&Self::FORMAT) => {}
            Some(&other) => return Err(ParametersError::Format(other)),
        }
        let parameters: ClusterParameters =
            crate::body::decode_stored(bytes).map_err(|error| ParametersError::Malformed(error.to_string()))?;
        if parameters.shards == 0 || parameters.targets == 0 {
            return Err(ParametersError::Malformed(format!("{parameters:?} is out of range")));
        }
        Ok(parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_round_trip_and_a_newer_format_is_refused_by_name() {
        let parameters = ClusterParameters {
            format: 1,
            shards: 8,
            policy: "2+1".parse().unwrap(),
            tolerated: 1,
            targets: 3,
            name_key: [7; 32],
        };
        let mut bytes = parameters.encode();
        assert_eq!(bytes[..6], [1, 8, 2, 1, 1, 3], "the stored bytes are a format: they must not change");
        assert_eq!(bytes[6..], [7; 32]);
        assert_eq!(ClusterParameters::decode(&bytes), Ok(parameters));
        bytes[0] = 2;
        assert_eq!(ClusterParameters::decode(&bytes), Err(ParametersError::Format(2)));
        bytes[0] = 1;
        bytes.push(0);
        assert!(matches!(ClusterParameters::decode(&bytes), Err(ParametersError::Malformed(_))), "a byte is left over");
        assert!(matches!(ClusterParameters::decode(&[]), Err(ParametersError::Malformed(_))));
    }
}
