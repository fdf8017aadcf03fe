//! Chat templates: Jinja from the checkpoint, run in a sandbox with a bounded
//! number of steps.

use std::path::Path;

use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::Serialize;

use crate::bytes::{Bytes, MIB};
use crate::error::{Error, Hint, Result, Setting};
use crate::fs;
use crate::json::{Document, Node};

const TEMPLATE_FILE: &str = "chat_template.jinja";
const CONFIG_FILE: &str = "tokenizer_config.json";
const CAP: Bytes = Bytes(16 * MIB);
/// Steps that a template may take.
const FUEL: u64 = 10_000_000;

/// What somebody said.
#[derive(Clone, Debug, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

/// A checkpoint's chat template and the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    origin: String,
    bos_token: Value,
    eos_token: Value,
}

impl ChatTemplate {
    /// The template in chat_template.jinja, or in tokenizer_config.json.
    pub fn open(directory: &Path) -> Result<Self> {
        let none = || {
            Error::input(format!("`{}` has no chat template", directory.display()))
                .hint(Hint::naming("leave {} out: the model was not made for conversations", [Setting::ChatTemplate]))
        };
        let config = read(directory, CONFIG_FILE)?.map(|(path, bytes)| Document::parse(path, bytes)).transpose()?;
        let members = config.as_ref().map(|config| config.root().members()).transpose()?.unwrap_or_default();
        let setting = |name: &str| members.iter().find(|m| m.name == name).map(|m| m.value).filter(|v| !v.is_null());
        let (source, origin) = if let Some((path, bytes)) = read(directory, TEMPLATE_FILE)? {
            let broken = |e| Error::input(format!("`{path}` is not UTF-8")).caused_by(e);
            (String::from_utf8(bytes).map_err(broken)?, path)
        } else {
            let template = setting("chat_template").ok_or_else(none)?;
            (default_template(template)?, format!("chat_template of {}", directory.join(CONFIG_FILE).display()))
        };
        // Where there is no such token, a template sees nothing.
        let special = |name| -> Result<Value> {
            Ok(setting(name).map(token_text).transpose()?.flatten().map_or(Value::UNDEFINED, Value::from))
        };
        Ok(Self { source, origin, bos_token: special("bos_token")?, eos_token: special("eos_token")? })
    }

    /// The prompt of a conversation, up to where the assistant is to speak.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", tojson);
        let broken = |e| Error::input(format!("the chat template in `{}` failed", self.origin)).caused_by(e);
        let template = environment.template_from_str(&self.source).map_err(broken)?;
        template
            .render(context! {
                messages => messages,
                add_generation_prompt => true,
                bos_token => self.bos_token,
                eos_token => self.eos_token,
            })
            .map_err(broken)
    }
}

/// The path of a file of the checkpoint, and what is in it, if it is there.
fn read(directory: &Path, file: &str) -> Result<Option<(String, Vec<u8>)>> {
    if !directory.join(file).exists() {
        return Ok(None);
    }
    let path = fs::confined(directory, file)?;
    Ok(Some((path.display().to_string(), fs::read_capped(&path, CAP)?)))
}

/// `tojson` as Transformers defines it: characters as they are, not escaped for HTML.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
fn tojson(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let json = match indent {
        Some(_) => serde_json::to_string_pretty(value),
        None => serde_json::to_string(value),
    };
    json.map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// The template itself, or the one named `default` of a list of named ones.
fn default_template(node: Node) -> Result<String> {
    if node.is_text() {
        return node.text();
    }
    let mut templates = Vec::new();
    for element in node.elements()? {
        let members = element.members()?;
        let text = |name: &str| members.iter().find(|m| m.name == name).map(|m| m.value.text()).transpose();
        if let (Some(name), Some(template)) = (text("name")?, text("template")?) {
            templates.push((name, template));
        }
    }
    let default = templates.into_iter().find(|(name, _)| name == "default");
    default.map(|(_, template)| template).ok_or_else(|| node.error("no template is named `default`"))
}

/// A special token is a text, or an object whose `content` is.
fn token_text(node: Node) -> Result<Option<String>> {
    if node.is_object() {
        return node.members()?.iter().find(|m| m.name == "content").map(|m| m.value.text()).transpose();
    }
    node.text().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(file: &str, content: &str) -> Result<ChatTemplate> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(file), content).unwrap();
        ChatTemplate::open(directory.path())
    }

    fn hello() -> [Message; 1] {
        [Message { role: "user".into(), content: "  Hello & <bye>".into() }]
    }

    #[test]
    fn templates_render() {
        for (source, rendered) in [
            ("{{ messages[0]['content'] | trim }}", "Hello & <bye>"),
            ("{{ messages[0].content.strip().upper() }}", "HELLO & <BYE>"),
            ("{{ bos_token }}{% for m in messages %}\n{{ m.role }}{% endfor %}", "user"),
            ("{{ messages[0] | tojson }}", r#"{"role":"user","content":"  Hello & <bye>"}"#),
            ("{% if add_generation_prompt %}\n    {{- '<a>' }}\n{% endif %}", "<a>\n"),
        ] {
            assert_eq!(template(TEMPLATE_FILE, source).unwrap().render(&hello()).unwrap(), rendered, "{source}");
        }
    }

    #[test]
    fn the_configuration_may_hold_the_template() {
        for config in [
            r#"{"chat_template": "{{ bos_token }}x", "bos_token": "<s>"}"#,
            r#"{"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "{{ bos_token }}x"}], "bos_token": {"content": "<s>"}}"#,
        ] {
            assert_eq!(template(CONFIG_FILE, config).unwrap().render(&hello()).unwrap(), "<s>x");
        }
        assert!(template(CONFIG_FILE, "{}").unwrap_err().to_string().ends_with("has no chat template"));
    }

    #[test]
    fn a_template_that_fails_or_does_not_end_is_an_error() {
        for (source, cause) in [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}", "fuel"),
            ("{% for %}", "syntax error"),
        ] {
            let error = template(TEMPLATE_FILE, source).unwrap().render(&hello()).unwrap_err();
            let text = std::error::Error::source(&error).unwrap().to_string();
            assert!(text.contains(cause), "{source}: {text}");
        }
    }
}
