//! Chat templates: Jinja from the checkpoint.

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::{Value, context};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use super::jinja::{environment, translate};
use super::parsed::caught;
use super::special::{CONFIG_FILE, Special, document};
use crate::bytes::{Bytes, MIB};
use crate::error::{Error, Hint, Result, Setting};
use crate::fs;
use crate::json::Node;

/// Files that are a template, and files that have one, in the order in which they are looked for.
pub(super) const TEMPLATE_FILES: [&str; 2] = ["chat_template.jinja", "additional_chat_templates/default.jinja"];
pub(super) const JSON_FILES: [&str; 2] = [CONFIG_FILE, "chat_template.json"];
/// The longest template.
const MAX_TEMPLATE: Bytes = Bytes(MIB);

/// What somebody said.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text; an assistant that calls tools may have none.
    pub content: Option<String>,
    /// What else a template may ask for, such as `tool_calls`.
    #[serde(flatten)]
    pub more: Map<String, Json>,
}

impl Message {
    /// A text alone.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), more: Map::new() }
    }
}

/// A checkpoint's chat template and the special tokens that it may name.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ChatTemplate {
    source: String,
    origin: String,
    /// By their names, such as `bos_token`.
    special: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template in chat_template.jinja, in tokenizer_config.json, or in one of the other places that
    /// Transformers knows.
    ///
    /// # Errors
    /// There is none, it is too long, or a file is not as it must be.
    pub fn open(directory: &Path) -> Result<Self> {
        let (source, origin) = Self::find(directory)?.ok_or_else(|| {
            Error::input(format!("`{}` has no chat template", directory.display()))
                .hint(Hint::naming("leave {} out: the model was not made for conversations", [Setting::ChatTemplate]))
        })?;
        if source.len() as u64 > MAX_TEMPLATE.0 {
            return Err(Error::input(format!("the chat template in `{origin}` is longer than {MAX_TEMPLATE}")));
        }
        Ok(Self { source, origin, special: Special::read(directory)?.named })
    }

    /// The template, and where it is.
    fn find(directory: &Path) -> Result<Option<(String, String)>> {
        if let Some(file) = TEMPLATE_FILES.into_iter().find(|file| directory.join(file).exists()) {
            let path = fs::confined(directory, file)?;
            let origin = path.display().to_string();
            let jinja = String::from_utf8(fs::read_capped(&path, MAX_TEMPLATE)?);
            let jinja = jinja.map_err(|e| Error::input(format!("`{origin}` is not UTF-8")).caused_by(e))?;
            return Ok(Some((jinja, origin)));
        }
        for file in JSON_FILES {
            let Some(json) = document(directory, file)? else { continue };
            let members = json.root().members()?;
            let template = members.iter().find(|member| member.name == "chat_template" && !member.value.is_null());
            if let Some(template) = template {
                let origin = format!("chat_template of {}", directory.join(file).display());
                return Ok(Some((default_template(template.value)?, origin)));
            }
        }
        Ok(None)
    }

    /// The prompt of a conversation in which `tools` may be called, up to where the assistant is to speak. The
    /// template runs in this process, and only its steps are limited; `Sandbox::render` limits all that it does.
    ///
    /// # Errors
    /// The template fails, raises an exception, or takes too many steps.
    pub fn render(&self, messages: &[Message], tools: &[Json]) -> Result<String> {
        let render = || {
            let source = translate(&self.source);
            environment().template_from_str(&source)?.render(context! {
                messages => messages,
                add_generation_prompt => true,
                // None where there are none, as in Transformers.
                tools => (!tools.is_empty()).then_some(tools),
                documents => (),
                ..Value::from_serialize(&self.special)
            })
        };
        caught(render, || Error::input(self.failed()))
    }

    pub(super) fn failed(&self) -> String {
        format!("the chat template in `{}` failed", self.origin)
    }
}

/// The template itself, or the one named `default` of some with names, which are an object or a list of such.
fn default_template(node: Node) -> Result<String> {
    if node.is_text() {
        return node.text();
    }
    let mut templates = Vec::new();
    if node.is_object() {
        templates.extend(node.members()?.into_iter().map(|member| (member.name, member.value)));
    } else {
        for element in node.elements()? {
            let members = element.members()?;
            let value = |name: &str| members.iter().find(|m| m.name == name).map(|m| m.value);
            if let (Some(name), Some(template)) = (value("name"), value("template")) {
                templates.push((name.text()?, template));
            }
        }
    }
    let default = templates.into_iter().find(|(name, _)| name == "default");
    default.ok_or_else(|| node.error("no template is named `default`"))?.1.text()
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
        [Message::new("user", "  Hello & <bye>")]
    }

    #[test]
    fn templates_render() {
        for (source, rendered) in [
            ("{{ messages[0]['content'] | trim }}", "Hello & <bye>"),
            ("{{ messages[0].content.strip().upper() }}", "HELLO & <BYE>"),
            ("{{ bos_token }}{% for m in messages %}\n{{ m.role }}{% endfor %}", "user"),
            ("{{ messages[0] | tojson }}", r#"{"role": "user", "content": "  Hello & <bye>"}"#),
            (
                "{{ {'a': [1, 2.5, none, true], 'b': {}} | tojson(indent=2) }}",
                "{\n  \"a\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"b\": {}\n}",
            ),
            (
                "{{ {'é': 1e16, 'a': '🦀'} | tojson(ensure_ascii=true, sort_keys=true) }}",
                r#"{"a": "\ud83e\udd80", "\u00e9": 1e+16}"#,
            ),
            ("{{ {'z': 1, 'a': 2} | tojson(separators=(',', ':')) }}", r#"{"z":1,"a":2}"#),
            ("{% for k in {'z': 1, 'a': 2} %}{{ k }}{% endfor %}", "za"),
            ("{% if tools is not none or documents is not none %}tools{% endif %}{{ tools }}", "None"),
            ("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}", "user"),
            ("{{ 'role %s' % messages[0].role }} {{ '%d-%s' % (1, 'x') }}", "role user 1-x"),
            ("{{ 'a,b,c'.rsplit(',', 1) }}{{ ' a  b c '.rsplit(none, 1) }}", "['a,b', 'c'][' a  b', 'c']"),
            ("{{ 'x y'.partition(' ')[0] }}{{ 'abc'.removeprefix('a') }}{{ 'aaa'.count('') }}", "xbc4"),
            (
                "{% set j = joiner(',') %}{{ j() }}a{{ j() }}b{{ true }}{{ [none, \"it's\"] }}",
                "a,bTrue[None, \"it's\"]",
            ),
            ("{{ '7'.zfill(3) }}{{ 'ab'.center(5, '*') }}{{ 'aB'.swapcase() }}", "007**ab*Ab"),
            ("{% if add_generation_prompt %}\n    {{- '<a>' }}\n{% endif %}", "<a>\n"),
        ] {
            assert_eq!(
                template(TEMPLATE_FILES[0], source).unwrap().render(&hello(), &[]).unwrap(),
                rendered,
                "{source}"
            );
        }
    }

    #[test]
    fn calls_and_tools_reach_the_template() {
        let message = |json: &str| serde_json::from_str::<Message>(json).unwrap();
        let messages = [
            message(r#"{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "add"}}]}"#),
            message(r#"{"role": "tool", "content": "3", "tool_call_id": "a"}"#),
        ];
        let tools = [serde_json::json!({"type": "function", "function": {"name": "add"}})];
        for (source, rendered) in [
            ("{{ messages[0].tool_calls[0].function.name }} {{ messages[1].tool_call_id }}", "add a"),
            ("{{ messages[0].content is none }} {{ 'tool_calls' in messages[1] }}", "True False"),
            (
                "{% for tool in tools %}{{ tool | tojson }}{% endfor %}",
                r#"{"type": "function", "function": {"name": "add"}}"#,
            ),
        ] {
            let template = template(TEMPLATE_FILES[0], source).unwrap();
            assert_eq!(template.render(&messages, &tools).unwrap(), rendered, "{source}");
        }
    }

    #[test]
    fn the_configuration_may_hold_the_template() {
        for config in [
            r#"{"chat_template": "{{ bos_token }}x", "bos_token": "<s>"}"#,
            r#"{"chat_template": {"tool": "t", "default": "{{ bos_token }}x"}, "bos_token": "<s>"}"#,
            r#"{"chat_template": "{{ bos_token }}x", "tokenizer_class": "LlamaTokenizerFast"}"#,
            r#"{"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "{{ bos_token }}x"}], "bos_token": {"content": "<s>"}}"#,
        ] {
            assert_eq!(template(CONFIG_FILE, config).unwrap().render(&hello(), &[]).unwrap(), "<s>x");
        }
        assert!(template(CONFIG_FILE, "{}").unwrap_err().to_string().ends_with("has no chat template"));
    }

    #[test]
    fn templates_are_found_where_transformers_finds_them() {
        for files in [
            &[
                ("chat_template.jinja", "{{ bos_token }}x"),
                ("tokenizer_config.json", r#"{"chat_template": "y", "bos_token": "<s>"}"#),
            ][..],
            &[
                ("additional_chat_templates/default.jinja", "{{ bos_token }}x"),
                ("special_tokens_map.json", r#"{"bos_token": "<s>"}"#),
            ],
            &[
                ("chat_template.json", r#"{"chat_template": "{{ bos_token }}x"}"#),
                ("tokenizer_config.json", r#"{"tokenizer_class": "LlamaTokenizer"}"#),
            ],
        ] {
            let directory = tempfile::tempdir().unwrap();
            for (file, content) in files {
                let path = directory.path().join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, content).unwrap();
            }
            assert_eq!(
                ChatTemplate::open(directory.path()).unwrap().render(&hello(), &[]).unwrap(),
                "<s>x",
                "{files:?}"
            );
        }
    }

    #[test]
    fn a_template_that_fails_or_does_not_end_is_an_error() {
        for (source, cause) in [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}", "fuel"),
            ("{% for %}", "syntax error"),
        ] {
            let error = template(TEMPLATE_FILES[0], source).unwrap().render(&hello(), &[]).unwrap_err();
            let text = std::error::Error::source(&error).unwrap().to_string();
            assert!(text.contains(cause), "{source}: {text}");
        }
    }
}
