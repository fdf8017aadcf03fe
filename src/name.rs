//! Types whose values have names in flags and files.

use crate::error::ParseError;

/// `` `x` is not a scheme; there are `none`, `int8` and `int4` ``: `names` are those of `what`.
pub(crate) fn unknown(text: &str, what: &str, names: &[&str]) -> ParseError {
    let (last, others) = names.split_last().unwrap_or((&"", &[]));
    ParseError::new(text, &format!("not {what}; there are `{}` and `{last}`", others.join("`, `")))
}

/// Gives a type without fields its names: `ALL`, `name()`, and what prints, writes and parses it by them.
macro_rules! named {
    ($type:ty, $what:literal, { $($value:ident => $name:literal),+ $(,)? }) => {
        impl $type {
            /// All of them, in their order.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$value),+];

            /// The name in flags and files.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $name,)+
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::error::ParseError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let unknown = || $crate::name::unknown(text, $what, &Self::ALL.map(Self::name));
                Self::ALL.into_iter().find(|known| known.name() == text).ok_or_else(unknown)
            }
        }
    };
}
pub(crate) use named;
