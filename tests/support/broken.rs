//! Checkpoints that are right until a test breaks them, and what becomes of them.

use std::error::Error as _;
use std::path::{Path, PathBuf};

use evenkeel::bytes::Bytes;
use evenkeel::checkpoint::{Checkpoint, LocalDirectory, Origin, Source};
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::pool::Pool;
use evenkeel::{ErrorKind, Result};
use serde_json::Value;
use tempfile::TempDir;

use super::{fixture, roomy};

pub const CONFIG: &str = "config.json";
pub const INDEX: &str = "model.safetensors.index.json";
/// The only shard of [`Broken::tiny`].
pub const SHARD: &str = "model.safetensors";

/// The configuration of [`Broken::tiny`], a member a line.
pub const TINY_CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"],
  "hidden_size": 8,
  "intermediate_size": 12,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "vocab_size": 16,
  "rms_norm_eps": 1e-05,
  "max_position_embeddings": 32,
  "tie_word_embeddings": false
}"#;

/// A tensor to write, all zero.
#[derive(Clone)]
pub struct Spec {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<u64>,
}

impl Spec {
    pub fn new(name: &str, dtype: &'static str, shape: &[u64]) -> Self {
        Self { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    fn size(&self) -> u64 {
        let element = match self.dtype {
            "F64" => 8,
            "F32" => 4,
            "F16" | "BF16" => 2,
            _ => 1,
        };
        self.shape.iter().product::<u64>() * element
    }
}

/// The tensors of [`Broken::tiny`].
pub fn tiny_tensors() -> Vec<Spec> {
    let block = |name: &str, shape: &[u64]| Spec::new(&format!("model.layers.0.{name}.weight"), "F32", shape);
    vec![
        Spec::new("model.embed_tokens.weight", "F32", &[16, 8]),
        block("input_layernorm", &[8]),
        block("self_attn.q_proj", &[8, 8]),
        block("self_attn.k_proj", &[4, 8]),
        block("self_attn.v_proj", &[4, 8]),
        block("self_attn.o_proj", &[8, 8]),
        block("post_attention_layernorm", &[8]),
        block("mlp.gate_proj", &[12, 8]),
        block("mlp.up_proj", &[12, 8]),
        block("mlp.down_proj", &[8, 12]),
        Spec::new("model.norm.weight", "F32", &[8]),
        Spec::new("lm_head.weight", "F32", &[16, 8]),
    ]
}

/// The header of a shard of these tensors, and the number of bytes behind it.
pub fn header(tensors: &[Spec]) -> (String, usize) {
    let mut end = 0;
    let entries: Vec<String> = tensors
        .iter()
        .map(|tensor| {
            let (start, name) = (end, Value::from(tensor.name.as_str()));
            end += tensor.size();
            let (dtype, shape) = (tensor.dtype, &tensor.shape);
            format!(r#"{name}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    (format!("{{{}}}", entries.join(",")), usize::try_from(end).unwrap())
}

/// A shard with this header, well-formed or not, and `data` zeros behind it.
pub fn shard(header: impl AsRef<[u8]>, data: usize) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, &vec![0; data]].concat()
}

/// A checkpoint in a directory of its own.
pub struct Broken {
    root: TempDir,
    directory: PathBuf,
}

impl Broken {
    fn empty(directory: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join(directory);
        std::fs::create_dir_all(&directory).unwrap();
        Self { root, directory }
    }

    /// One block, one shard, no index.
    pub fn tiny() -> Self {
        Self::tiny_in("model")
    }

    /// [`Broken::tiny`] in this directory below [`Broken::root`].
    pub fn tiny_in(directory: &str) -> Self {
        let broken = Self::empty(directory);
        broken.write(CONFIG, TINY_CONFIG);
        broken.write_tensors(SHARD, &tiny_tensors());
        broken
    }

    /// A copy of the fixture `parity/llama`: three blocks, five shards, an index.
    pub fn sharded() -> Self {
        let broken = Self::empty("model");
        for entry in std::fs::read_dir(fixture("parity/llama")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), broken.path(entry.file_name().to_str().unwrap())).unwrap();
        }
        broken
    }

    /// The directory around the checkpoint's own.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    pub fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path(file)).unwrap()
    }

    pub fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(file), bytes).unwrap();
    }

    pub fn write_tensors(&self, file: &str, tensors: &[Spec]) {
        let (header, data) = header(tensors);
        self.write(file, shard(header, data));
    }

    pub fn remove(&self, file: &str) {
        std::fs::remove_file(self.path(file)).unwrap();
    }

    /// Cuts a file, or extends it by a hole.
    pub fn resize(&self, file: &str, len: u64) {
        let file = std::fs::File::options().write(true).create(true).truncate(false).open(self.path(file)).unwrap();
        file.set_len(len).unwrap();
    }

    /// Puts a symbolic link in place of a file.
    pub fn link(&self, file: &str, target: impl AsRef<Path>) {
        let _ = std::fs::remove_file(self.path(file));
        std::os::unix::fs::symlink(target, self.path(file)).unwrap();
    }

    /// Puts a named pipe, which nobody writes to, in place of a file.
    pub fn pipe(&self, file: &str) {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let _ = std::fs::remove_file(self.path(file));
        mknodat(CWD, self.path(file), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }

    /// Replaces the only place where `old` stands in a text file.
    pub fn replace(&self, file: &str, old: &str, new: &str) {
        let text = String::from_utf8(self.read(file)).unwrap();
        assert_eq!(text.matches(old).count(), 1, "{old}");
        self.write(file, text.replace(old, new));
    }

    /// Opens and plans the checkpoint, and sees to it that nothing but headers is read of its shards.
    pub fn plan(&self) -> Result<(Checkpoint, Plan)> {
        let source = HeadersOnly(LocalDirectory::new(&self.directory)?);
        let checkpoint = Checkpoint::read("broken", &source, &Pool::default())?;
        let plan = Plan::new(&checkpoint, &roomy(), PlanOptions::default())?;
        Ok((checkpoint, plan))
    }

    /// The error that refuses the checkpoint, with its causes and its hints;
    /// the checkpoint's directory is shown as `DIR`.
    pub fn refusal(&self) -> String {
        let error = self.plan().map(|_| ()).expect_err("the checkpoint is accepted");
        assert_eq!(error.kind(), ErrorKind::Input, "{error}");
        let mut parts = vec![error.to_string()];
        let mut cause = error.source();
        while let Some(error) = cause {
            parts.push(format!("cause: {error}"));
            cause = error.source();
        }
        parts.extend(error.hints().iter().map(|hint| format!("hint: {hint}")));
        parts.join("; ").replace(self.directory.to_str().unwrap(), "DIR")
    }

    /// Holds the refusal against what it must be.
    #[track_caller]
    pub fn refused(&self, message: impl AsRef<str>) {
        assert_eq!(self.refusal(), message.as_ref());
    }
}

/// The rows of a table, a line each, with ` | ` between the cells.
pub fn rows<const N: usize>(table: &str) -> impl Iterator<Item = [&str; N]> {
    table.trim().lines().map(|line| {
        let cells: Vec<_> = line.trim().split(" | ").collect();
        cells.try_into().unwrap_or_else(|_| panic!("{N} cells are wanted: {line}"))
    })
}

/// A directory of whose shards only the headers may be read, and of a head that may be the embedding a sample.
struct HeadersOnly(LocalDirectory);

impl Source for HeadersOnly {
    fn has(&self, file: &str) -> bool {
        self.0.has(file)
    }

    fn read(&self, file: &str, cap: Bytes) -> Result<Vec<u8>> {
        assert!(!file.ends_with(".safetensors"), "`{file}` is read whole");
        self.0.read(file, cap)
    }

    fn size(&self, file: &str) -> Result<Bytes> {
        self.0.size(file)
    }

    fn read_range(&self, file: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
        let field = self.0.read_range(file, 0, 8)?;
        let header = field.first_chunk().map_or(0, |field| u64::from_le_bytes(*field));
        let end = offset + len as u64;
        let config = self.0.read(CONFIG, Bytes(1 << 20)).unwrap_or_default();
        let is_tied = String::from_utf8_lossy(&config).contains("\"tie_word_embeddings\": true");
        assert!(is_tied || end <= header.saturating_add(8), "`{file}` is read up to byte {end}, beyond its header");
        self.0.read_range(file, offset, len)
    }

    fn display(&self, file: &str) -> String {
        self.0.display(file)
    }

    fn directory(&self) -> Option<&Path> {
        self.0.directory()
    }

    fn origin(&self) -> Origin {
        self.0.origin()
    }
}
