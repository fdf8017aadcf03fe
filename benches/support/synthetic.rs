//! A Llama of a billion random weights, with a tokenizer: 16 blocks, 2048 wide, feed-forward 8192,
//! 32 heads over 8, a vocabulary of 32,000.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use evenkeel::architecture::ModuleTree;
use evenkeel::model_config::ModelConfig;
use evenkeel::source::LocalDirectory;
use half::bf16;
use serde_json::{Map, Value, json};

pub const HIDDEN: u64 = 2048;
pub const VOCABULARY: u64 = 32_000;

/// The checkpoint's directory, made where it is not there.
pub fn checkpoint() -> PathBuf {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/synthetic-1b");
    if !directory.exists() {
        let unfinished = directory.with_extension("unfinished");
        fs::create_dir_all(&unfinished).expect("a directory");
        write(&unfinished);
        fs::rename(&unfinished, &directory).expect("a new name");
    }
    directory
}

fn write(directory: &Path) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2,
    });
    fs::write(directory.join("config.json"), config.to_string()).expect("config.json");
    fs::write(directory.join("tokenizer.json"), tokenizer().to_string()).expect("tokenizer.json");

    let config = ModelConfig::read(&LocalDirectory::new(directory).expect("the directory")).expect("a configuration");
    let tree = ModuleTree::new(&config);
    let parameters: Vec<_> = tree.parameters().map(|(_, parameter)| parameter).collect();
    let (mut header, mut end) = (Map::new(), 0u64);
    for parameter in &parameters {
        let start = end;
        end += 2 * (parameter.rows * parameter.cols) as u64;
        let entry = json!({"dtype": "BF16", "shape": parameter.shape(), "data_offsets": [start, end]});
        header.insert(parameter.tensor(), entry);
    }
    let header = Value::Object(header).to_string();
    let file = File::create(directory.join("model.safetensors")).expect("a shard");
    let mut file = BufWriter::with_capacity(1 << 20, file);
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("room on the disk");
    file.write_all(header.as_bytes()).expect("room on the disk");
    let mut random = 1u64;
    for parameter in parameters {
        let is_norm = parameter.rows == 1;
        for _ in 0..parameter.rows * parameter.cols {
            let weight = if is_norm { 1.0 } else { gauss(&mut random) * 0.02 };
            file.write_all(&bf16::from_f32(weight).to_le_bytes()).expect("room on the disk");
        }
    }
    file.flush().expect("room on the disk");
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

/// A word for each token: `w3` is token 3. Texts of words with spaces between have as many tokens.
fn tokenizer() -> Value {
    let special = ["<unk>", "<s>", "</s>"];
    let words = special.map(str::to_owned).into_iter().chain((special.len()..).map(|token| format!("w{token}")));
    let vocabulary: Map<String, Value> = words.zip(0..VOCABULARY).map(|(word, token)| (word, token.into())).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    })
}
