//! The server under load: each of many gets what it would get alone, whoever leaves meanwhile, and nothing is lost.
#![cfg(feature = "serve")]

#[path = "support/command.rs"]
mod command;
#[path = "support/fake_cuda.rs"]
mod fake_cuda;
#[path = "support/serving.rs"]
mod serving;

use std::fmt;
use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use evenkeel::random::Draws;
use serde_json::{Value, json};
use serving::{Answer, FERRIS, PATIENCE, Serving, send, text};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// A model that the stand-in for a GPU runs quickly.
const LLAMA: &str = "tests/fixtures/parity/llama";
/// Clients at once.
const CLIENTS: usize = 16;
/// Requests of which it is known what is answered.
const QUESTIONS: usize = 40;
/// Of so many requests, one is left before its answer is there.
const LEFT: usize = 10;
/// Bytes that a server may have more at the end than after a tenth of the requests.
const GROWTH: u64 = 16 << 20;
/// Log probabilities that rounding may exchange.
const NEAR: f64 = 0.02;
/// How long a server may take to end once it has told that its device failed.
const END: Duration = Duration::from_secs(5);
/// Room for one and a half contexts of eight sequences.
const SMALL: &[&str] = &["--context", "256", "--batch", "8", "--kv-memory", "1536KiB"];
/// Room for three contexts of sixteen sequences.
const WIDE: &[&str] = &["--context", "256", "--batch", "16", "--kv-memory", "3MiB"];

/// A request, and what is answered where there is no other.
struct Question {
    path: &'static str,
    body: Value,
    alone: Vec<Said>,
    /// How much of the text no rounding changes.
    sure: usize,
}

/// The text of a choice, and why it ended.
#[derive(Default, Debug, PartialEq, Eq)]
struct Said {
    text: String,
    finish: Option<String>,
}

/// What was seen of a load.
struct Load {
    requests: usize,
    left: usize,
    time: Duration,
    /// Bytes after a tenth of the requests, and after all.
    resident: [u64; 2],
    preemptions: f64,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { requests, left, time, resident, preemptions } = self;
        let [early, late] = resident.map(|bytes| bytes as f64 / f64::from(1 << 20));
        write!(f, "{requests} requests, {left} left, in {:.0} s; {preemptions} preemptions; ", time.as_secs_f64())?;
        writeln!(f, "{early:.1} MiB after a tenth, {late:.1} MiB after all")
    }
}

/// What questions are made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Words, in conversations too, and answers that are drawn.
    All,
    /// The likeliest tokens of a model that knows no words, as far as no two are nearly as likely: on a GPU these
    /// differ by rounding.
    Likeliest,
}

/// Requests, some of which begin alike.
fn questions(serving: &Serving, kind: Kind) -> Vec<Question> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(FERRIS).join("eval.txt");
    let file = std::fs::read_to_string(file).unwrap();
    let tokens: Vec<_> = (0..1000).map(|at| format!("t{}", at * at % 300)).collect();
    let words: Vec<_> = match kind {
        Kind::All => file.split_whitespace().take(1000).collect(),
        Kind::Likeliest => tokens.iter().map(String::as_str).collect(),
    };
    let mut draws = Draws::new(1);
    let question = |at: usize| {
        // The room of some runs out before all of their tokens are there.
        let is_long = at % 4 == 1;
        let first = at % 7 * 100;
        let most = if is_long { 20 } else { 100 };
        let prompt = words[first..=first + draws.below(most)].join(" ");
        let (path, mut body) = match at % 3 {
            0 if kind == Kind::All => (CHAT, json!({"messages": [{"role": "user", "content": prompt}]})),
            _ => (COMPLETIONS, json!({"prompt": prompt})),
        };
        body["max_tokens"] = (1 + draws.below(24)).into();
        if is_long {
            body["max_tokens"] = 150.into();
            body["ignore_eos"] = true.into();
        }
        if at.is_multiple_of(2) && kind == Kind::All {
            body["temperature"] = 0.9.into();
            body["seed"] = at.into();
            body["n"] = (1 + at / 2 % 2).into();
        }
        let mut asked = body.clone();
        if kind == Kind::Likeliest {
            asked["logprobs"] = 2.into();
        }
        let answer = serving.post(path, &asked);
        let sure = if kind == Kind::All { usize::MAX } else { sure(&answer.json()["choices"][0]["logprobs"]) };
        Question { path, body, alone: said(&answer, false), sure }
    };
    (0..QUESTIONS).map(question).collect()
}

/// The bytes of a text before the first token that another was nearly as likely as.
fn sure(logprobs: &Value) -> usize {
    let tops = logprobs["top_logprobs"].as_array().unwrap();
    let is_sure = |top: &&Value| {
        let mut each: Vec<f64> = top.as_object().unwrap().values().map(|value| value.as_f64().unwrap()).collect();
        each.sort_by(|a, b| b.total_cmp(a));
        each[0] - each[1] > NEAR
    };
    let count = tops.iter().take_while(is_sure).count();
    // A space stands before each.
    logprobs["tokens"].as_array().unwrap()[..count].iter().map(|token| 1 + token.as_str().unwrap().len()).sum()
}

fn said(answer: &Answer, is_stream: bool) -> Vec<Said> {
    assert_eq!(answer.status, 200, "{}", answer.text);
    let parts = if is_stream { answer.events() } else { vec![answer.json()] };
    let mut all = Vec::new();
    for choice in parts.iter().flat_map(|part| part["choices"].as_array().expect(&answer.text)) {
        let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
        all.resize_with(all.len().max(index + 1), Said::default);
        all[index].text += text(choice);
        all[index].finish = choice["finish_reason"].as_str().map(str::to_owned);
    }
    all
}

/// Bytes of memory that a server has.
fn resident(serving: &Serving) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", serving.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

/// Asks a question, and leaves at some time where that is wanted.
fn ask(serving: &Serving, question: &Question, draws: &mut Draws, leaves: bool) {
    let Question { path, body, alone, sure } = question;
    let is_stream = draws.below(2) == 0;
    let mut body = body.clone();
    body["stream"] = is_stream.into();
    let sent = send(&serving.address, "POST", path, &[], &body.to_string());
    if !leaves {
        let now = said(&Answer::head(sent).rest(), is_stream);
        if *sure == usize::MAX {
            assert_eq!(now, *alone, "{body}");
        } else {
            assert_eq!(now[0].text.get(..*sure), alone[0].text.get(..*sure), "{body}");
        }
    } else if is_stream {
        let mut answer = Answer::head(sent);
        let _ = (0..draws.below(4)).map_while(|_| answer.chunk()).count();
    } else {
        thread::sleep(Duration::from_millis(draws.below(50) as u64));
    }
}

fn soak(serving: &Serving, requests: usize, kind: Kind) -> Load {
    let questions = questions(serving, kind);
    let (next, left, early) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicU64::new(0));
    let start = Instant::now();
    let client = |seed| {
        let mut draws = Draws::new(seed);
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= requests {
                return;
            }
            if at == requests / 10 {
                early.store(resident(serving), Ordering::Relaxed);
            }
            let leaves = draws.below(LEFT) == 0;
            left.fetch_add(usize::from(leaves), Ordering::Relaxed);
            ask(serving, &questions[draws.below(QUESTIONS)], &mut draws, leaves);
        }
    };
    thread::scope(|scope| {
        for seed in 0..CLIENTS as u64 {
            let client = &client;
            scope.spawn(move || client(seed));
        }
    });
    let (time, idle) = (start.elapsed(), Instant::now());
    for name in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"] {
        while serving.metric(&format!("vllm:{name}{{")) > 0.0 {
            assert!(idle.elapsed() < PATIENCE, "{name} stays above 0");
            thread::sleep(Duration::from_millis(10));
        }
    }
    let load = Load {
        requests,
        left: left.into_inner(),
        time,
        resident: [early.into_inner(), resident(serving)],
        preemptions: serving.metric("vllm:num_preemptions_total{"),
    };
    assert!(load.preemptions > 0.0 && load.left > 0, "{load}");
    assert!(load.resident[1] < load.resident[0] + GROWTH, "{load}");
    load
}

#[test]
fn each_of_many_gets_what_it_would_alone() {
    print!("{}", soak(&Serving::start(SMALL), 300, Kind::All));
}

#[test]
#[ignore = "takes minutes"]
fn each_of_very_many_gets_what_it_would_alone() {
    print!("{}", soak(&Serving::start(WIDE), 10_000, Kind::All));
}

#[test]
#[ignore = "takes minutes"]
fn each_of_many_on_a_gpu_gets_what_it_would_alone() {
    let Some(library) = fake_cuda::directory() else { return };
    let serving = Serving::on_gpu(library, LLAMA, &["--context", "256", "--batch", "8", "--kv-memory", "144KiB"], &[]);
    print!("{}", soak(&serving, 200, Kind::Likeliest));
}

/// Requests of which none is over soon, every other one a stream.
fn open_eight(serving: &Serving) -> Vec<BufReader<TcpStream>> {
    let open = |at: usize| {
        let (prompt, is_stream) = (format!("t{at} t6 t7"), at.is_multiple_of(2));
        let body = json!({"prompt": prompt, "max_tokens": 240, "ignore_eos": true, "stream": is_stream});
        send(&serving.address, "POST", COMPLETIONS, &[], &body.to_string())
    };
    (0..8).map(open).collect()
}

#[test]
fn memory_that_cannot_be_had_is_not_asked_for() {
    let Some(library) = fake_cuda::directory() else { return };
    // Where the kernels were never used before, the load tries them.
    assert!(Serving::on_gpu(library, LLAMA, &[], &[]).is_ready());
    let start = |allocations: usize| {
        let failing = format!("{}+", allocations + 1);
        Serving::on_gpu(library, LLAMA, &["--batch", "8"], &[("FAIL_ALLOC", &failing)])
    };
    // What the load takes is enough for all that comes.
    let (mut few, mut enough) = (0, 64);
    while enough - few > 1 {
        let between = usize::midpoint(few, enough);
        *if start(between).is_ready() { &mut enough } else { &mut few } = between;
    }
    let serving = start(enough);
    for (at, sent) in open_eight(&serving).into_iter().enumerate() {
        let said = said(&Answer::head(sent).rest(), at.is_multiple_of(2));
        assert_eq!(said[0].finish.as_deref(), Some("length"));
    }
}

#[test]
fn a_device_that_fails_ends_all_that_is_open() {
    let Some(library) = fake_cuda::directory() else { return };
    // Beyond what the load launches and makes ready. Of eight, one has room and seven wait, or
    // all run.
    for (batch, graphs, setting, value) in [
        ("8", "0", "FAIL_LAUNCH", "3000"),
        ("8", "0", "FAIL_LAUNCH", "3000:701"),
        ("8", "1", "FAIL_GRAPH_LAUNCH", "50"),
        ("8", "1", "FAIL_GRAPH_LAUNCH", "50:2"),
        ("8", "1", "FAIL_GRAPH_LAUNCH", "50:701"),
        ("1", "1", "FAIL_GRAPH_LAUNCH", "50"),
        ("1", "1", "FAIL_GRAPH_LAUNCH", "50:2"),
    ] {
        let case = format!("{batch} {setting} {value}");
        let serving = Serving::on_gpu(library, LLAMA, &["--batch", batch], &[(setting, value), ("GRAPHS", graphs)]);
        for (at, sent) in open_eight(&serving).into_iter().enumerate() {
            let answer = Answer::head(sent).rest();
            let (status, told) =
                if at.is_multiple_of(2) { (200, answer.events().pop().unwrap()) } else { (500, answer.json()) };
            assert_eq!(answer.status, status, "{case}: {}", answer.text);
            assert_eq!(told["error"]["type"], "server_error", "{case}: {}", answer.text);
            assert!(told["error"]["message"].as_str().unwrap().contains("cuda:0"), "{case}: {told}");
        }
        let told = Instant::now();
        // Whoever comes later is refused, if anybody is there to do that.
        if let Ok(mut stream) = TcpStream::connect(&serving.address) {
            let (host, body, mut answer) = (&serving.address, r#"{"prompt": "t5"}"#, String::new());
            let head = format!("POST {COMPLETIONS} HTTP/1.1\r\nhost: {host}\r\nconnection: close");
            let _ = write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            let _ = stream.read_to_string(&mut answer);
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 50"), "{case}: {answer}");
        }
        assert_eq!(serving.exit_code(), Some(3), "{case}");
        assert!(told.elapsed() < END, "{case}: {:?}", told.elapsed());
    }
}
