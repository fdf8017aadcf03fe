//! The ways to place modules automatically, by name.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::hf::Mode;
use crate::error::printable;

/// How modules are placed where no device map says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// The fullest GPU has the least share of its memory taken.
    #[default]
    Balanced,
    /// As few GPUs as hold the model.
    Packed,
    /// Each device is filled in turn.
    Sequential,
    /// The least predicted time for a token.
    Fastest,
    /// What Transformers chooses for `device_map="auto"`.
    HfAuto,
    /// What Transformers chooses for `balanced_low_0`.
    HfBalancedLowZero,
    /// What Transformers chooses for `sequential`.
    HfSequential,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Balanced,
        Self::Packed,
        Self::Sequential,
        Self::Fastest,
        Self::HfAuto,
        Self::HfBalancedLowZero,
        Self::HfSequential,
    ];

    /// The name in flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::Packed => "packed",
            Self::Sequential => "sequential",
            Self::Fastest => "fastest",
            Self::HfAuto => "hf-auto",
            Self::HfBalancedLowZero => "hf-balanced_low_0",
            Self::HfSequential => "hf-sequential",
        }
    }

    /// The mode of Transformers that it stands for, if it does.
    pub fn transformers(self) -> Option<Mode> {
        match self {
            Self::Balanced | Self::Packed | Self::Sequential | Self::Fastest => None,
            Self::HfAuto => Some(Mode::Auto),
            Self::HfBalancedLowZero => Some(Mode::BalancedLowZero),
            Self::HfSequential => Some(Mode::Sequential),
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Strategy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A text that names no strategy.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{0}` is not a placement; placements are balanced, packed, sequential, fastest, hf-auto, hf-sequential and hf-balanced_low_0"
)]
pub struct ParseStrategyError(String);

impl FromStr for Strategy {
    type Err = ParseStrategyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|strategy| strategy.name() == text);
        known.ok_or_else(|| ParseStrategyError(printable(text)))
    }
}
