//! Strict JSON from outside: duplicate keys are refused, and every complaint
//! names the file, the line and the column. What nobody reads may be as Python has it: numbers that are
//! not finite, and names that stand twice.
//!
//! [`Document`] owns the text; a [`Node`] is a value in it that has not been
//! looked into yet. Rooms that read JSON walk nodes into checked types of
//! their own.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::{Error, Result, printable};

/// The most members of an object that are looked into.
const MAX_MEMBERS: usize = 1 << 20;
/// The numbers that Python writes and JSON does not have.
const NOT_FINITE: [&str; 3] = ["NaN", "Infinity", "-Infinity"];
/// What a text begins with, as long as it was, that stands for such a number here.
const MARK: &str = "\"\u{7f}";

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
        let marked = |number: &str| format!("\"{}\"", "\u{7f}".repeat(number.len() - 2));
        let text = without_infinities(&text, marked).into_owned();
        serde_json::from_str::<IgnoredAny>(&text)
            .map_err(|e| Error::input(format!("`{name}` is not JSON")).caused_by(e))?;
        Ok(Self { name, text })
    }

    /// The outermost value.
    pub fn root(&self) -> Node<'_> {
        Node { document: self, raw: self.text.trim(), again: None }
    }
}

/// `text` with other text in the place of numbers that are not finite.
pub fn without_infinities(text: &str, put: impl Fn(&str) -> String) -> Cow<'_, str> {
    if !NOT_FINITE.iter().any(|number| text.contains(number)) {
        return text.into();
    }
    let bytes = text.as_bytes();
    let (mut out, mut copied, mut at, mut last) = (String::with_capacity(text.len()), 0, 0, b' ');
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => {
                (at, last) = (behind_text(bytes, at), b'"');
                continue;
            }
            // Nothing but a value stands behind these, and before those.
            b'N' | b'I' | b'-' if b":,[".contains(&last) => {
                let ends = |behind: &str| behind.trim_start().starts_with([',', ']', '}']);
                if let Some(number) =
                    NOT_FINITE.iter().find(|number| text[at..].strip_prefix(**number).is_some_and(ends))
                {
                    out += &text[copied..at];
                    out += &put(number);
                    at += number.len();
                    (copied, last) = (at, b'0');
                    continue;
                }
            }
            _ => {}
        }
        if !byte.is_ascii_whitespace() {
            last = *byte;
        }
        at += 1;
    }
    out += &text[copied..];
    out.into()
}

/// Where the text that begins at `start` has ended, if it does.
fn behind_text(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    loop {
        match bytes.get(at) {
            Some(b'\\') => at += 2,
            Some(b'"') => return at + 1,
            Some(_) => at += 1,
            None => return at,
        }
    }
}

/// A value in a [`Document`].
#[derive(Clone, Copy)]
pub struct Node<'a> {
    document: &'a Document,
    raw: &'a str,
    /// Where its name stands a second time; it is then in doubt, and not read.
    again: Option<&'a str>,
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
        let is_number = self.raw.starts_with(MARK);
        let found = match self.raw.as_bytes().first() {
            Some(_) if is_number => NOT_FINITE.iter().find(|number| number.len() == self.raw.len()).unwrap_or(&"NaN"),
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
        Self { document: self.document, raw: raw.get(), again: None }
    }

    /// The value's text.
    fn json(&self) -> Result<&'a str> {
        let Some(again) = self.again else { return Ok(self.raw) };
        let key = Self { document: self.document, raw: again, again: None };
        Err(key.error(format!("`{}` stands twice in this object", printable(&key.text()?))))
    }

    /// Whether the value is `null`.
    pub fn is_null(&self) -> bool {
        self.raw == "null" && self.again.is_none()
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

    /// The members of an object in their order; none stands twice.
    pub fn members(&self) -> Result<Vec<Member<'a>>> {
        let members = self.members_to_read()?;
        members.iter().try_for_each(|member| member.value.json().map(drop))?;
        Ok(members)
    }

    /// As [`Node::members`], for one who reads some of them: a value whose name stands twice cannot be read.
    pub fn members_to_read(&self) -> Result<Vec<Member<'a>>> {
        let pairs = serde_json::Deserializer::from_str(self.json()?).deserialize_map(Pairs).map_err(|_| {
            if self.is_object() {
                self.error(format!("an object of more than {MAX_MEMBERS} members is not read"))
            } else {
                self.wrong("an object")
            }
        })?;
        let mut places = HashMap::with_capacity(pairs.len());
        let mut members: Vec<Member> = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            let key = self.child(key);
            let name = key.text()?;
            if let Some(at) = places.insert(name.clone(), members.len()) {
                members[at].value.again.get_or_insert(key.raw);
                places.insert(name, at);
            } else {
                members.push(Member { name, key, value: self.child(value) });
            }
        }
        Ok(members)
    }

    /// The elements of a list.
    pub fn elements(&self) -> Result<Vec<Self>> {
        let raws: Vec<&RawValue> = serde_json::from_str(self.json()?).map_err(|_| self.wrong("a list"))?;
        Ok(raws.into_iter().map(|raw| self.child(raw)).collect())
    }

    /// The value as a type that serde reads.
    pub fn parse<T: serde::Deserialize<'a>>(&self) -> Result<T> {
        serde_json::from_str(self.json()?).map_err(|e| {
            // The value's own place is told instead; serde counts from its start.
            let (text, place) = (e.to_string(), format!(" at line {} column {}", e.line(), e.column()));
            self.error(printable(text.strip_suffix(&place).unwrap_or(&text)))
        })
    }

    /// A text.
    pub fn text(&self) -> Result<String> {
        let text = serde_json::from_str(self.json()?).ok().filter(|_| !self.raw.starts_with(MARK));
        text.ok_or_else(|| self.wrong("a text"))
    }

    /// A whole number that is not negative.
    pub fn whole(&self) -> Result<u64> {
        serde_json::from_str(self.json()?).map_err(|_| self.wrong("a whole number, 0 or more,"))
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
        serde_json::from_str(self.json()?)
            .ok()
            .filter(|number: &f64| number.is_finite())
            .ok_or_else(|| self.wrong("a number"))
    }

    /// `true` or `false`.
    pub fn truth(&self) -> Result<bool> {
        serde_json::from_str(self.json()?).map_err(|_| self.wrong("`true` or `false`"))
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
    fn what_nobody_reads_may_be_as_python_has_it() {
        let text = "{\"a\": [NaN, -Infinity],\n \"é\": Infinity , \"t\": \"\\\": NaN,\", \"n\": 1, \"n\": NaN}";
        let document = document(text).unwrap();
        let members = document.root().members_to_read().unwrap();
        let value = |name: &str| members.iter().find(|member| member.name == name).unwrap().value;
        let error = |result: Result<f64>| result.unwrap_err().to_string();
        assert_eq!(value("t").text().unwrap(), "\": NaN,");
        for (message, found) in [
            ("line 1, column 8: a number is wanted here, not NaN", value("a").elements().unwrap()[0].number()),
            ("line 1, column 13: a number is wanted here, not -Infinity", value("a").elements().unwrap()[1].number()),
            ("line 2, column 7: a number is wanted here, not Infinity", value("é").number()),
            ("line 2, column 43: `n` stands twice in this object", value("n").number()),
        ] {
            assert_eq!(error(found), format!("`x.json`, {message}"));
        }
        assert!(value("é").text().is_err() && document.root().members().is_err());
        for wrong in ["{NaN: 1}", "{\"a\": 1, NaN: 1}", "[NaNa]", "[-NaN]", "NaN", "[1 NaN]"] {
            assert!(super::Document::parse("x.json", wrong.into()).is_err(), "{wrong}");
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
