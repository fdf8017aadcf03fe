//! A server in a process of its own, and what a client sees of it.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::command::evenkeel;

/// The model that is served.
pub const FERRIS: &str = "tests/fixtures/ferris-7m";
/// As long as nothing that is waited for takes, unless something is wrong.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// The binary that serves a model; it is ended where this is dropped.
pub struct Serving {
    child: Child,
    pub address: String,
    /// The line that says that it is ready.
    pub ready: String,
}

impl Serving {
    pub fn start(arguments: &[&str]) -> Self {
        Self::of(FERRIS, arguments)
    }

    pub fn of(model: &str, arguments: &[&str]) -> Self {
        Self::start_with(evenkeel(&[&["serve", model, "--listen", "127.0.0.1:0"], arguments].concat()))
    }

    pub fn start_with(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let address = ready.split_once("http://").and_then(|(_, rest)| rest.split_once(',')).expect(&ready).0;
        Self { child, address: address.to_owned(), ready }
    }

    pub fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        self.ask_with(method, path, &[], body)
    }

    pub fn ask_with(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        self.open(method, path, headers, body).rest()
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, &body.to_string())
    }

    /// Sends a request and reads the head of the answer.
    pub fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut all = vec![("connection", "close"), ("host", self.address.as_str())];
        all.retain(|(name, _)| headers.iter().all(|(other, _)| other != name));
        let length = body.len().to_string();
        if headers.iter().all(|(name, _)| *name != "content-length") {
            all.push(("content-length", &length));
        }
        let all: Vec<_> = all.iter().chain(headers).map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        write!(stream, "{method} {path} HTTP/1.1\r\n{}\r\n{body}", all.concat()).unwrap();
        Answer::head(BufReader::new(stream))
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn exit_code(mut self) -> Option<i32> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not end");
    }

    pub fn metric(&self, name: &str) -> f64 {
        let answer = self.ask("GET", "/metrics", "");
        let line = answer.text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}"));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer, of which the body may not be read yet.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub text: String,
    from: BufReader<TcpStream>,
}

impl Answer {
    pub fn head(mut from: BufReader<TcpStream>) -> Self {
        let mut line = || {
            let mut line = String::new();
            from.read_line(&mut line).unwrap();
            line.trim_end().to_owned()
        };
        let status = line().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = std::iter::from_fn(|| Some(line()).filter(|line| !line.is_empty()));
        let headers = headers.map(|line| line.split_once(": ").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap());
        Self { status, headers: headers.collect(), text: String::new(), from }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    /// A chunk of the body; none is the last.
    pub fn chunk(&mut self) -> Option<String> {
        let mut size = String::new();
        self.from.read_line(&mut size).unwrap();
        let mut chunk = vec![0; usize::from_str_radix(size.trim_end(), 16).unwrap() + 2];
        self.from.read_exact(&mut chunk).unwrap();
        chunk.truncate(chunk.len() - 2);
        Some(String::from_utf8(chunk).unwrap()).filter(|chunk| !chunk.is_empty())
    }

    pub fn rest(mut self) -> Self {
        if self.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = self.chunk() {
                self.text += &chunk;
            }
        } else {
            self.from.read_to_string(&mut self.text).unwrap();
        }
        self
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// The events of a stream but for its end.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"), "{}", self.text);
        let rest = self.text.strip_suffix("data: [DONE]\n\n").expect(&self.text);
        let events = rest.split_terminator("\n\n").filter(|event| *event != ":");
        events.map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }
}
