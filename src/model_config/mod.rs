//! config.json, in the older dialect of Transformers and the newer, as one
//! checked [`ModelConfig`].

mod fields;

use crate::bytes::{Bytes, MIB};
use crate::error::{Result, first_five, printable};
use crate::json::{Document, Node};
use crate::source::Source;
use fields::Fields;

/// The configuration's file name.
pub const FILE: &str = "config.json";
const GENERATION_FILE: &str = "generation_config.json";
const CAP: Bytes = Bytes(MIB);

/// The architectures that are supported: the name in config.json's `architectures`, and its `model_type`.
pub const ARCHITECTURES: &[(&str, &str)] = &[("LlamaForCausalLM", "llama")];

const MAX_BLOCKS: u64 = 10_000;
const MAX_WIDTH: u64 = 1 << 20;
const MAX_HEADS: u64 = 1 << 16;
const MAX_VOCABULARY: u64 = 1 << 24;
const MAX_CONTEXT: u64 = 1 << 28;

/// What a model is, every number checked to be in its range and to fit the others.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture's name, one of [`ARCHITECTURES`].
    pub architecture: &'static str,
    /// The dtype that the configuration declares, for display; each tensor's own dtype counts.
    pub dtype: Option<String>,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads; a multiple of the key-value heads.
    pub num_attention_heads: usize,
    /// Number of key-value heads.
    pub num_key_value_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// The longest context that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// The epsilon under RMSNorm's root.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// The tokens that end a text; generation_config.json's if it names any.
    pub eos_token_ids: Vec<u32>,
}

/// Rotary position embedding: the base, and how its frequencies are scaled.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies θ^(−2i/d).
    pub theta: f64,
    /// Scaling of the frequencies.
    pub scaling: RopeScaling,
}

/// How the frequencies of RoPE are scaled.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The context before scaling, in tokens.
        original_max_position_embeddings: f64,
    },
}

impl ModelConfig {
    /// Reads and checks config.json, and the end-of-text tokens of
    /// generation_config.json where there is one. Unknown keys have no effect,
    /// and code that `auto_map` names is never read.
    ///
    /// # Errors
    /// A file is missing or no JSON, a value is of the wrong type or out of
    /// its range, or the architecture is not supported.
    pub fn read(source: &dyn Source) -> Result<Self> {
        let document = Document::parse(source.display(FILE), source.read(FILE, CAP)?)?;
        let fields = Fields::of(document.root())?;
        let architecture = architecture(&fields)?;
        if let Some(quantization) = fields.optional("quantization_config") {
            let scheme = Fields::of(quantization)?.text_or_none("quant_method")?;
            let scheme = printable(scheme.as_deref().unwrap_or("unnamed"));
            return Err(quantization
                .error(format!("the checkpoint is already quantized (`{scheme}`), which is not supported"))
                .hint("name the unquantized checkpoint that it was made from; `--quantize` quantizes while loading"));
        }
        for (key, supported) in [("attention_bias", false), ("mlp_bias", false)] {
            if let Some(node) = fields.optional(key)
                && node.truth()? != supported
            {
                return Err(node.error(format!("`{key}` is not supported")));
            }
        }
        if let Some(node) = fields.optional("hidden_act") {
            let activation = node.text()?;
            if activation != "silu" {
                let activation = printable(&activation);
                return Err(node.error(format!("activation `{activation}` is not supported; `silu` is")));
            }
        }

        let hidden_size = fields.size("hidden_size", MAX_WIDTH)?;
        let num_attention_heads = fields.size("num_attention_heads", MAX_HEADS)?;
        let num_key_value_heads = fields.size_or("num_key_value_heads", MAX_HEADS, num_attention_heads)?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(fields.error(
                "num_attention_heads",
                format!(
                    "{num_attention_heads} attention heads do not divide over {num_key_value_heads} key-value heads"
                ),
            ));
        }
        let divides = hidden_size.is_multiple_of(num_attention_heads);
        if !divides && fields.optional("head_dim").is_none() {
            return Err(fields.error(
                "hidden_size",
                format!("a hidden size of {hidden_size} does not divide over {num_attention_heads} attention heads"),
            ));
        }
        let head_dim = fields.size_or("head_dim", MAX_WIDTH, hidden_size / num_attention_heads)?;
        if !head_dim.is_multiple_of(2) {
            return Err(fields.error("head_dim", format!("a head of width {head_dim} cannot be rotated: it is odd")));
        }
        Ok(Self {
            architecture,
            dtype: match fields.text_or_none("dtype")? {
                Some(dtype) => Some(printable(&dtype)),
                None => fields.text_or_none("torch_dtype")?.map(|dtype| printable(&dtype)),
            },
            hidden_size,
            intermediate_size: fields.size("intermediate_size", MAX_WIDTH)?,
            num_hidden_layers: fields.size("num_hidden_layers", MAX_BLOCKS)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.size("vocab_size", MAX_VOCABULARY)?,
            max_position_embeddings: fields.size_or("max_position_embeddings", MAX_CONTEXT, 2048)?,
            #[expect(clippy::cast_possible_truncation, reason = "epsilon is used in f32")]
            rms_norm_eps: fields.positive_or("rms_norm_eps", 1.0, 1e-6)? as f32,
            rope: rope(&fields)?,
            tie_word_embeddings: fields.truth_or("tie_word_embeddings", false)?,
            eos_token_ids: end_of_text(source, &fields)?,
        })
    }
}

fn architecture(fields: &Fields) -> Result<&'static str> {
    let known = || ARCHITECTURES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    if let Some(node) = fields.optional("architectures") {
        let names = node.elements()?.iter().map(Node::text).collect::<Result<Vec<_>>>()?;
        let supported = ARCHITECTURES.iter().find(|(known, _)| names.iter().any(|name| name == known));
        return supported.map(|(name, _)| *name).ok_or_else(|| {
            let names = first_five(names.iter().map(|name| printable(name)));
            node.error(format!("architecture {names} is not supported; supported: {}", known()))
        });
    }
    let node = fields.required("model_type")?;
    let model_type = node.text()?;
    let supported = ARCHITECTURES.iter().find(|(_, known)| *known == model_type);
    supported.map(|(name, _)| *name).ok_or_else(|| {
        let model_type = printable(&model_type);
        node.error(format!("model type `{model_type}` is not supported; supported: {}", known()))
    })
}

/// RoPE from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`.
fn rope(fields: &Fields) -> Result<Rope> {
    const MAX_THETA: f64 = 1e12;
    const DEFAULT_THETA: f64 = 10_000.0;
    let older_theta = fields.positive_or("rope_theta", MAX_THETA, DEFAULT_THETA)?;
    let Some(node) = fields.optional("rope_parameters").or_else(|| fields.optional("rope_scaling")) else {
        return Ok(Rope { theta: older_theta, scaling: RopeScaling::Default });
    };
    let rope = Fields::of(node)?;
    let kind = match rope.text_or_none("rope_type")? {
        Some(kind) => Some(kind),
        None => rope.text_or_none("type")?,
    };
    let scaling = match kind.as_deref().unwrap_or("default") {
        "default" => RopeScaling::Default,
        "llama3" => {
            const MAX_FACTOR: f64 = 1e6;
            let (low, high) =
                (rope.positive("low_freq_factor", MAX_FACTOR)?, rope.positive("high_freq_factor", MAX_FACTOR)?);
            if high <= low {
                return Err(rope.error(
                    "high_freq_factor",
                    format!("`high_freq_factor` {high} must be above `low_freq_factor` {low}"),
                ));
            }
            RopeScaling::Llama3 {
                factor: rope.positive("factor", MAX_FACTOR)?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: rope.size("original_max_position_embeddings", MAX_CONTEXT)? as f64,
            }
        }
        other => {
            let other = printable(other);
            return Err(node.error(format!("RoPE of type `{other}` is not supported; `default` and `llama3` are")));
        }
    };
    Ok(Rope { theta: rope.positive_or("rope_theta", MAX_THETA, older_theta)?, scaling })
}

fn end_of_text(source: &dyn Source, config: &Fields) -> Result<Vec<u32>> {
    if source.has(GENERATION_FILE)? {
        let document = Document::parse(source.display(GENERATION_FILE), source.read(GENERATION_FILE, CAP)?)?;
        let ids = Fields::of(document.root())?.token_ids("eos_token_id")?;
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    config.token_ids("eos_token_id")
}

#[cfg(test)]
mod tests;
