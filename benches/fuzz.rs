//! Changed files, in great numbers, at every door that a stranger's bytes come in by.
//!
//! `cargo bench --bench fuzz -- [SURFACE ...] [--runs N | --seconds N] [--seed N]`
//!
//! A surface fails by a panic of ours, an abort, or a run that takes longer than [`LONGEST`]. Each input is written
//! down before it is tried, so that the one that failed is still there. With no flags each surface is tried for a moment.

#![expect(clippy::print_stdout, reason = "it is run by hand and says what it did")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use evenkeel::checkpoint::{Checkpoint, Origin, Source};
use evenkeel::device_map::DeviceMap;
use evenkeel::machine::Inventory;
use evenkeel::model_config::ModelConfig;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::pool::Pool;
use evenkeel::random::Draws;
use evenkeel::{Bytes, Cancel, ChatTemplate, Error, Message, Result, Sandbox, Tokenizer};

const LONGEST: Duration = Duration::from_secs(10);
const THREADS: usize = 2;
const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model.safetensors";

static PANICKED: AtomicBool = AtomicBool::new(false);

/// Where bytes come in, the inputs that are changed, and what is done with them.
struct Surface {
    name: &'static str,
    seeds: Vec<Vec<u8>>,
    run: Box<Run>,
}

/// Takes an input, and a directory for files.
type Run = dyn Fn(&[u8], &Path) -> Result<()> + Sync;

/// A checkpoint in memory, of which one file may be another.
struct Memory {
    files: Arc<BTreeMap<String, Vec<u8>>>,
    changed: Option<(&'static str, Vec<u8>)>,
}

impl Memory {
    fn file(&self, file: &str) -> Result<&[u8]> {
        let changed = self.changed.as_ref().filter(|(name, _)| *name == file).map(|(_, bytes)| bytes);
        changed.or_else(|| self.files.get(file)).map(Vec::as_slice).ok_or_else(|| Error::input("there is no such file"))
    }

    fn with(&self, file: &'static str, bytes: &[u8]) -> Self {
        Self { files: Arc::clone(&self.files), changed: Some((file, bytes.to_vec())) }
    }
}

impl From<BTreeMap<String, Vec<u8>>> for Memory {
    fn from(files: BTreeMap<String, Vec<u8>>) -> Self {
        Self { files: Arc::new(files), changed: None }
    }
}

impl Source for Memory {
    fn has(&self, file: &str) -> bool {
        self.file(file).is_ok()
    }

    fn read(&self, file: &str, cap: Bytes) -> Result<Vec<u8>> {
        let bytes = self.file(file)?;
        Ok(bytes[..bytes.len().min(cap.as_usize().unwrap_or(usize::MAX))].to_vec())
    }

    fn size(&self, file: &str) -> Result<Bytes> {
        Ok(Bytes(self.file(file)?.len() as u64))
    }

    fn read_range(&self, file: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
        let bytes = self.file(file)?;
        let bytes = &bytes[usize::try_from(offset).map_or(bytes.len(), |offset| offset.min(bytes.len()))..];
        Ok(bytes[..bytes.len().min(len)].to_vec())
    }

    fn display(&self, file: &str) -> String {
        file.to_owned()
    }

    fn directory(&self) -> Option<&Path> {
        None
    }

    fn origin(&self) -> Origin {
        Origin::Directory { path: PathBuf::new() }
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn read(path: impl AsRef<Path>) -> Vec<u8> {
    std::fs::read(path.as_ref()).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

/// The file of that name of every fixture that has it.
fn of_every_fixture(file: &str) -> Vec<Vec<u8>> {
    let directories = fixtures().join("parity").read_dir().expect("fixtures");
    let mut paths: Vec<_> = directories.map(|entry| entry.expect("a fixture").path().join(file)).collect();
    paths.retain(|path| path.exists());
    paths.sort();
    paths.iter().map(read).collect()
}

/// A file of a few bytes behind the header of every tensor: its data is not read.
fn shard(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

fn surfaces() -> Vec<Surface> {
    let llama = fixtures().join("parity/llama");
    let files = llama.read_dir().expect("a fixture").map(|entry| entry.expect("a file").path());
    let whole: BTreeMap<_, _> =
        files.map(|path| (path.file_name().expect("a name").to_string_lossy().into_owned(), read(&path))).collect();
    let whole = Memory::from(whole);
    let one_shard = Memory::from(BTreeMap::from([(CONFIG.to_owned(), read(llama.join(CONFIG)))]));
    let pool = || Pool::new(std::num::NonZeroUsize::MIN);
    let checkpoint = Checkpoint::open(fixtures().join("ferris-7m")).expect("a checkpoint");
    let inventory = Inventory::described("cuda:0=1GiB,cuda:1=1GiB,cpu=1GiB").expect("devices");
    let maps = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("device_maps/ferris-7m")).expect("maps");
    let templates = [
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}x{% endif %}",
        "{{ bos_token }}{% set ns = namespace(a=[]) %}{% for i in range(9) %}{% set ns.a = ns.a + [i] %}{% endfor %}{{ ns.a | tojson(indent=2) }}",
        "{% macro f(x) %}{{ '%s' % x }}{% endmacro %}{{ f('a')|indent(2) }}{{ 'a,b'.split(',')|join('x' * 9) }}{{ strftime_now('%Y') }}",
        "{%- generation %}{{ {'a': [1, none]}|string|upper|replace('A', 'bb')|batch(2)|list }}{% endgeneration -%}{{ raise_exception('no') }}",
    ];
    let sandbox = Sandbox::new(env!("CARGO_BIN_EXE_evenkeel"), ["sandbox".into()], Cancel::new());
    let message = [Message::new("user", "hello")];
    vec![
        Surface {
            name: "header",
            seeds: vec![
                shard(
                    r#"{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]},"__metadata__":{"format":"pt"}}"#,
                    16,
                ),
                read(llama.join("model-00001-of-00005.safetensors")).into_iter().take(3000).collect(),
            ],
            run: Box::new(move |bytes, _| Checkpoint::read("x", &one_shard.with(SHARD, bytes), &pool()).map(drop)),
        },
        Surface {
            name: "index",
            seeds: vec![whole.file(INDEX).expect("an index").to_vec()],
            run: Box::new(move |bytes, _| Checkpoint::read("x", &whole.with(INDEX, bytes), &pool()).map(drop)),
        },
        Surface {
            name: "config",
            seeds: of_every_fixture(CONFIG),
            run: Box::new(|bytes, _| ModelConfig::parse(CONFIG, bytes.to_vec()).map(drop)),
        },
        Surface {
            name: "map",
            seeds: maps.map(|entry| read(entry.expect("a map").path())).collect(),
            run: Box::new(move |bytes, _| {
                let options = PlanOptions {
                    device_map: Some(DeviceMap::parse("map", bytes.to_vec())?),
                    ..PlanOptions::default()
                };
                Plan::new(&checkpoint, &inventory, options).map(drop)
            }),
        },
        Surface {
            name: "tokenizer",
            seeds: vec![read(llama.join("tokenizer.json")), SMALL_TOKENIZER.into()],
            run: Box::new(|bytes, directory| {
                std::fs::write(directory.join("tokenizer.json"), bytes).expect("a file");
                let tokenizer = Tokenizer::open(directory, 300)?;
                let ids = tokenizer.encode("t1 t2 <s>é", true)?;
                tokenizer.decode(&ids).map(drop)
            }),
        },
        Surface {
            name: "template",
            seeds: templates.map(Into::into).into(),
            run: Box::new(move |bytes, directory| {
                std::fs::write(directory.join("chat_template.jinja"), bytes).expect("a file");
                sandbox.render(&ChatTemplate::open(directory)?, &message, &[]).map(drop)
            }),
        },
    ]
}

const SMALL_TOKENIZER: &str = r#"{"version":"1.0","added_tokens":[{"id":3,"content":"<s>","single_word":false,"lstrip":true,"rstrip":false,"normalized":false,"special":true}],
"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"_"},{"type":"Replace","pattern":{"String":" "},"content":"_"},{"type":"NFKC"}]},
"pre_tokenizer":{"type":"Split","pattern":{"Regex":"\\s+|\\w"},"behavior":"Isolated","invert":false},
"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[],"special_tokens":{"<s>":{"id":"<s>","ids":[3],"tokens":["<s>"]}}},
"decoder":{"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
"model":{"type":"BPE","unk_token":"t","byte_fallback":true,"ignore_merges":false,"vocab":{"t":0,"1":1,"t1":2,"<s>":3,"_":4,"<0xC3>":5},"merges":[["t","1"]]}}"#;

/// What is put in place of something, beside random bytes.
const WORDS: &[&str] = &[
    "0",
    "-1",
    "1e308",
    "1e-320",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "NaN",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "[[[[[[[[",
    "\"\\ud800\"",
    "\u{0}",
    "\u{202e}",
    "é",
    "../",
    "/",
    "cuda:99",
    "disk",
    "{{",
    "}}",
    "{%",
    "%}",
    "|",
    "~",
    "*",
    "**",
];

/// `seed` with a few changes.
fn changed(seed: &[u8], draws: &mut Draws) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=draws.below(4) {
        let at = draws.below(bytes.len() + 1);
        let len = draws.below((bytes.len() - at).min(40) + 1);
        match draws.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << draws.below(8),
            1 => drop(bytes.drain(at..at + len)),
            2 => bytes.truncate(at),
            3 => {
                let piece = bytes[at..at + len].to_vec();
                let to = draws.below(bytes.len() + 1);
                let copies = draws.below(3) + 1;
                bytes.splice(to..to, piece.repeat(copies));
            }
            4 => bytes.insert(at, draws.draw().to_le_bytes()[0]),
            _ => {
                // In place of a value, where one begins here.
                let is_value = |byte: &u8| byte.is_ascii_alphanumeric() || b"-+.".contains(byte);
                let at = bytes[at..].iter().position(is_value).map_or(at, |skipped| at + skipped);
                let end = bytes[at..].iter().position(|byte| !is_value(byte)).map_or(bytes.len(), |len| at + len);
                bytes.splice(at..end, WORDS[draws.below(WORDS.len())].bytes());
            }
        }
    }
    bytes
}

/// Runs a surface for as long or as often as is wanted. Whether nothing failed.
fn fuzz(surface: &Surface, runs: u64, until: Instant, seed: u64) -> bool {
    let (done, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..THREADS as u64 {
            let (done, failed) = (&done, &failed);
            scope.spawn(move || {
                let directory = tempfile::tempdir().expect("a directory");
                let input = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}-{thread}", surface.name));
                // Open throughout: to make and cut a file takes longer than many a run.
                let written = File::create(&input).expect("a file");
                let mut draws = Draws::new(seed.wrapping_mul(THREADS as u64).wrapping_add(thread));
                let is_on = || !failed.load(Ordering::Relaxed) && Instant::now() < until;
                while is_on() && done.fetch_add(1, Ordering::Relaxed) < runs {
                    let bytes = changed(&surface.seeds[draws.below(surface.seeds.len())], &mut draws);
                    written.write_all_at(&bytes, 0).and_then(|()| written.set_len(bytes.len() as u64)).expect("a file");
                    let start = Instant::now();
                    let result = catch_unwind(AssertUnwindSafe(|| drop((surface.run)(&bytes, directory.path()))));
                    if result.is_err() || PANICKED.load(Ordering::Relaxed) || start.elapsed() > LONGEST {
                        println!("{}: failed after {:?} with {}", surface.name, start.elapsed(), input.display());
                        failed.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let done = done.into_inner().min(runs);
    println!("{}: {done} runs in {:.1} s, seed {seed}", surface.name, begun.elapsed().as_secs_f64());
    !failed.into_inner()
}

fn main() -> ExitCode {
    let (mut runs, mut seconds, mut seed, mut wanted) = (None, None, 1, Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|text| text.parse::<u64>().ok()).expect("a number");
        match argument.as_str() {
            "--runs" => runs = Some(number()),
            "--seconds" => seconds = Some(number()),
            "--seed" => seed = number(),
            // Cargo's own.
            "--bench" | "--test" => {}
            _ => wanted.push(argument),
        }
    }
    // Parsers of others may panic on what was made to, which is caught; ours may not.
    std::panic::set_hook(Box::new(|panic| {
        if panic.location().is_some_and(|place| place.file().starts_with("src/")) {
            println!("{panic}");
            PANICKED.store(true, Ordering::Relaxed);
        }
    }));
    let seconds = seconds.unwrap_or(if runs.is_some() { 86_400 } else { 1 });
    let mut is_well = true;
    for surface in
        surfaces().iter().filter(|surface| wanted.is_empty() || wanted.iter().any(|name| name == surface.name))
    {
        is_well &= fuzz(surface, runs.unwrap_or(u64::MAX), Instant::now() + Duration::from_secs(seconds), seed);
    }
    if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
