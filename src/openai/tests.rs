use std::path::Path;

use serde_json::{Value, json};

use super::body::{Body, Subject};
use super::prompt::Prompt;
use super::{Failure, Form, Writer};
use crate::error::Error;
use crate::generate::{Event, Finish, GenerateReport, Logprobs, Piece, Sampling};
use crate::text::Tokenizer;

fn body(form: Form, json: &Value) -> Body {
    Body::parse(form, json.to_string().as_bytes()).unwrap()
}

fn chat(more: &Value) -> Value {
    let mut body = json!({"model": "any", "messages": [{"role": "user", "content": "Hello"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[test]
fn prompts_have_four_forms() {
    let text = |text: &str| Prompt::Text(text.to_owned());
    for (prompt, prompts) in [
        (json!("a"), vec![text("a")]),
        (json!(["a", "b"]), vec![text("a"), text("b")]),
        (json!([1, 2]), vec![Prompt::Tokens(vec![1, 2])]),
        (json!([[1], [2, 3], "a"]), vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3]), text("a")]),
    ] {
        let Subject::Prompts(parsed) = body(Form::Text, &json!({"prompt": prompt})).subject else { panic!("{prompt}") };
        assert_eq!(parsed, prompts);
    }
}

#[test]
fn messages_become_what_templates_take() {
    let call = json!({"id": "a", "type": "function", "function": {"name": "add", "arguments": "{\"x\": [1, 2]}"}});
    let messages = json!([
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "crab"},
        {"role": "assistant", "content": null, "tool_calls": [call], "refusal": null, "audio": null},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
    ]);
    let tools = json!([{"type": "function", "function": {"name": "add"}}]);
    let Subject::Chat { messages, tools: taken } =
        body(Form::Chat, &json!({"messages": messages, "tools": tools})).subject
    else {
        panic!("no chat")
    };
    let arguments = json!({"x": [1, 2]});
    let expected = json!([
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a\nb", "name": "crab"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "add", "arguments": arguments}},
        ]},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
    ]);
    assert_eq!(serde_json::to_value(messages).unwrap(), expected);
    assert_eq!(Value::from(taken), tools);
    for (choice, count) in [("auto", 1), ("none", 0)] {
        let body = body(Form::Chat, &chat(&json!({"tools": tools, "tool_choice": choice})));
        assert!(matches!(body.subject, Subject::Chat { tools, .. } if tools.len() == count), "{choice}");
    }
}

#[test]
fn what_a_body_leaves_open_is_the_models() {
    let model = Sampling { temperature: 0.6, top_k: Some(20), top_p: Some(0.95), ..Sampling::greedy() };
    for (more, sampling) in [
        (json!({}), model.clone()),
        (json!({"temperature": null, "user": "a", "store": true, "unknown": [1]}), model.clone()),
        (json!({"temperature": 0, "top_p": 1}), Sampling { temperature: 0.0, top_p: Some(1.0), ..model.clone() }),
        (json!({"top_k": -1, "min_p": 0.1}), Sampling { top_k: None, min_p: Some(0.1), ..model.clone() }),
        (
            json!({"repetition_penalty": 1.5, "top_k": 3}),
            Sampling { top_k: Some(3), repetition_penalty: 1.5, ..model.clone() },
        ),
    ] {
        assert_eq!(body(Form::Chat, &chat(&more)).sampling(&model), sampling, "{more}");
    }
    let body = body(Form::Chat, &chat(&json!({"max_tokens": 1, "max_completion_tokens": 2, "seed": -1, "stop": "a"})));
    assert_eq!((body.max_tokens, body.seed, body.stop), (Some(2), Some(u64::MAX), vec!["a".to_owned()]));
}

#[test]
fn what_is_neutral_is_taken() {
    for more in [
        json!({"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "echo": false}),
        json!({"suffix": null, "functions": [], "function_call": "none", "modalities": ["text"], "audio": null}),
        json!({"skip_special_tokens": true, "length_penalty": 1.0, "tool_choice": null, "response_format": null}),
        json!({"response_format": {"type": "text"}, "logprobs": false, "top_logprobs": 0, "metadata": {"a": "b"}}),
    ] {
        let body = body(Form::Chat, &chat(&more));
        assert!(body.schema.is_none() && body.logprobs.is_none(), "{more}");
    }
}

#[test]
fn what_is_wrong_or_not_done_is_named() {
    for (more, param) in [
        (json!({"best_of": 2}), "best_of"),
        (json!({"echo": true}), "echo"),
        (json!({"suffix": "a"}), "suffix"),
        (json!({"logit_bias": {"1": 5}}), "logit_bias"),
        (json!({"frequency_penalty": 0.5}), "frequency_penalty"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"reasoning_effort": "high"}), "reasoning_effort"),
        (json!({"n": 0}), "n"),
        (json!({"n": 257}), "n"),
        (json!({"n": u64::MAX}), "n"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"stop": 1}), "stop"),
        (json!({"stop": vec!["a"; 65]}), "stop"),
        (json!({"stop": "a".repeat(1025)}), "stop"),
        (json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"top_logprobs": 1}), "top_logprobs"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": {"type": "function"}}), "tool_choice"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "a"}), "messages"),
        (json!({"messages": [{"role": "robot", "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 1}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "messages[0].content[0].type"),
        (json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}), "messages[0].content[0].text"),
        (json!({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}), "messages[0].audio"),
    ] {
        let error = Body::parse(Form::Chat, chat(&more).to_string().as_bytes()).err().unwrap();
        let failure = Failure::from(&error);
        assert_eq!((failure.status, failure.param.as_deref()), (400, Some(param)), "{more}");
        assert!(failure.message.starts_with(&format!("`{param}` ")), "{}", failure.message);
    }
    for prompt in
        [json!([]), json!([1, "a"]), json!(["a", 1]), json!([[1], 2]), json!([-1]), json!([[["a"]]]), json!(null)]
    {
        let error = Body::parse(Form::Text, json!({"prompt": prompt}).to_string().as_bytes()).err().unwrap();
        assert!(Failure::from(&error).param.unwrap().starts_with("prompt"), "{prompt}: {error}");
    }
}

#[test]
fn what_is_no_object_is_refused() {
    let deep = format!("{{\"tools\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    for text in [
        "",
        "{",
        "[]",
        "null",
        "{} {}",
        "{\"prompt\": \"a\", \"prompt\": \"b\"}",
        "\u{feff}{}",
        deep.as_str(),
        "{\"prompt\": \"\\ud800\"}",
    ] {
        let error = Body::parse(Form::Text, text.as_bytes()).err();
        let failure = Failure::from(&error.unwrap_or_else(|| panic!("{text:.40} is taken")));
        assert_eq!(failure.status, 400, "{text:.40}");
    }
    assert!(Body::parse(Form::Text, b"{\"prompt\": \"\xff\"}").is_err());
}

#[test]
fn failures_have_the_status_that_a_client_acts_by() {
    for (error, status) in [
        (Error::input("a"), 400),
        (Error::usage("a"), 400),
        (Error::new(crate::ErrorKind::Busy, "a"), 429),
        (Error::device("a"), 500),
        (Error::does_not_fit("a"), 500),
    ] {
        assert_eq!(Failure::from(&error).status, status, "{error:?}");
    }
    let error = Error::input("a").caused_by("b").hint("c");
    let expected =
        json!({"error": {"message": "a: b; c", "type": "invalid_request_error", "param": null, "code": null}});
    assert_eq!(Failure::from(&error).to_json(), expected);
}

/// A writer of one choice that has log probabilities, and what it is told: a token, half a character, its other half,
/// the end.
fn told(form: Form) -> (Writer, Vec<Event>) {
    let ferris = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ferris-7m");
    let tokenizer = Tokenizer::open(&ferris, 4096).unwrap();
    let writer = Writer::new(form, "crab", 1, 7, Some(tokenizer.token_bytes().unwrap()), &[0]).with_usage(true);
    let (a, half) = (tokenizer.encode(" a", false).unwrap()[0], tokenizer.encode("é", false).unwrap());
    assert_eq!(half.len(), 2, "é is two tokens here");
    let piece = |token, text: &str| {
        let logprobs = Logprobs { logprob: -0.5, top: vec![(a, -0.25), (token, f32::NEG_INFINITY)] };
        Event::Piece(Piece { token: Some(token), text: text.to_owned(), logprobs: Some(logprobs) })
    };
    let report = GenerateReport {
        prompt_tokens: 7,
        generated_tokens: 4,
        prefill_seconds: 0.0,
        decode_seconds: 0.0,
        finish: Finish::EndOfText,
        launched_apart: None,
    };
    (writer, vec![piece(a, " a"), piece(half[0], ""), piece(half[1], "é"), piece(0, ""), Event::Done(report)])
}

#[test]
fn a_whole_answer_has_all() {
    let (mut writer, events) = told(Form::Chat);
    for event in events {
        writer.collect(0, event).unwrap();
    }
    let answer = writer.answer();
    assert_eq!(answer["object"], "chat.completion");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": " aé", "refusal": null}));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(answer["usage"], json!({"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}));
    let content = choice["logprobs"]["content"].as_array().unwrap();
    let tokens: Vec<_> = content.iter().map(|entry| (&entry["token"], &entry["bytes"])).collect();
    assert_eq!(
        tokens,
        [(&json!(" a"), &json!([32, 97])), (&json!("\u{fffd}"), &json!([0xc3])), (&json!("\u{fffd}"), &json!([0xa9]))]
    );
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[1]["top_logprobs"][0]["token"], " a");
    assert_eq!(content[1]["top_logprobs"][1]["logprob"], -9999.0);

    let (mut writer, events) = told(Form::Text);
    for event in events {
        writer.collect(0, event).unwrap();
    }
    let answer = writer.answer();
    assert_eq!((&answer["object"], &answer["choices"][0]["text"]), (&json!("text_completion"), &json!(" aé")));
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!([" a", "\u{fffd}", "\u{fffd}"]));
    assert_eq!(logprobs["text_offset"], json!([0, 2, 3]));
    assert_eq!(logprobs["token_logprobs"], json!([-0.5, -0.5, -0.5]));
    assert_eq!(logprobs["top_logprobs"][0], json!({" a": -0.5}));
}

#[test]
fn chunks_make_up_the_answer() {
    for form in [Form::Chat, Form::Text] {
        let (mut writer, events) = told(form);
        let chunks: Vec<_> = events.into_iter().flat_map(|event| writer.chunks(0, event).unwrap()).collect();
        let (last, chunks) = chunks.split_last().unwrap();
        assert_eq!((&last["choices"], &last["usage"]["total_tokens"]), (&json!([]), &json!(11)));
        let choices: Vec<_> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
        let text = |choice: &&Value| match form {
            Form::Chat => choice["delta"]["content"].as_str().unwrap_or_default().to_owned(),
            Form::Text => choice["text"].as_str().unwrap().to_owned(),
        };
        assert_eq!(choices.iter().map(text).collect::<String>(), " aé");
        let (end, before) = choices.split_last().unwrap();
        assert_eq!(end["finish_reason"], "stop");
        assert!(before.iter().all(|choice| choice["finish_reason"].is_null()));
        if form == Form::Chat {
            assert_eq!(choices[0]["delta"], json!({"role": "assistant", "content": ""}));
            assert_eq!(choices[1]["logprobs"]["content"][0]["token"], " a");
            assert_eq!(end["delta"], json!({}));
        }
        assert!(chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk["id"] == last["id"]));
    }
}
