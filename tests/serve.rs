//! The server, as clients see it.
#![cfg(feature = "serve")]

#[path = "support/command.rs"]
mod command;
#[path = "support/fake_cuda.rs"]
mod fake_cuda;
#[path = "support/serving.rs"]
mod serving;

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use command::{evenkeel, run, stderr, stdout};
use evenkeel::Cancel;
use evenkeel::serve::{ServeOptions, Server};
use rustix::process::Signal;
use serde_json::{Value, json};
use serving::{Answer, FERRIS, PATIENCE, Serving};

fn generate(arguments: &[&str]) -> String {
    let output = run(&[&["generate", FERRIS, "--max-new-tokens", "12"], arguments].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
}

/// Whether a number is that one.
fn is(number: f64, value: f64) -> bool {
    (number - value).abs() < f64::EPSILON
}

fn text(choice: &Value) -> &str {
    [&choice["text"], &choice["message"]["content"], &choice["delta"]["content"]]
        .into_iter()
        .find_map(Value::as_str)
        .unwrap_or_default()
}

#[test]
fn answers_are_those_of_generate() {
    let serving = Serving::start(&["--served-model-name", "crab"]);
    let (completions, chat) = ("/v1/completions", "/v1/chat/completions");
    let messages =
        json!([{"role": "system", "content": "You know Rust."}, {"role": "user", "content": "What is a trait?"}]);
    let sampled = json!({"temperature": 0.9, "top_k": 20, "seed": 7});
    for (path, mut body, arguments) in [
        (completions, json!({"prompt": "Ownership is"}), vec!["--prompt", "Ownership is"]),
        (completions, json!({"prompt": "fn main() {", "stop": ["("]}), vec!["--prompt", "fn main() {", "--stop", "("]),
        (
            completions,
            json!({"prompt": "Ownership is", "temperature": 0.9, "top_k": 20, "seed": 7}),
            vec!["--prompt", "Ownership is", "--temperature", "0.9", "--top-k", "20", "--seed", "7"],
        ),
        (
            chat,
            json!({"messages": messages}),
            vec!["--chat", "--system", "You know Rust.", "--prompt", "What is a trait?"],
        ),
    ] {
        let expected = generate(&arguments);
        assert!(!expected.is_empty());
        body["max_tokens"] = 12.into();
        let answer = serving.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        let answer = answer.json();
        assert_eq!(text(&answer["choices"][0]), expected, "{body}");
        assert_eq!(answer["model"], "crab");
        let usage = &answer["usage"];
        let sum = usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
        assert_eq!(usage["total_tokens"], sum);
        let finish = &answer["choices"][0]["finish_reason"];
        assert!(finish == if usage["completion_tokens"] == 12 { "length" } else { "stop" }, "{answer}");

        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        let events = serving.post(path, &body).events();
        let (last, events) = events.split_last().unwrap();
        assert_eq!(&last["usage"], usage);
        assert_eq!(events.iter().map(|event| text(&event["choices"][0])).collect::<String>(), expected);
        assert_eq!(&events.last().unwrap()["choices"][0]["finish_reason"], finish);
        if path == chat {
            assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
        }
    }
    // Several prompts, tokens among them, and several answers of each; of a seed, each has the next.
    let ids: Vec<u32> = {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(FERRIS);
        evenkeel::Tokenizer::open(&directory, 4096).unwrap().encode("fn main() {", true).unwrap()
    };
    let mut body = json!({"prompt": ["Ownership is", ids], "n": 2, "max_tokens": 12});
    body.as_object_mut().unwrap().extend(sampled.as_object().unwrap().clone());
    let answer = serving.post(completions, &body).json();
    let texts: Vec<_> = answer["choices"].as_array().unwrap().iter().map(text).collect();
    let expected = [("Ownership is", "7"), ("Ownership is", "8"), ("fn main() {", "9"), ("fn main() {", "10")];
    let expected = expected
        .map(|(prompt, seed)| generate(&["--prompt", prompt, "--temperature", "0.9", "--top-k", "20", "--seed", seed]));
    assert_eq!(texts, expected);
    assert!(answer["choices"].as_array().unwrap().iter().enumerate().all(|(at, choice)| choice["index"] == at));
    body["stream"] = true.into();
    let mut streamed = vec![String::new(); 4];
    for event in serving.post(completions, &body).events() {
        let choice = &event["choices"][0];
        streamed[usize::try_from(choice["index"].as_u64().unwrap()).unwrap()] += text(choice);
    }
    assert_eq!(streamed, expected);
}

#[test]
fn examples_of_the_readme_are_answered() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let serving = Serving::start(&[]);
    let ready = serving.ready.replace(&serving.address, "127.0.0.1:8080");
    assert!(readme.contains(&format!("\n> evenkeel serve {FERRIS}\n{ready}")), "{ready}");
    let examples: Vec<_> = readme.lines().filter_map(|line| line.strip_prefix("curl http://127.0.0.1:8080")).collect();
    assert!(examples.len() >= 3);
    for example in examples {
        let (path, body) = example.split_once(" -d ").unwrap();
        let answer = serving.ask("POST", path, body.trim_matches('\''));
        assert_eq!(answer.status, 200, "{example}: {}", answer.text);
    }
}

#[test]
fn what_is_asked_wrongly_is_answered_in_openais_form() {
    let serving = Serving::start(&[]);
    let (completions, chat) = ("/v1/completions", "/v1/chat/completions");
    let long = json!({"prompt": "trait ".repeat(2000)}).to_string();
    let longer = json!({"prompt": "trait ".repeat(200_000)}).to_string();
    for (method, path, headers, body, status, param) in [
        ("POST", completions, &[][..], "{\"prompt\": ", 400, None),
        ("POST", completions, &[], "", 400, None),
        ("POST", completions, &[], r#"{"prompt": 1}"#, 400, Some("prompt")),
        ("POST", completions, &[], r#"{"prompt": ""}"#, 400, Some("prompt")),
        ("POST", completions, &[], r#"{"prompt": [5000]}"#, 400, Some("prompt[0]")),
        ("POST", completions, &[], r#"{"prompt": "a", "temperature": -1}"#, 400, None),
        ("POST", completions, &[], r#"{"prompt": "a", "max_tokens": 512}"#, 400, None),
        ("POST", completions, &[], r#"{"prompt": "a", "max_tokens": 18446744073709551615}"#, 400, None),
        ("POST", completions, &[], &long, 400, None),
        ("POST", completions, &[], &longer, 400, None),
        ("POST", chat, &[], r#"{"messages": [{"role": "user", "content": 1}]}"#, 400, Some("messages[0].content")),
        ("POST", chat, &[], r#"{"messages": [{"role": "user", "content": "a"}], "n": 0}"#, 400, Some("n")),
        ("POST", chat, &[("content-length", "9000000")], "", 413, None),
        ("GET", chat, &[], "", 405, None),
        ("DELETE", "/v1/models", &[], "", 405, None),
        ("GET", "/v1/engines", &[], "", 404, None),
        ("GET", "/v1/models/crab", &[], "", 404, None),
        ("GET", "/v1/models", &[("host", "example.com")], "", 403, None),
        ("GET", "/v1/models", &[("origin", "https://example.com")], "", 403, None),
    ] {
        let answer = serving.ask_with(method, path, headers, body);
        let shown = &body[..body.len().min(100)];
        assert_eq!(answer.status, status, "{method} {path} {shown}: {}", answer.text);
        let error = &answer.json()["error"];
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
        assert_eq!(error["param"].as_str(), param, "{error}");
        assert_eq!(answer.header("allow").is_some(), status == 405);
        let is_long = shown.contains("max_tokens") || shown.contains("trait");
        assert_eq!(error["code"] == "context_length_exceeded", is_long, "{error}");
    }
    // And goes on.
    assert_eq!(serving.ask("GET", "/health", "").json(), json!({"status": "ok"}));
    let models = serving.ask("GET", "/v1/models", "").json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("ferris-7m"), &json!(512)));
    assert_eq!(serving.ask("GET", "/v1/models/ferris-7m", "").json()["object"], "model");
    let page = serving.ask("GET", "/", "");
    assert!(page.text.starts_with("<!doctype html>") && page.header("content-security-policy").is_some());
    assert!(serving.ask("GET", "/plan", "").json()["picture"].as_str().unwrap().starts_with("<svg"));
    assert_eq!(serving.ask("HEAD", "/health", "").text, "");
}

#[test]
fn an_answer_is_of_the_schema_that_is_asked_for() {
    let serving = Serving::start(&[]);
    let schema = json!({
        "type": "object",
        "properties": {
            "crab": {"type": "string", "maxLength": 9},
            "legs": {"type": "integer", "minimum": 0, "maximum": 99},
            "is_red": {"enum": ["yes", "no"]},
        },
        "required": ["crab", "legs", "is_red"],
        "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "crab", "strict": true, "schema": schema}});
    for sampling in [json!({"temperature": 0}), json!({"temperature": 1.5, "seed": 3, "n": 4})] {
        let mut body = json!({"messages": [{"role": "user", "content": "A crab."}], "response_format": format});
        body.as_object_mut().unwrap().extend(sampling.as_object().unwrap().clone());
        let answer = serving.post("/v1/chat/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        for choice in answer.json()["choices"].as_array().unwrap() {
            assert_eq!(choice["finish_reason"], "stop", "{choice}");
            let crab: Value = serde_json::from_str(text(choice)).unwrap_or_else(|e| panic!("{e}: {choice}"));
            assert!(crab["crab"].as_str().unwrap().chars().count() <= 9, "{crab}");
            assert!(crab["legs"].as_u64().unwrap() <= 99 && ["yes", "no"].contains(&crab["is_red"].as_str().unwrap()));
        }
    }
    let format = json!({"type": "json_schema", "json_schema": {"schema": {"type": "crab"}}});
    let body = json!({"messages": [{"role": "user", "content": "A crab."}], "response_format": format});
    let answer = serving.post("/v1/chat/completions", &body);
    assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some("response_format")));
    assert!(answer.text.contains("crab"), "{}", answer.text);
}

#[test]
fn log_probabilities_are_those_of_the_tokens() {
    let serving = Serving::start(&[]);
    let body = json!({"prompt": "Ownership is", "max_tokens": 5, "logprobs": 2});
    let answer = serving.post("/v1/completions", &body).json();
    let (choice, logprobs) = (&answer["choices"][0], &answer["choices"][0]["logprobs"]);
    let tokens: Vec<_> = logprobs["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(tokens.concat(), text(choice));
    for (at, token) in tokens.iter().enumerate() {
        // Of the likeliest tokens, the first was taken.
        let top = logprobs["top_logprobs"][at].as_object().unwrap();
        let logprob = logprobs["token_logprobs"][at].as_f64().unwrap();
        assert!(top.len() == 2 && top[*token] == logprob && logprob < 0.0, "{top:?}");
        assert!(top.values().all(|other| other.as_f64().unwrap() <= logprob), "{top:?}");
    }
    let mut body = json!({"messages": [{"role": "user", "content": "What is a trait?"}], "max_tokens": 5});
    body.as_object_mut().unwrap().extend([("logprobs".to_owned(), true.into()), ("top_logprobs".to_owned(), 3.into())]);
    let answer = serving.post("/v1/chat/completions", &body).json();
    body["stream"] = true.into();
    let events = serving.post("/v1/chat/completions", &body).events();
    let content = |choice: &Value| choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
    let whole = content(&answer["choices"][0]);
    assert_eq!(events.iter().flat_map(|event| content(&event["choices"][0])).collect::<Vec<_>>(), whole);
    assert!(whole.len() == 5 && whole.iter().all(|entry| entry["top_logprobs"].as_array().unwrap().len() == 3));
    assert_eq!(whole[0]["top_logprobs"][0]["token"], whole[0]["token"]);
}

#[test]
fn a_prompt_that_is_too_much_for_the_tokenizer_harms_no_other() {
    let directory = tempfile::tempdir().unwrap();
    for entry in Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/llama").read_dir().unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = directory.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let grow = json!({"type": "Replace", "pattern": {"String": "x"}, "content": "x".repeat(1000)});
    tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": vec![grow; 6]});
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let serving = Serving::of(directory.path().to_str().unwrap(), &[]);
    let body = |prompt: &str| json!({"prompt": prompt, "max_tokens": 2, "ignore_eos": true});
    for (prompt, status) in [("t1 t2", 200), ("t1 x", 400), ("t1 t2", 200)] {
        let answer = serving.post("/v1/completions", &body(prompt));
        assert_eq!(answer.status, status, "{prompt}: {}", answer.text);
    }
    let answer = serving.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "t1"}]}));
    assert!(answer.status == 400 && answer.text.contains("has no chat template"), "{}", answer.text);
}

#[test]
fn a_key_is_asked_for() {
    let mut command = evenkeel(&["serve", FERRIS, "--listen", "127.0.0.1:0"]);
    command.env("EVENKEEL_API_KEY", "crab");
    for serving in [Serving::start(&["--api-key", "crab"]), Serving::start_with(command)] {
        for (key, status) in [(None, 401), (Some("Bearer crab"), 200), (Some("Bearer crabs"), 401)] {
            let headers: Vec<_> = key.iter().map(|key| ("authorization", *key)).collect();
            let answer = serving.ask_with("GET", "/v1/models", &headers, "");
            assert_eq!(answer.status, status, "{key:?}");
            assert_eq!(answer.header("www-authenticate").is_some(), status == 401);
        }
        assert_eq!(serving.ask("GET", "/health", "").status, 200);
    }
    let output = run(&["serve", FERRIS, "--listen", "0.0.0.0:0"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--api-key"), "{}", stderr(&output));
}

#[test]
fn whoever_asks_before_the_model_is_there_is_told() {
    let options = ServeOptions { listen: "127.0.0.1:0".parse().unwrap(), key: None, stop: Cancel::new() };
    let server = Server::start(&options).unwrap();
    let address = server.address().to_string();
    for (path, message) in [("/health", "loading"), ("/v1/models", "the model is being loaded")] {
        let mut stream = TcpStream::connect(&address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").unwrap();
        let answer = Answer::head(BufReader::new(stream)).rest();
        assert_eq!((answer.status, answer.header("retry-after").is_some()), (503, path != "/health"));
        assert!(answer.text.contains(message), "{}", answer.text);
    }
    let error = Server::start(&ServeOptions { listen: server.address(), ..options }).err().unwrap();
    assert!(error.to_string().starts_with("cannot listen on"), "{error}");
}

#[test]
fn many_clients_get_what_each_would_alone() {
    let serving = Serving::start(&[]);
    let prompts = ["Ownership is", "A trait object", "fn main() {", "The borrow checker"];
    let body =
        |at: usize| json!({"prompt": prompts[at % prompts.len()], "max_tokens": 8, "stream": at.is_multiple_of(2)});
    let answered = |at: usize| {
        let answer = serving.post("/v1/completions", &body(at));
        match at % 2 {
            0 => answer.events().iter().map(|event| text(&event["choices"][0])).collect(),
            _ => text(&answer.json()["choices"][0]).to_owned(),
        }
    };
    let alone: Vec<_> = (0..prompts.len()).map(answered).collect();
    let together: Vec<String> = thread::scope(|scope| {
        let clients: Vec<_> = (0..32).map(|at| scope.spawn(move || answered(at))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    for (at, text) in together.iter().enumerate() {
        assert_eq!(*text, alone[at % prompts.len()], "{at}");
    }
    assert!(serving.metric("vllm:e2e_request_latency_seconds_count") >= 36.0);
}

/// A stream that ends after minutes, of which the first event was read.
fn endless(serving: &Serving, n: usize) -> Answer {
    let body = json!({"prompt": "Ownership is", "max_tokens": 500, "ignore_eos": true, "n": n, "stream": true});
    let mut answer = serving.open("POST", "/v1/completions", &[], &body.to_string());
    if answer.status == 200 {
        answer.chunk().unwrap();
    }
    answer
}

#[test]
fn a_client_that_leaves_is_worked_for_no_more() {
    let serving = Serving::start(&["--batch", "1"]);
    drop(endless(&serving, 256));
    // Without a stream there is nothing to read before one leaves.
    let body = json!({"prompt": "Ownership is", "max_tokens": 500, "ignore_eos": true, "n": 256}).to_string();
    let mut stream = TcpStream::connect(&serving.address).unwrap();
    let (host, length) = (&serving.address, body.len());
    write!(stream, "POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
    thread::sleep(Duration::from_millis(200));
    drop(stream);
    let start = Instant::now();
    let answer = serving.post("/v1/completions", &json!({"prompt": "fn", "max_tokens": 4}));
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
    let name = "vllm:request_success_total{model_name=\"ferris-7m\",finished_reason=\"abort\"}";
    assert!(is(serving.metric(name), 2.0));
    while serving.ask("GET", "/plan", "").json()["pages_used"] != 0 {
        assert!(start.elapsed() < PATIENCE, "pages are not given back");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn more_than_may_wait_are_refused() {
    let serving = Serving::start(&["--batch", "1", "--max-waiting", "1"]);
    let body = json!({"prompt": "Ownership is", "max_tokens": 500, "ignore_eos": true, "stream": true}).to_string();
    let mut taken = Vec::new();
    // One runs and one waits at most.
    for _ in 0..3 {
        let answer = serving.open("POST", "/v1/completions", &[], &body);
        if answer.status != 200 {
            let answer = answer.rest();
            assert_eq!((answer.status, answer.header("retry-after")), (429, Some("1")), "{}", answer.text);
            assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
            assert!(!taken.is_empty());
            return;
        }
        taken.push(answer);
    }
    panic!("all are taken");
}

#[test]
fn a_server_that_is_to_end_lets_requests_end() {
    for (signal, code) in [(Signal::TERM, 0), (Signal::INT, 130)] {
        let serving = Serving::start(&[]);
        let body = json!({"prompt": "Ownership is", "max_tokens": 100, "ignore_eos": true, "stream": true}).to_string();
        let mut answer = serving.open("POST", "/v1/completions", &[], &body);
        answer.text = answer.chunk().unwrap();
        serving.signal(signal);
        let answer = answer.rest();
        assert_eq!(answer.events().last().unwrap()["choices"][0]["finish_reason"], "length");
        assert!(TcpStream::connect(&serving.address).is_err());
        assert_eq!(serving.exit_code(), Some(code));
    }
    // The second signal does not wait.
    let serving = Serving::start(&["--batch", "1"]);
    let _answer = endless(&serving, 256);
    serving.signal(Signal::TERM);
    thread::sleep(Duration::from_millis(200));
    serving.signal(Signal::TERM);
    assert_eq!(serving.exit_code(), Some(143));
}

#[test]
fn a_device_that_fails_ends_the_server() {
    let Some(directory) = fake_cuda::directory() else { return };
    let model = "tests/fixtures/parity/llama";
    let mut command = evenkeel(&["serve", model, "--listen", "127.0.0.1:0", "--device-map", "cuda:0"]);
    command.env("LD_LIBRARY_PATH", directory).env_remove("CUDA_VISIBLE_DEVICES");
    // Beyond what the load launches, and what the kernels' first use does.
    let settings = [("QUIET", "1"), ("DEVICES", "8GiB"), ("FAIL_LAUNCH", "1000")];
    command.envs(settings.map(|(name, value)| (format!("FAKE_CUDA_{name}"), value)));
    let serving = Serving::start_with(command);
    let body = json!({"prompt": "t5 t6 t7", "max_tokens": 40, "ignore_eos": true});
    let failed = (0..100).map(|_| serving.post("/v1/completions", &body)).find(|answer| answer.status != 200).unwrap();
    assert_eq!(failed.status, 500, "{}", failed.text);
    assert_eq!(failed.json()["error"]["type"], "server_error");
    assert!(failed.text.contains("cuda:0"), "{}", failed.text);
    assert_eq!(serving.exit_code(), Some(3));
}

#[test]
fn metrics_are_prometheus_text() {
    let serving = Serving::start(&["--served-model-name", "a \"crab\"\\"]);
    let body = json!({"prompt": "Ownership is", "max_tokens": 4});
    assert_eq!(serving.post("/v1/completions", &body).status, 200);
    let answer = serving.ask("GET", "/metrics", "");
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let mut kinds = std::collections::HashMap::new();
    for line in answer.text.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            kinds.extend(kind.split_once(' '));
        } else if !line.starts_with("# HELP ") {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = name.split_once('{').unwrap();
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            let kind = kinds.get(name).or_else(|| kinds.get(family?));
            assert!(kind.is_some() && labels.ends_with('}') && value.parse::<f64>().is_ok(), "{line}");
            assert!(!name.starts_with("vllm:") || labels.starts_with("model_name=\"a \\\"crab\\\"\\\\\""), "{line}");
        }
    }
    for (name, value) in [
        ("vllm:request_success_total{model_name=\"a \\\"crab\\\"\\\\\",finished_reason=\"length\"}", 1.0),
        ("vllm:time_to_first_token_seconds_count", 1.0),
        ("vllm:e2e_request_latency_seconds_count", 1.0),
    ] {
        assert!(is(serving.metric(name), value), "{name}");
    }
    assert!(serving.metric("evenkeel_device_planned_bytes{device=\"cpu\",purpose=\"weights\"}") > 0.0);
    assert!(serving.metric("evenkeel_device_measured_bytes{device=\"cpu\"}") > 0.0);
}

#[test]
fn openais_own_client_understands_it() {
    #[allow(clippy::disallowed_methods, reason = "says which python has the package; for this test alone")]
    let python = std::env::var("EVENKEEL_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    if !Command::new(&python).args(["-c", "import openai"]).output().is_ok_and(|output| output.status.success()) {
        eprintln!("left out: `{python}` has no package `openai`; EVENKEEL_PYTHON names one that has");
        return;
    }
    let serving = Serving::start(&["--api-key", "crab"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai_client.py");
    let mut command = Command::new(&python);
    command.arg(script).arg(format!("http://{}/v1", serving.address)).arg("crab");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
}
