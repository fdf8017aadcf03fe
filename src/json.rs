//! Strict JSON from outside: duplicate keys are refused, and every complaint
//! names the file, the line and the column.
//!
//! [`Document`] owns the text; a [`Node`] is a value in it that has not been
//! looked into yet. Rooms that read JSON walk nodes into checked types of
//! their own.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::{Error, Result, printable};

/// The most members of an object that are looked into.
const MAX_MEMBERS: usize = 1 << 20;

/// A syntactically correct JSON text and the name it goes by in messages.
pub struct Document {
    name: String,
    text: String,
}

impl Document {
    /// Checks encoding and syntax of `bytes`.
    pub fn parse(name: impl Into<String>, bytes: Vec<u8>) -> Result<Self> {
        let name = name.into();
        let text = String::from_utf8(bytes).map_err(|e| {
            let offset = e.utf8_error().valid_up_to();
            Error::input(format!("`{name}` is not UTF-8: byte {offset} starts no character"))
        })?;
        if let Some(rest) = text.strip_prefix('\u{feff}') {
            let kind = if rest.trim_start().starts_with(['{', '[']) { "JSON" } else { "it" };
            return Err(Error::input(format!("`{name}` starts with a byte order mark; {kind} must not")));
        }
        serde_json::from_str::<IgnoredAny>(&text)
            .map_err(|e| Error::input(format!("`{name}` is not JSON")).caused_by(e))?;
        Ok(Self { name, text })
    }

    /// The outermost value.
    pub fn root(&self) -> Node<'_> {
        Node { document: self, raw: self.text.trim() }
    }
}

/// A value in a [`Document`].
#[derive(Clone, Copy)]
pub struct Node<'a> {
    document: &'a Document,
    raw: &'a str,
}

/// A member of an object: its name, where the name stands, and its value.
#[derive(Clone)]
pub struct Member<'a> {
    /// The name, unescaped.
    pub name: String,
    /// The name's own place.
    pub key: Node<'a>,
    /// The value.
    pub value: Node<'a>,
}

/// A place in a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    offset: usize,
    line: usize,
    /// In characters.
    column: usize,
}

impl fmt::Display for Place {
    /// Line and column are counted from 1.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line + 1, self.column + 1)
    }
}

impl<'a> Node<'a> {
    /// Where the value starts.
    pub fn place(&self) -> Place {
        self.place_behind(Place::default())
    }

    /// Where the value starts, counted on from the place of one before it.
    pub fn place_behind(&self, before: Place) -> Place {
        let offset = self.raw.as_ptr() as usize - self.document.text.as_ptr() as usize;
        let between = &self.document.text[before.offset..offset];
        let lines = between.matches('\n').count();
        let last = between.rsplit('\n').next().unwrap_or_default().chars().count();
        Place { offset, line: before.line + lines, column: if lines == 0 { before.column + last } else { last } }
    }

    /// An error about this value.
    pub fn error(&self, problem: impl fmt::Display) -> Error {
        Error::input(format!("`{}`, {}: {problem}", self.document.name, self.place()))
    }

    fn wrong(&self, wanted: &str) -> Error {
        let found = match self.raw.as_bytes().first() {
            Some(b'{') => "an object",
            Some(b'[') => "a list",
            Some(b'"') => "a text",
            Some(b't' | b'f') => "a truth value",
            Some(b'n') => "null",
            _ => self.raw,
        };
        self.error(format!("{wanted} is wanted here, not {}", printable(found)))
    }

    fn child(&self, raw: &'a RawValue) -> Self {
        Self { document: self.document, raw: raw.get() }
    }

    /// Whether the value is `null`.
    pub fn is_null(&self) -> bool {
        self.raw == "null"
    }

    /// Whether the value is an object.
    pub fn is_object(&self) -> bool {
        self.raw.starts_with('{')
    }

    /// Whether the value is a list.
    pub fn is_list(&self) -> bool {
        self.raw.starts_with('[')
    }

    /// Whether the value is a text.
    pub fn is_text(&self) -> bool {
        self.raw.starts_with('"')
    }

    /// The members of an object in their order.
    pub fn members(&self) -> Result<Vec<Member<'a>>> {
        let pairs = serde_json::Deserializer::from_str(self.raw).deserialize_map(Pairs).map_err(|_| {
            if self.is_object() {
                self.error(format!("an object of more than {MAX_MEMBERS} members is not read"))
            } else {
                self.wrong("an object")
            }
        })?;
        let mut seen = HashSet::with_capacity(pairs.len());
        let mut members = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            let key = self.child(key);
            let name = key.text()?;
            if !seen.insert(name.clone()) {
                return Err(key.error(format!("`{}` stands twice in this object", printable(&name))));
            }
            members.push(Member { name, key, value: self.child(value) });
        }
        Ok(members)
    }

    /// The elements of a list.
    pub fn elements(&self) -> Result<Vec<Self>> {
        let raws: Vec<&RawValue> = serde_json::from_str(self.raw).map_err(|_| self.wrong("a list"))?;
        Ok(raws.into_iter().map(|raw| self.child(raw)).collect())
    }

    /// The value as a type that serde reads.
    pub fn parse<T: serde::Deserialize<'a>>(&self) -> Result<T> {
        serde_json::from_str(self.raw).map_err(|e| {
            // The value's own place is told instead; serde counts from its start.
            let (text, place) = (e.to_string(), format!(" at line {} column {}", e.line(), e.column()));
            self.error(printable(text.strip_suffix(&place).unwrap_or(&text)))
        })
    }

    /// A text.
    pub fn text(&self) -> Result<String> {
        serde_json::from_str(self.raw).map_err(|_| self.wrong("a text"))
    }

    /// A whole number that is not negative.
    pub fn whole(&self) -> Result<u64> {
        serde_json::from_str(self.raw).map_err(|_| self.wrong("a whole number, 0 or more,"))
    }

    /// The value of `key`: a whole number from 1 to `max`.
    pub fn size(&self, key: &str, max: u64) -> Result<usize> {
        let number = self.whole()?;
        usize::try_from(number)
            .ok()
            .filter(|_| (1..=max).contains(&number))
            .ok_or_else(|| self.error(format!("`{key}` is {number}; it must be from 1 to {max}")))
    }

    /// A text as what it stands for.
    pub fn spelled<T: FromStr<Err: fmt::Display>>(&self) -> Result<T> {
        self.text()?.parse().map_err(|e| self.error(e))
    }

    /// A finite number.
    pub fn number(&self) -> Result<f64> {
        serde_json::from_str(self.raw)
            .ok()
            .filter(|number: &f64| number.is_finite())
            .ok_or_else(|| self.wrong("a number"))
    }

    /// `true` or `false`.
    pub fn truth(&self) -> Result<bool> {
        serde_json::from_str(self.raw).map_err(|_| self.wrong("`true` or `false`"))
    }
}

struct Pairs;

impl<'de> Visitor<'de> for Pairs {
    type Value = Vec<(&'de RawValue, &'de RawValue)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            if pairs.len() == MAX_MEMBERS {
                return Err(A::Error::custom("too many members"));
            }
            pairs.push(pair);
        }
        Ok(pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Result<Document> {
        Document::parse("x.json", text.as_bytes().to_vec())
    }

    #[test]
    fn values_and_their_places() {
        let document = document("{\n  \"a\": 1,\n  \"é\": [true, \"x\"], \"n\": null\n}").unwrap();
        let members = document.root().members().unwrap();
        assert_eq!(members.len(), 3);
        assert_eq!(members[0].value.whole().unwrap(), 1);
        assert_eq!(members[0].key.place().to_string(), "line 2, column 3");
        assert_eq!(members[1].name, "é");
        let list = members[1].value.elements().unwrap();
        assert!(list[0].truth().unwrap());
        assert_eq!(list[1].text().unwrap(), "x");
        assert_eq!(list[1].place().to_string(), "line 3, column 15");
        assert!(members[2].value.is_null());
    }

    #[test]
    fn complaints_name_the_place() {
        for (text, message) in [
            ("{\"a\": 1,}", "`x.json` is not JSON"),
            ("\u{feff}{}", "`x.json` starts with a byte order mark; JSON must not"),
            ("[1]", "`x.json`, line 1, column 1: an object is wanted here, not a list"),
            ("{\"a\": 1, \"b\": 2,\n \"a\": 3}", "`x.json`, line 2, column 2: `a` stands twice in this object"),
            ("{\"a\": 1, \"\\u0061\": 3}", "`x.json`, line 1, column 10: `a` stands twice in this object"),
        ] {
            let error = match document(text) {
                Ok(document) => document.root().members().err().expect(text),
                Err(error) => error,
            };
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_refused_with_their_offset() {
        let error = Document::parse("x.json", b"{\"a\xff\": 1}".to_vec()).err().unwrap();
        assert_eq!(error.to_string(), "`x.json` is not UTF-8: byte 3 starts no character");
    }

    #[test]
    fn depth_does_not_overflow_the_stack() {
        let text = format!("{}{}", "[".repeat(1_000_000), "]".repeat(1_000_000));
        let document = document(&text).unwrap();
        assert_eq!(document.root().elements().unwrap().len(), 1);
    }
}
