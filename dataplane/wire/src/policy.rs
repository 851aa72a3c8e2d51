//! Redundancy policies: how many pieces of what make a write durable.

use crate::limits::{DATA_SHARDS_MAX, PARITY_SHARDS_MAX};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Erasure coding `k+m`, or copies `Nx` (which is k=1, m=N-1 without coding).
/// Encoded as the two bytes k and m; others than [`Policy::new`] takes do not decode.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "(u8, u8)", into = "(u8, u8)")]
pub struct Policy {
    data: u8,
    parity: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error("policy '{0}' is neither k+m (such as 2+1) nor Nx (such as 3x)")]
    Syntax(String),
    #[error("policy {data}+{parity} is out of range: data 1 to 32, parity 0 to 8")]
    Range { data: u32, parity: u32 },
}

/// Why a cluster refuses a policy that is well formed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyUnkept {
    #[error(
        "policy {policy} promises to survive {parity} lost targets, but this cluster's metadata survives {tolerated}: \
         choose a policy with m of at most {tolerated}, or format with --tolerate {parity}"
    )]
    Tolerance { policy: Policy, parity: usize, tolerated: u8 },
    #[error("policy {policy} needs {needed} targets, this cluster has {targets}: choose a smaller k or m")]
    Targets { policy: Policy, needed: usize, targets: u16 },
}

impl Policy {
    pub fn new(data: u8, parity: u8) -> Result<Policy, PolicyError> {
        let fits = (1..=DATA_SHARDS_MAX).contains(&usize::from(data)) && usize::from(parity) <= PARITY_SHARDS_MAX;
        if !fits {
            return Err(PolicyError::Range { data: data.into(), parity: parity.into() });
        }
        Ok(Policy { data, parity })
    }

    /// Data shards, k.
    pub fn data(self) -> usize {
        self.data.into()
    }

    /// Failure domains that may be lost, m.
    pub fn parity(self) -> usize {
        self.parity.into()
    }

    /// Distinct failure domains a full stripe needs, k+m.
    pub fn total(self) -> usize {
        self.data() + self.parity()
    }

    /// Copies a replicated (hot) blob gets under this policy, m+1.
    pub fn copies(self) -> usize {
        self.parity() + 1
    }

    /// Whether a cluster of `targets` whose metadata survives the loss of `tolerated` of them can
    /// keep this policy's promise. That 2m+1 are there to write to follows: `format` makes no cluster
    /// of fewer than 2·`tolerated`+1.
    pub fn check_kept(self, tolerated: u8, targets: u16) -> Result<(), PolicyUnkept> {
        let (policy, parity, needed) = (self, self.parity(), self.total());
        if parity > usize::from(tolerated) {
            return Err(PolicyUnkept::Tolerance { policy, parity, tolerated });
        }
        if needed > usize::from(targets) {
            return Err(PolicyUnkept::Targets { policy, needed, targets });
        }
        Ok(())
    }
}

impl TryFrom<(u8, u8)> for Policy {
    type Error = PolicyError;

    fn try_from((data, parity): (u8, u8)) -> Result<Policy, PolicyError> {
        Policy::new(data, parity)
    }
}

impl From<Policy> for (u8, u8) {
    fn from(policy: Policy) -> (u8, u8) {
        (policy.data, policy.parity)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.data == 1 && self.parity > 0 {
            write!(f, "{}x", self.parity + 1)
        } else {
            write!(f, "{}+{}", self.data, self.parity)
        }
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Policy, PolicyError> {
        let syntax = || PolicyError::Syntax(text.to_owned());
        let (data, parity) = if let Some(copies) = text.strip_suffix('x') {
            let copies: u32 = copies.parse().map_err(|_| syntax())?;
            (1, copies.checked_sub(1).ok_or_else(syntax)?)
        } else {
            let (data, parity) = text.split_once('+').ok_or_else(syntax)?;
            // Which `parse` would take as a sign.
            if parity.starts_with('+') {
                return Err(syntax());
            }
            (data.parse().map_err(|_| syntax())?, parity.parse().map_err(|_| syntax())?)
        };
        let range = PolicyError::Range { data, parity };
        let narrow = |value: u32| u8::try_from(value).map_err(|_| range.clone());
        Policy::new(narrow(data)?, narrow(parity)?).map_err(|_| range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_policies_in_range_decode() {
        let policy: Policy = "4+2".parse().unwrap();
        assert_eq!(postcard::to_stdvec(&policy).unwrap(), [4, 2]);
        assert_eq!(postcard::from_bytes::<Policy>(&[4, 2]), Ok(policy));
        for bytes in [[0, 1], [33, 1], [1, 9]] {
            assert!(postcard::from_bytes::<Policy>(&bytes).is_err(), "{bytes:?} decoded");
        }
    }

    #[test]
    fn a_policy_that_the_cluster_cannot_keep_is_refused_with_the_remedy() {
        let refusal = |text: &str| text.parse::<Policy>().unwrap().check_kept(1, 3).map_err(|error| error.to_string());
        assert_eq!(refusal("2+1"), Ok(()));
        assert_eq!(refusal("1+0"), Ok(()));
        assert!(refusal("3x").unwrap_err().contains("format with --tolerate 2"));
        assert_eq!(
            refusal("3+1").unwrap_err(),
            "policy 3+1 needs 4 targets, this cluster has 3: choose a smaller k or m"
        );
    }

    #[test]
    fn the_three_spellings_round_trip_and_bad_ones_are_named() {
        for text in ["2+1", "1+0", "3x", "32+8"] {
            assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
        }
        assert_eq!("1+2".parse::<Policy>().unwrap().to_string(), "3x");
        assert_eq!("0x".parse::<Policy>(), Err(PolicyError::Syntax("0x".into())));
        assert_eq!("2-1".parse::<Policy>(), Err(PolicyError::Syntax("2-1".into())));
        assert_eq!("33+1".parse::<Policy>(), Err(PolicyError::Range { data: 33, parity: 1 }));
        assert_eq!("2+300".parse::<Policy>(), Err(PolicyError::Range { data: 2, parity: 300 }));
    }
}
