//! The ways to place modules automatically, by name.

use super::hf::Mode;
use crate::name::named;

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

named!(Strategy, "a placement");
