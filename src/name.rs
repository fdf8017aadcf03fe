//! Types whose values have names in flags and files.

use std::fmt;

use crate::error::printable;

/// A text that is none of the names of a type.
#[derive(Debug)]
pub struct ParseNameError {
    text: String,
    what: &'static str,
    names: Vec<&'static str>,
}

impl ParseNameError {
    /// `text` is not one of `names`, which are those of `what`.
    pub(crate) fn new(text: &str, what: &'static str, names: impl Iterator<Item = &'static str>) -> Self {
        Self { text: printable(text), what, names: names.collect() }
    }
}

impl fmt::Display for ParseNameError {
    /// `` `x` is not a scheme; there are `none`, `int8` and `int4` ``.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not {}; there are ", self.text, self.what)?;
        for (at, name) in self.names.iter().enumerate() {
            let before = match at {
                0 => "",
                _ if at + 1 == self.names.len() => " and ",
                _ => ", ",
            };
            write!(f, "{before}`{name}`")?;
        }
        Ok(())
    }
}

impl std::error::Error for ParseNameError {}

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
            type Err = $crate::name::ParseNameError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let all = || Self::ALL.into_iter();
                let unknown = || Self::Err::new(text, $what, all().map(Self::name));
                all().find(|known| known.name() == text).ok_or_else(unknown)
            }
        }
    };
}
pub(crate) use named;
