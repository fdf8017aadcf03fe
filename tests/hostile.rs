//! Templates and tokenizers that were made to harm: each run ends with an answer or an error, soon, and in little
//! memory.

#[path = "support/command.rs"]
mod command;

use std::path::Path;
use std::time::{Duration, Instant};

use command::{evenkeel, run_with, stderr};
use serde_json::{Value, json};
use tempfile::TempDir;

const LONGEST: Duration = Duration::from_secs(20);

/// A copy of a small checkpoint, with a file of another content.
fn checkpoint(file: &str, content: &str) -> TempDir {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama");
    let directory = tempfile::tempdir().unwrap();
    for entry in fixture.read_dir().unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(directory.path().join(file), content).unwrap();
    directory
}

/// Runs a prompt, and gives the exit code and what was said.
fn generate(directory: &TempDir, prompt: &str, flags: &[&str]) -> (Option<i32>, String) {
    let path = directory.path().to_str().unwrap();
    let mut arguments = vec!["generate", path, "--max-new-tokens", "1", "--prompt", prompt];
    arguments.extend(flags);
    let begun = Instant::now();
    let output = run_with(evenkeel(&arguments), b"");
    assert!(begun.elapsed() < LONGEST, "{:?}", begun.elapsed());
    (output.status.code(), stderr(&output))
}

#[test]
fn templates_end() {
    let nots = format!("{{{{ {}true }}}}", "not ".repeat(200_000));
    let filters = format!("{{{{ 'a'{} }}}}", "|string".repeat(100_000));
    let sums = format!("{{{{ 1{} }}}}", "+1".repeat(200_000));
    let elifs = format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(60_000));
    let deep = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    for (name, template) in [
        (
            "doubling",
            "{% set ns = namespace(s='ab') %}{% for i in range(33) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}",
        ),
        ("a list times a number", "{{ ([1] * 9000000000)|list|length }}"),
        ("a long text joined", "{% set a='x'*1000000 %}{{ (range(99999)|join(a))|length }}"),
        ("much output", "{% set a='x'*1000000 %}{% for i in range(90000) %}{{ a }}{% endfor %}"),
        ("a namespace in itself", "{% set ns = namespace(x=1) %}{% set ns.x = ns %}{{ ns }}"),
        ("a namespace in itself as JSON", "{% set ns = namespace(x=1) %}{% set ns.x = ns %}{{ ns|tojson }}"),
        ("a list in lists", deep),
        ("wide numbers", "{{ '%.2147483647f'|format(1.0)|length }}"),
        ("a wide text", "{{ 'a'.ljust(90000000000) }}{{ '{:>90000000000}'.format(1) }}"),
        ("an indent", "{{ 'a\nb'|indent(90000000000) }}{{ [1]|tojson(indent=90000000000) }}"),
        ("much work in a step", "{% for i in range(90000) %}{{ range(99999)|sort|list|length }}{% endfor %}"),
        ("many negations", &nots),
        ("many filters", &filters),
        ("many sums", &sums),
        ("many branches", &elifs),
    ] {
        let directory = checkpoint("chat_template.jinja", template);
        let (code, said) = generate(&directory, "t1 t2", &["--chat"]);
        assert_eq!(code, Some(1), "{name}: {said}");
        assert!(said.contains("the chat template in") && said.contains("failed"), "{name}: {said}");
    }
    let (code, said) = generate(&checkpoint("chat_template.jinja", "{{ 'aaa'.count('') }}"), "t1", &["--chat"]);
    assert_eq!(code, Some(0), "{said}");
}

/// A tokenizer of the words `t0` to `t255`, with some of its parts replaced.
fn tokenizer(parts: &Value) -> String {
    let vocab: serde_json::Map<_, _> = (0..256).map(|id| (format!("t{id}"), json!(id))).collect();
    let mut tokenizer = json!({
        "version": "1.0",
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"},
    });
    for (name, part) in parts.as_object().unwrap() {
        tokenizer[name] = part.clone();
    }
    tokenizer.to_string()
}

#[test]
fn tokenizers_end() {
    let replace = |from: &str, to: String| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let grow = |from: &str| vec![replace(from, from.repeat(1000)); 6];
    let precompiled = |map: &str| json!({"normalizer": {"type": "Precompiled", "precompiled_charsmap": map}});
    let regex = json!({"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": false});
    let doubles = json!({"type": "Replace", "pattern": {"Regex": "."}, "content": "xx"});
    let special = json!([{"SpecialToken": {"id": "zz", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    let template = |special_tokens: Value| json!({"post_processor": {"type": "TemplateProcessing", "single": special, "pair": [], "special_tokens": special_tokens}});
    let many_ids = vec![1; 100_000];
    let many_tokens = json!({"zz": {"id": "zz", "ids": many_ids, "tokens": vec!["t1"; 100_000]}});
    for (name, parts, prompt) in [
        ("texts that grow", json!({"normalizer": {"type": "Sequence", "normalizers": grow("x")}}), "t1 xé"),
        ("texts that double", json!({"normalizer": {"type": "Sequence", "normalizers": vec![doubles; 60]}}), "t1 xé"),
        ("answers that grow", json!({"decoder": {"type": "Sequence", "decoders": grow("t")}}), "t1 t2"),
        ("a map of nothing", precompiled("AAAAAA=="), "t1 xé"),
        ("a map of 8 GB", precompiled("/////w=="), "t1 xé"),
        ("pieces of no length", json!({"pre_tokenizer": {"type": "FixedLength", "length": 0}}), "t1 t2"),
        ("a slow pattern", json!({"pre_tokenizer": regex}), &"x".repeat(3000)),
        ("a token that is not there", template(json!({})), "t1 t2"),
        ("a token of many ids", template(many_tokens), "t1 t2"),
    ] {
        let (code, said) = generate(&checkpoint("tokenizer.json", &tokenizer(&parts)), prompt, &[]);
        assert_eq!(code, Some(1), "{name}: {said}");
        assert!(!said.contains("panicked"), "{name}: {said}");
    }
    for (name, parts) in [
        (
            "padding",
            json!({"padding": {"strategy": {"Fixed": 1_000_000_000}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "t0"}}),
        ),
        (
            "truncation",
            json!({"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 2}}),
        ),
    ] {
        let (code, said) = generate(&checkpoint("tokenizer.json", &tokenizer(&parts)), "t1 t2", &[]);
        assert_eq!(code, Some(0), "{name}: {said}");
    }
}
