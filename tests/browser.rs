//! The page, in a browser that WebDriver drives. Where there is no chromedriver, the tests are skipped.
#![cfg(feature = "serve")]

#[path = "support/command.rs"]
mod command;
#[path = "support/serving.rs"]
mod serving;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use serving::{Answer, PATIENCE, Serving, send, text};

/// The longest picture of the page.
const MAX_PICTURE: usize = 150_000;
/// Says how long the last answer was whenever it changed.
const WATCH: &str = "window.lengths = []; new MutationObserver(() => lengths.push(\
    [...document.querySelectorAll('.assistant')].pop()?.textContent.length ?? 0)).observe(\
    document.getElementById('log'), { childList: true, subtree: true, characterData: true })";
/// Whether nothing is on its way.
const IS_IDLE: &str = "return !document.getElementById('send').disabled";
/// What the server has generated, as the page says it.
const GENERATED: &str = "return Number(/(\\d+) generated/.exec(document.getElementById('use').textContent)?.[1] ?? 0)";

/// A window of a browser, which is ended with its driver where it is dropped.
struct Browser {
    driver: Child,
    /// The driver may not write any more where nobody reads.
    _log: BufReader<ChildStdout>,
    address: String,
    session: String,
}

impl Browser {
    /// The page of a server in a window of this size.
    fn open(serving: &Serving, width: u32, height: u32) -> Option<Self> {
        let mut command = Command::new("chromedriver");
        let Ok(mut driver) = command.arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).spawn() else {
            // What is printed is only shown of tests that fail.
            std::io::stderr().write_all(b"skipped: chromedriver is not there\n").unwrap();
            return None;
        };
        let mut log = BufReader::new(driver.stdout.take().unwrap());
        let port = log.by_ref().lines().map_while(Result::ok).find_map(|line| {
            let (_, port) = line.split_once("was started successfully on port ")?;
            Some(port.trim_end_matches('.').to_owned())
        });
        let address = format!("127.0.0.1:{}", port.unwrap());
        let mut browser = Self { driver, _log: log, address, session: String::new() };
        // A sandbox of its own is not to be had by root and in containers.
        let size = format!("--window-size={width},{height}");
        let arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", &size];
        let wanted = json!({
            "browserName": "chrome",
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        });
        let session = browser.ask("POST", "/session", &json!({"capabilities": {"alwaysMatch": wanted}}));
        browser.session = format!("/session/{}", session["sessionId"].as_str().unwrap());
        browser.post("/url", &json!({"url": format!("http://{}/", serving.address)}));
        Some(browser)
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let answer = Answer::head(send(&self.address, method, path, &[], &body)).rest();
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.text);
        answer.json()["value"].take()
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        self.ask("POST", &format!("{}{path}", self.session), body)
    }

    /// What a script gives.
    fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", &json!({"script": script, "args": []}))
    }

    /// Waits until a script gives what is wanted.
    fn wait(&self, script: &str, is_wanted: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let value = self.run(script);
            if is_wanted(&value) {
                return value;
            }
            assert!(start.elapsed() < PATIENCE, "{script}: {value}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn element(&self, selector: &str) -> String {
        let found = self.post("/element", &json!({"using": "css selector", "value": selector}));
        format!("/element/{}", found.as_object().unwrap().values().next().unwrap().as_str().unwrap())
    }

    fn click(&self, selector: &str) {
        self.post(&format!("{}/click", self.element(selector)), &json!({}));
    }

    fn write(&self, selector: &str, text: &str) {
        self.post(&format!("{}/value", self.element(selector)), &json!({"text": text}));
    }

    fn text(&self, selector: &str) -> String {
        self.run(&format!("return document.querySelector('{selector}').textContent")).as_str().unwrap().to_owned()
    }

    /// What the browser says is wrong with the page.
    fn complaints(&self) -> Vec<Value> {
        let mut entries = self.post("/se/log", &json!({"type": "browser"}));
        entries.as_array_mut().unwrap().drain(..).map(|mut entry| entry["message"].take()).collect()
    }

    /// A picture of the window, as PNG.
    fn picture(&self) -> Vec<u8> {
        let encoded = self.ask("GET", &format!("{}/screenshot", self.session), &Value::Null);
        let sextet = |byte: u8| match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            _ => 63,
        };
        let digits: Vec<_> = encoded.as_str().unwrap().bytes().filter(|byte| *byte != b'=').map(sextet).collect();
        let bytes = |group: &[u8]| {
            let bits = group.iter().fold(0, |bits, sextet| bits << 6 | u32::from(*sextet)) << (6 * (4 - group.len()));
            bits.to_be_bytes()[1..group.len()].to_vec()
        };
        digits.chunks(4).flat_map(bytes).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver's end is not that of its browser.
        if let (false, Ok(mut stream)) = (self.session.is_empty(), TcpStream::connect(&self.address)) {
            let (session, host) = (&self.session, &self.address);
            let _ = write!(stream, "DELETE {session} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
            let _ = stream.set_read_timeout(Some(PATIENCE));
            let _ = stream.read(&mut [0]);
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

#[test]
fn a_message_is_answered() {
    let serving = Serving::start(&[]);
    let Some(browser) = Browser::open(&serving, 1200, 800) else { return };
    browser.wait("return document.title", |title| title == "ferris-7m · evenkeel");
    assert_eq!(browser.text("#status"), "context 512, 64 sequences at once");
    assert_eq!(browser.text("#devices th"), "cpu");
    browser.run(WATCH);
    let ask = |text: &str, most: u32| json!({"messages": [{"role": "user", "content": text}], "max_tokens": most});
    let expected = serving.post("/v1/chat/completions", &ask("What is a trait?", 40)).json();
    browser.click("summary");
    browser.write("#max-tokens", "40");
    browser.write("#message", "What is a trait?");
    browser.click("#send");
    browser.wait(IS_IDLE, |is_idle| *is_idle == true);
    assert_eq!(browser.text(".user"), "What is a trait?");
    assert_eq!(browser.text(".assistant"), text(&expected["choices"][0]));
    let lengths = browser.run("return lengths");
    let lengths: Vec<_> = lengths.as_array().unwrap().iter().map(|length| length.as_u64().unwrap()).collect();
    assert!(lengths.is_sorted() && lengths.iter().filter(|length| **length > 0).count() > 2, "{lengths:?}");
    browser.wait(GENERATED, |generated| *generated == 2 * expected["usage"]["completion_tokens"].as_u64().unwrap());

    // Another message of the same conversation, which is sent with a key and is stopped.
    browser.run("document.getElementById('max-tokens').value = ''");
    browser.write("#message", "Go on, and do not end.\u{e007}");
    let last = "return [...document.querySelectorAll('.assistant')].pop().textContent";
    browser.wait(last, |text| text != "" && *text != browser.text(".assistant"));
    browser.click("#stop");
    browser.wait(IS_IDLE, |is_idle| *is_idle == true);
    assert_eq!(browser.run("return messages.length"), 4);
    while serving.metric("vllm:num_requests_running{") > 0.0 {
        thread::sleep(Duration::from_millis(10));
    }
    browser.click("#clear");
    assert_eq!(browser.text("#log"), "");
    assert_eq!(browser.complaints(), [Value::Null; 0]);
}

#[test]
fn a_key_is_asked_for_and_sent() {
    let serving = Serving::start(&["--api-key", "crab"]);
    let Some(browser) = Browser::open(&serving, 400, 800) else { return };
    let refusal = |text: &Value| text.as_str().unwrap().starts_with("no API key");
    browser.wait("return document.getElementById('status').textContent", refusal);
    browser.write("#message", "What is a trait?");
    browser.click("#send");
    browser.wait("return document.getElementById('error').textContent", refusal);
    // What was not answered is there to be sent again.
    assert_eq!(browser.run("return document.getElementById('message').value"), "What is a trait?");
    browser.click("summary");
    browser.write("#key", "crab");
    browser.write("#max-tokens", "5");
    browser.click("#send");
    browser.wait(IS_IDLE, |is_idle| *is_idle == true);
    assert!(browser.run("return document.getElementById('error').hidden") == true);
    assert_ne!(browser.text(".assistant"), "");
    // It is as wide as a telephone.
    browser.wait(GENERATED, |generated| *generated == 5);
    let picture = "return document.querySelector('#picture svg').getBoundingClientRect().width";
    assert!(browser.run(picture).as_f64().unwrap() > 200.0);
    assert_eq!(browser.run("return document.documentElement.scrollWidth - innerWidth"), 0);
}

#[test]
#[ignore = "it writes the picture of the README"]
fn the_page_as_a_picture() {
    let serving = Serving::start(&["--batch", "8"]);
    let browser = Browser::open(&serving, 1200, 943).unwrap();
    browser.click("summary");
    browser.write("#max-tokens", "60");
    browser.click("summary");
    browser.write("#message", "What is a trait object?");
    browser.click("#send");
    browser.wait(IS_IDLE, |is_idle| *is_idle == true);
    browser.wait(GENERATED, |generated| *generated != 0);
    let picture = browser.picture();
    assert!(picture.starts_with(b"\x89PNG") && picture.len() < MAX_PICTURE, "{} bytes", picture.len());
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/serve.png");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, picture).unwrap();
}
