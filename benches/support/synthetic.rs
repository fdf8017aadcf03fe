//! Llamas of random weights with a tokenizer, in shapes that are data.
#![allow(dead_code, reason = "each benchmark uses a part")]

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use evenkeel::architecture::ModuleTree;
use evenkeel::bytes::Bytes;
use evenkeel::model_config::ModelConfig;
use evenkeel::pool::Pool;
use evenkeel::source::LocalDirectory;
use half::bf16;
use serde_json::{Map, Value, json};

/// What a Llama is made of.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub feed_forward: usize,
    pub blocks: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub vocabulary: usize,
    /// Tokens of the prompt whose time is taken, and how many are generated behind it.
    pub prompt: usize,
    pub new: usize,
}

/// Llama-3-8B, 16 GB; a billion weights, 2.2 GB; one that runs anywhere.
pub const SHAPES: [Shape; 3] = [
    Shape {
        name: "8b",
        hidden: 4096,
        feed_forward: 14_336,
        blocks: 32,
        heads: 32,
        kv_heads: 8,
        vocabulary: 128_256,
        prompt: 4096,
        new: 128,
    },
    Shape {
        name: "1b",
        hidden: 2048,
        feed_forward: 8192,
        blocks: 16,
        heads: 32,
        kv_heads: 8,
        vocabulary: 32_000,
        prompt: 512,
        new: 64,
    },
    Shape {
        name: "tiny",
        hidden: 256,
        feed_forward: 512,
        blocks: 2,
        heads: 4,
        kv_heads: 2,
        vocabulary: 1000,
        prompt: 64,
        new: 8,
    },
];

/// Weights that are drawn by one thread at a time, and bytes that are written at once.
const RUN: usize = 1 << 16;
const PIECE: usize = 1 << 26;

impl Shape {
    pub fn named(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|shape| shape.name == name)
    }

    /// The checkpoint's directory, made where it is not there.
    pub fn checkpoint(&self) -> PathBuf {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        let directory = target.join(format!("synthetic-{}", self.name));
        if !directory.exists() {
            let unfinished = directory.with_extension("unfinished");
            fs::create_dir_all(&unfinished).expect("a directory");
            self.write(&unfinished);
            fs::rename(&unfinished, &directory).expect("a new name");
        }
        directory
    }

    /// The tokens of a prompt.
    pub fn tokens(&self, count: usize) -> Vec<u32> {
        let words = u32::try_from(self.vocabulary).expect("a small number") - 3;
        (0..words).cycle().map(|i| 3 + i * 61 % words).take(count).collect()
    }

    fn write(&self, directory: &Path) {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "hidden_size": self.hidden, "intermediate_size": self.feed_forward, "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
            "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
        });
        fs::write(directory.join("config.json"), config.to_string()).expect("config.json");
        fs::write(directory.join("tokenizer.json"), self.tokenizer().to_string()).expect("tokenizer.json");

        let config = LocalDirectory::new(directory).and_then(|files| ModelConfig::read(&files));
        let tree = ModuleTree::new(&config.expect("a configuration"));
        let parameters: Vec<_> = tree.parameters().map(|(_, parameter)| parameter).collect();
        let (mut header, mut end) = (Map::new(), 0u64);
        for parameter in &parameters {
            let start = end;
            end += 2 * (parameter.rows * parameter.cols) as u64;
            let entry = json!({"dtype": "BF16", "shape": parameter.shape(), "data_offsets": [start, end]});
            header.insert(parameter.tensor(), entry);
        }
        let free = evenkeel::fs::free_space(directory).expect("a file system");
        assert!(free > Bytes(end + end / 8), "{} are free, and {} are written", free, Bytes(end));
        let header = Value::Object(header).to_string();
        let mut file = File::create(directory.join("model.safetensors")).expect("a shard");
        file.write_all(&(header.len() as u64).to_le_bytes()).expect("room on the disk");
        file.write_all(header.as_bytes()).expect("room on the disk");
        let (pool, mut piece) = (Pool::default(), vec![0; PIECE]);
        let mut seed = 0;
        for parameter in parameters {
            let mut left = 2 * parameter.rows * parameter.cols;
            while left > 0 {
                let piece = &mut piece[..left.min(PIECE)];
                left -= piece.len();
                if parameter.rows == 1 {
                    piece.as_chunks_mut().0.fill(bf16::ONE.to_le_bytes());
                } else {
                    pool.chunks(piece, 2 * RUN, |run, bytes| fill(seed + run as u64, bytes));
                    seed += (PIECE / RUN) as u64;
                }
                file.write_all(piece).expect("room on the disk");
            }
        }
        file.sync_all().expect("room on the disk");
    }

    /// A word for each token: `w3` is token 3. Texts of words with spaces between have as many tokens.
    fn tokenizer(&self) -> Value {
        let special = ["<unk>", "<s>", "</s>"];
        let words = special.map(str::to_owned).into_iter().chain((special.len()..).map(|token| format!("w{token}")));
        let vocabulary: Map<String, Value> =
            words.zip(0..self.vocabulary).map(|(word, token)| (word, token.into())).collect();
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        })
    }
}

/// Weights of a standard deviation of 0.02, the same for the same seed.
fn fill(seed: u64, bytes: &mut [u8]) {
    let mut state = seed.wrapping_mul(0xd134_2543_de82_ef95);
    for weight in bytes.as_chunks_mut().0 {
        *weight = bf16::from_f32(gauss(&mut state) * 0.02).to_le_bytes();
    }
}

/// About a normal distribution: the sum of the eight bytes of a random word, centred and scaled.
fn gauss(state: &mut u64) -> f32 {
    // SplitMix64.
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let sum: u16 = (z ^ (z >> 31)).to_le_bytes().into_iter().map(u16::from).sum();
    (f32::from(sum) - 1020.0) / 209.0
}
