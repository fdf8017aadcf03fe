//! Typed access to the members of a JSON object, with ranges.

use std::fmt;

use crate::error::{Error, Result};
use crate::json::{Member, Node};

/// The members of an object, some of which are read; a member that is `null` counts as absent.
pub struct Fields<'a> {
    object: Node<'a>,
    members: Vec<Member<'a>>,
}

impl<'a> Fields<'a> {
    pub fn of(object: Node<'a>) -> Result<Self> {
        Ok(Self { object, members: object.members_to_read()? })
    }

    pub fn optional(&self, key: &str) -> Option<Node<'a>> {
        let member = self.members.iter().find(|member| member.name == key)?;
        (!member.value.is_null()).then_some(member.value)
    }

    /// Whether `key` is there at all, if only as `null`.
    pub fn has(&self, key: &str) -> bool {
        self.members.iter().any(|member| member.name == key)
    }

    pub fn required(&self, key: &str) -> Result<Node<'a>> {
        self.optional(key).ok_or_else(|| self.object.error(format!("`{key}` is missing")))
    }

    /// An error at `key`, or at the object where `key` is absent.
    pub fn error(&self, key: &str, problem: impl fmt::Display) -> Error {
        self.optional(key).unwrap_or(self.object).error(problem)
    }

    /// A whole number from 1 to `max`.
    pub fn size(&self, key: &str, max: u64) -> Result<usize> {
        self.required(key)?.size(key, max)
    }

    pub fn size_or(&self, key: &str, max: u64, default: usize) -> Result<usize> {
        if self.optional(key).is_some() { self.size(key, max) } else { Ok(default) }
    }

    /// A number above 0, as f32 too, and at most `max`.
    pub fn positive(&self, key: &str, max: f64) -> Result<f64> {
        positive(self.required(key)?, key, max)
    }

    /// A list of such numbers.
    pub fn positives(&self, key: &str, max: f64) -> Result<Vec<f64>> {
        self.required(key)?.elements()?.into_iter().map(|node| positive(node, key, max)).collect()
    }

    pub fn positive_or(&self, key: &str, max: f64, default: f64) -> Result<f64> {
        if self.optional(key).is_some() { self.positive(key, max) } else { Ok(default) }
    }

    pub fn truth_or(&self, key: &str, default: bool) -> Result<bool> {
        self.optional(key).map_or(Ok(default), |node| node.truth())
    }

    /// The text of the first of `keys` that is there.
    pub fn text_or_none<const N: usize>(&self, keys: [&str; N]) -> Result<Option<String>> {
        keys.iter().find_map(|key| self.optional(key)).map(|node| node.text()).transpose()
    }

    /// A token id or a list of them; none where `key` is absent, and none for a number below 0, which stands for none.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |node: &Node| {
            if node.number().is_ok_and(|number| number < 0.0) {
                return Ok(None);
            }
            let number = node.whole()?;
            u32::try_from(number).map(Some).map_err(|_| node.error(format!("{number} is no token id")))
        };
        let nodes = match self.optional(key) {
            None => Vec::new(),
            Some(node) if node.is_list() => node.elements()?,
            Some(node) => vec![node],
        };
        nodes.iter().filter_map(|node| id(node).transpose()).collect()
    }
}

fn positive(node: Node, key: &str, max: f64) -> Result<f64> {
    const MIN: f64 = 1e-30;
    let number = node.number()?;
    if (MIN..=max).contains(&number) {
        Ok(number)
    } else {
        Err(node.error(format!("`{key}` is {number:?}; it must be from {MIN:e} to {max}")))
    }
}
