//! Jinja as Transformers runs it: what Python's dicts, strings and json have, and minijinja has not.

use std::io;

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::{globals, pycompat};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

type Result<T, E = Error> = std::result::Result<T, E>;

/// Steps that a template may take.
const FUEL: u64 = 10_000_000;

/// An environment for chat templates.
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, _, value| print(out, value));
    environment.add_filter("string", |value: &Value| if value.is_undefined() { String::new() } else { text(value) });
    environment.add_filter("tojson", tojson);
    environment.add_function("cycler", globals::cycler);
    environment.add_function("joiner", globals::joiner);
    environment.add_function("raise_exception", |message: String| Err::<Value, _>(invalid(message)));
    environment.add_function("strftime_now", |format: &str| {
        let now = jiff::Zoned::now();
        jiff::fmt::strtime::format(format, &now).map_err(|e| invalid(e.to_string()))
    });
    environment
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn print(out: &mut Output, value: &Value) -> Result<()> {
    if value.is_undefined() {
        return Ok(());
    }
    out.write_str(&text(value)).map_err(|_| Error::from(ErrorKind::WriteFailure))
}

/// What Python's `str` gives.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| representation(value), str::to_owned)
}

/// What Python's `repr` gives.
fn representation(value: &Value) -> String {
    let list =
        |values: minijinja::value::ValueIter| values.map(|value| representation(&value)).collect::<Vec<_>>().join(", ");
    match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::Number => match f64::try_from(value.clone()) {
            Ok(number) if !value.is_integer() => float(number),
            _ => value.to_string(),
        },
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            let mut quoted = String::from(quote);
            for c in text.chars() {
                match c {
                    '\\' | '\'' | '"' if c == quote || c == '\\' => quoted.extend(['\\', c]),
                    '\n' | '\r' | '\t' => quoted.extend(c.escape_default()),
                    c if c.is_control() => quoted += &format!("\\x{:02x}", u32::from(c)),
                    c => quoted.push(c),
                }
            }
            quoted + &quote.to_string()
        }
        ValueKind::Seq => value.try_iter().map_or_else(|_| value.to_string(), |values| format!("[{}]", list(values))),
        ValueKind::Map => {
            let Ok(keys) = value.try_iter() else { return value.to_string() };
            let member = |key: Value| {
                let member = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", representation(&key), representation(&member))
            };
            format!("{{{}}}", keys.map(member).collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

/// The shortest digits, with an exponent from 16 digits before and four zeros behind the point.
fn float(number: f64) -> String {
    let size = number.abs();
    if !number.is_finite() {
        return if number.is_nan() { "nan".to_owned() } else { number.to_string() };
    }
    if size == 0.0 || (1e-4..1e16).contains(&size) {
        return format!("{number:?}");
    }
    let digits = format!("{number:e}");
    let (digits, exponent) = digits.split_once('e').unwrap_or((&digits, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// Methods of Python's strings.
fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value> {
    let Some(text) = value.as_str() else { return pycompat::unknown_method_callback(state, value, name, args) };
    let pad = |left: fn(usize, usize) -> usize| -> Result<Value> {
        let (width, fill): (usize, Option<char>) = from_args(args)?;
        let missing = width.saturating_sub(text.chars().count());
        let fill = |count| fill.unwrap_or(' ').to_string().repeat(count);
        let left = left(missing, width);
        Ok(Value::from(fill(left) + text + &fill(missing - left)))
    };
    let parts = |parts: [&str; 3]| Ok(parts.map(Value::from).into_iter().collect());
    match name {
        "casefold" => from_args::<()>(args).map(|()| Value::from(text.to_lowercase())),
        "center" => pad(|missing, width| missing / 2 + (missing & width & 1)),
        "count" => {
            let (wanted,): (&str,) = from_args(args)?;
            let count = if wanted.is_empty() { text.chars().count() + 1 } else { text.matches(wanted).count() };
            Ok(Value::from(count))
        }
        "index" => {
            let (wanted,): (&str,) = from_args(args)?;
            let at = text.find(wanted).ok_or_else(|| invalid("substring not found"))?;
            Ok(Value::from(text[..at].chars().count()))
        }
        "ljust" => pad(|_, _| 0),
        "partition" => {
            let (by,): (&str,) = from_args(args)?;
            parts(text.split_once(by).map_or([text, "", ""], |(before, behind)| [before, by, behind]))
        }
        "removeprefix" => {
            from_args(args).map(|(prefix,): (&str,)| Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            from_args(args).map(|(suffix,): (&str,)| Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "rjust" => pad(|missing, _| missing),
        "rpartition" => {
            let (by,): (&str,) = from_args(args)?;
            parts(text.rsplit_once(by).map_or(["", "", text], |(before, behind)| [before, by, behind]))
        }
        "rsplit" => {
            let (by, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most =
                most.and_then(|most| usize::try_from(most).ok()).map_or(usize::MAX, |most| most.saturating_add(1));
            let mut parts: Vec<&str> = match by {
                Some("") => return Err(invalid("empty separator")),
                Some(by) => text.rsplitn(most, by).collect(),
                None => {
                    let mut rest = text.trim_end();
                    let mut parts = Vec::new();
                    while !rest.is_empty() && parts.len() + 1 < most {
                        let at = rest
                            .rfind(char::is_whitespace)
                            .map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
                        parts.push(&rest[at..]);
                        rest = rest[..at].trim_end();
                    }
                    parts.extend((!rest.is_empty()).then_some(rest));
                    parts
                }
            };
            parts.reverse();
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "swapcase" => {
            let swapped = text.chars().flat_map(|c| {
                let (upper, lower) =
                    (c.is_lowercase().then(|| c.to_uppercase()), (!c.is_lowercase()).then(|| c.to_lowercase()));
                upper.into_iter().flatten().chain(lower.into_iter().flatten())
            });
            from_args::<()>(args).map(|()| Value::from(swapped.collect::<String>()))
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let zeros = "0".repeat(width.saturating_sub(text.chars().count()));
            Ok(Value::from(format!("{sign}{zeros}{digits}")))
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// `tojson` as Transformers defines it, `json.dumps` with its arguments.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
fn tojson(value: &Value, indent: Option<Value>, options: Kwargs) -> Result<String> {
    let indent = options.get::<Option<Value>>("indent")?.or(indent).filter(|indent| !indent.is_none());
    let indent = indent.map(|indent| match indent.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => usize::try_from(indent).map(|spaces| " ".repeat(spaces)),
    });
    let indent = indent.transpose()?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let usual = [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned);
    let [item, key] =
        separators.map_or(Ok(usual), TryInto::try_into).map_err(|_| invalid("separators are two texts"))?;
    let is_ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let is_sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;

    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::BadSerialization, "an undefined value is no JSON"));
    }
    let mut json = serde_json::to_value(value).map_err(failed)?;
    if is_sorted {
        json.sort_all_objects();
    }
    let mut bytes = Vec::new();
    let dumps = Dumps { indent, item, key, is_ascii, depth: 0, has_value: false };
    json.serialize(&mut Serializer::with_formatter(&mut bytes, dumps)).map_err(failed)?;
    String::from_utf8(bytes).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// How `json.dumps` writes.
struct Dumps {
    indent: Option<String>,
    item: String,
    key: String,
    is_ascii: bool,
    depth: usize,
    /// Whether the innermost list or object has something in it.
    has_value: bool,
}

impl Dumps {
    fn break_line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        self.indent.as_ref().map_or(Ok(()), |indent| write!(writer, "\n{}", indent.repeat(self.depth)))
    }

    fn begin<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &str) -> io::Result<()> {
        (self.depth, self.has_value) = (self.depth + 1, false);
        writer.write_all(bracket.as_bytes())
    }

    fn begin_value<W: ?Sized + io::Write>(&self, writer: &mut W, is_first: bool) -> io::Result<()> {
        if !is_first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.break_line(writer)
    }

    fn end<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &str) -> io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.break_line(writer)?;
        }
        self.has_value = true;
        writer.write_all(bracket.as_bytes())
    }
}

impl Formatter for Dumps {
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(float(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !self.is_ascii {
            return writer.write_all(fragment.as_bytes());
        }
        let mut units = [0; 2];
        for c in fragment.chars() {
            if c.is_ascii() {
                write!(writer, "{c}")?;
            } else {
                c.encode_utf16(&mut units).iter().try_for_each(|unit| write!(writer, "\\u{unit:04x}"))?;
            }
        }
        Ok(())
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, "[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, "]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_value(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, "{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, "}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}

/// `source` in what minijinja reads: the tags of `generation`, which only mark what the assistant says, become
/// scopes, `'text' % values` a filter, and the ends of lines newlines.
pub fn translate(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut rest = source.as_str();
    let mut translated = String::with_capacity(rest.len());
    while let Some(at) = rest.find(['{']).filter(|at| at + 1 < rest.len()) {
        let (before, tag) = rest.split_at(at);
        translated += before;
        let Some(end) = (match &tag.as_bytes()[..2] {
            b"{#" => Some("#}"),
            b"{%" => Some("%}"),
            b"{{" => Some("}}"),
            _ => None,
        }) else {
            translated.push('{');
            rest = &tag[1..];
            continue;
        };
        let length = if end == "#}" { tag.find(end) } else { code_length(tag, end) };
        let Some(length) = length else {
            rest = tag;
            break;
        };
        let (code, behind) = tag.split_at(length);
        let word = code[2..].trim_matches(|c: char| c.is_whitespace() || "+-".contains(c));
        if end == "%}" && word == "raw" {
            let end = behind.find("endraw").unwrap_or(behind.len());
            translated += code;
            translated += &behind[..end];
            rest = &behind[end..];
            continue;
        }
        match word {
            "generation" | "endgeneration" if end == "%}" => {
                translated += &code.replacen("generation", "with", 1);
            }
            _ if end == "#}" => translated += code,
            _ => percent_to_filter(code, &mut translated),
        }
        rest = behind;
    }
    translated + rest
}

/// The bytes of a tag in front of its `end`, which is not looked for in texts.
fn code_length(tag: &str, end: &str) -> Option<usize> {
    let mut at = 2;
    while !tag.get(at..)?.starts_with(end) {
        at += token_length(&tag[at..])?;
    }
    Some(at)
}

/// The bytes of a text, of a word or number, or of one other character; `None` at the end.
fn token_length(code: &str) -> Option<usize> {
    let first = code.chars().next()?;
    if first == '\'' || first == '"' {
        let mut escaped = false;
        let end = code[1..].find(|c| {
            let is_end = c == first && !escaped;
            escaped = c == '\\' && !escaped;
            is_end
        });
        return end.map(|end| end + 2);
    }
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let word = code.find(|c| !is_word(c)).unwrap_or(code.len());
    Some(word.max(if word == 0 { first.len_utf8() } else { 0 }))
}

/// Adds `code` with every `'text' % operand` in it as `'text'|format(operand)`.
fn percent_to_filter(code: &str, translated: &mut String) {
    let mut rest = code;
    while let Some(length) = token_length(rest) {
        let (token, behind) = rest.split_at(length);
        translated.push_str(token);
        rest = behind;
        if let Some(operand) = behind.trim_start().strip_prefix('%').filter(|_| token.starts_with(['\'', '"'])) {
            let operand = operand.trim_start();
            let length = operand_length(operand);
            let (values, behind) = operand.split_at(length);
            let mut inner = String::new();
            percent_to_filter(values, &mut inner);
            // A tuple is all the values; anything else is the one.
            let is_tuple = values.starts_with('(') && group_length(values) == Some(values.len());
            *translated += &if is_tuple { format!("|format{inner}") } else { format!("|format({inner})") };
            rest = behind;
        }
    }
    translated.push_str(rest);
}

/// The bytes of an operand that binds more tightly than `%`: a value with its sign, members, calls and filters.
fn operand_length(code: &str) -> usize {
    let spaces = |at: usize| code[at..].len() - code[at..].trim_start().len();
    let mut at = code.len() - code.trim_start_matches(['-', '+', ' ']).len();
    at += group_length(&code[at..]).or_else(|| token_length(&code[at..])).unwrap_or(0);
    loop {
        let next = at + spaces(at);
        let end = match code[next..].chars().next() {
            Some('.' | '|') => {
                let name = next + 1 + spaces(next + 1);
                name + token_length(&code[name..]).unwrap_or(0)
            }
            Some('(' | '[') => next + group_length(&code[next..]).unwrap_or(0),
            _ => return at,
        };
        if end == next {
            return at;
        }
        at = end;
    }
}

/// The bytes of what stands in brackets, with them.
fn group_length(code: &str) -> Option<usize> {
    let (mut at, mut depth) = (0, 0usize);
    loop {
        let token = &code[at..at + token_length(&code[at..])?];
        match token {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            return (at > 0).then_some(at + token.len());
        }
        at += token.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_texts_are_translated() {
        for (source, translated) in [
            ("{{ 'a %s' % b.c[0]|upper }}", "{{ 'a %s'|format(b.c[0]|upper) }}"),
            ("{{ 'a %s' % b | upper }}", "{{ 'a %s'|format(b | upper) }}"),
            ("{{ '%d' % -1 }}{{ '%d' % a [0] ~ b }}", "{{ '%d'|format(-1) }}{{ '%d'|format(a [0]) ~ b }}"),
            ("{{ '%s %s' % (a, 'x') + c }}", "{{ '%s %s'|format(a, 'x') + c }}"),
            ("{{ 7 % 2 }} 100 % {% if a %}", "{{ 7 % 2 }} 100 % {% if a %}"),
            ("{{ '%' }}{# '%s' % x #}", "{{ '%' }}{# '%s' % x #}"),
            (
                "{% raw %}{{ '%s' % x }}{% endraw %}{{ '%s' % x }}",
                "{% raw %}{{ '%s' % x }}{% endraw %}{{ '%s'|format(x) }}",
            ),
            ("{%- generation -%}x{% endgeneration %}", "{%- with -%}x{% endwith %}"),
            ("a\r\nb {", "a\nb {"),
            ("{{ '}}' }}{{ {'a': {'b': 1}} }}", "{{ '}}' }}{{ {'a': {'b': 1}} }}"),
        ] {
            assert_eq!(translate(source), translated, "{source}");
        }
    }
}
