//! config.json, in the older dialect of Transformers and the newer, as one
//! checked [`ModelConfig`].

mod families;
mod family;
mod fields;
mod generation;
mod rope;

use std::collections::HashSet;

use crate::bytes::{Bytes, MIB};
use crate::error::{Hint, Result, Setting, first_five, printable};
use crate::json::{Document, Node};
use crate::source::Source;
use family::{Windowed, Windows};
use fields::Fields;

pub use families::{FAMILIES, table};
pub use family::{Activation, Family, HEAD, HEAD_WEIGHT, NormKind, Role};
pub use generation::GenerationDefaults;
pub use rope::Rope;

/// The configuration's file name.
pub const FILE: &str = "config.json";
const GENERATION_FILE: &str = "generation_config.json";
const CAP: Bytes = Bytes(MIB);

/// The `quant_method` of checkpoints whose weights are packed in the canonical layout.
pub const PACKED_METHOD: &str = "evenkeel";
/// The version of that packing.
pub const PACKED_VERSION: u64 = 1;

const MAX_BLOCKS: u64 = 10_000;
const MAX_WIDTH: u64 = 1 << 20;
const MAX_HEADS: u64 = 1 << 16;
const MAX_VOCABULARY: u64 = 1 << 24;
/// The longest context of a model, in tokens.
pub const MAX_CONTEXT: u64 = 1 << 28;
const MAX_EXPERTS: u64 = 1 << 16;
/// Experts in all blocks together.
const MAX_EXPERTS_OF_MODEL: usize = 1 << 18;
const MAX_SCALE: f64 = 1e6;

/// What a model is, every number checked to be in its range and to fit the others.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each says whether a model has something")]
pub struct ModelConfig {
    /// The architecture, as data.
    pub family: &'static Family,
    /// What `architectures` names, where that is another one than `model_type`, which counts.
    pub other_architectures: Option<String>,
    /// Module paths and the names of the schemes that their weights are packed in already; `None` where none are.
    pub packed: Option<Vec<(String, String)>>,
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
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// The longest context that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// The epsilon under the norms' root.
    pub norm_eps: f32,
    /// The activation of the feed-forward layer.
    pub activation: Activation,
    /// Whether queries, keys and values have a bias.
    pub query_key_value_bias: bool,
    /// Whether attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the feed-forward layer has biases.
    pub feed_forward_bias: bool,
    /// What is special to each block; as many as there are blocks.
    pub layers: Vec<Layer>,
    /// Rotary position embeddings, which blocks refer to; none where positions are learned.
    pub ropes: Vec<Rope>,
    /// Factor of the embedding.
    pub embedding_scale: f32,
    /// Factor of what a block's halves add to the hidden state.
    pub residual_scale: f32,
    /// Factor of the scores of queries and keys.
    pub attention_scale: f32,
    /// c, where scores of attention become `c · tanh(score / c)`.
    pub attention_softcap: Option<f32>,
    /// Factor of the logits.
    pub logit_scale: f32,
    /// c, where logits become `c · tanh(logit / c)`.
    pub logit_softcap: Option<f32>,
    /// The experts of the blocks that have some.
    pub experts: Option<Experts>,
    /// Whether the head is the embedding; [`Checkpoint`](crate::Checkpoint) holds it against what is stored.
    pub tie_word_embeddings: bool,
    /// The tokens that end a text; generation_config.json's if it names any.
    pub eos_token_ids: Vec<u32>,
    /// How it is sampled unless its user says otherwise.
    pub generation: GenerationDefaults,
}

/// What may differ from block to block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// How many of the last tokens a token sees, itself among them; all where it is `None`.
    pub window: Option<usize>,
    /// Position of its RoPE in [`ModelConfig::ropes`]; none where it has no RoPE.
    pub rope: Option<usize>,
    /// Whether its feed-forward layer is made of experts.
    pub has_experts: bool,
}

/// A feed-forward layer of which each token uses a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// How many a token uses: those with the highest scores.
    pub per_token: usize,
    /// Width of one.
    pub intermediate_size: usize,
    /// Whether the weights of those that are used are made to sum up to 1.
    pub is_normalized: bool,
}

impl ModelConfig {
    /// Reads and checks config.json, and the end-of-text tokens and the sampling of
    /// generation_config.json where there is one. Unknown keys have no effect,
    /// and code that `auto_map` names is never read.
    ///
    /// # Errors
    /// A file is missing or no JSON, a value is of the wrong type or out of
    /// its range, or the architecture is not supported.
    pub fn read(source: &dyn Source) -> Result<Self> {
        let mut config = Self::parse(&source.display(FILE), source.read(FILE, CAP)?)?;
        if source.has(GENERATION_FILE) {
            let document = Document::parse(source.display(GENERATION_FILE), source.read(GENERATION_FILE, CAP)?)?;
            let fields = Fields::of(document.root())?;
            let ids = fields.token_ids("eos_token_id")?;
            if !ids.is_empty() {
                config.eos_token_ids = ids;
            }
            config.generation = GenerationDefaults::read(&fields)?;
        }
        Ok(config)
    }

    /// Reads and checks the text of a config.json; `origin` is its name in messages.
    pub fn parse(origin: &str, json: Vec<u8>) -> Result<Self> {
        let document = Document::parse(origin, json)?;
        let fields = Fields::of(document.root())?;
        let family = family(&fields)?;
        let packed = fields.optional("quantization_config").map(packed).transpose()?;
        refuse_unsupported(&fields)?;

        let heads = family.key("num_attention_heads");
        let hidden_size = fields.size(family.key("hidden_size"), MAX_WIDTH)?;
        let num_attention_heads = fields.size(heads, MAX_HEADS)?;
        let num_key_value_heads = fields.size_or("num_key_value_heads", MAX_HEADS, num_attention_heads)?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let (queries, keys) = (num_attention_heads, num_key_value_heads);
            let problem = format!("{queries} attention heads do not divide over {keys} key-value heads");
            return Err(fields.error(heads, problem));
        }
        let divides = hidden_size.is_multiple_of(num_attention_heads) || family.head_dim.is_some();
        if !divides && fields.optional("head_dim").is_none() {
            let heads = format!("{num_attention_heads} attention heads");
            let problem = format!("a hidden size of {hidden_size} does not divide over {heads}");
            return Err(fields.error(family.key("hidden_size"), problem));
        }
        let head_dim = family.head_dim.unwrap_or(hidden_size / num_attention_heads);
        let head_dim = fields.size_or("head_dim", MAX_WIDTH, head_dim)?;
        let max_position_embeddings = fields.size_or(family.key("max_position_embeddings"), MAX_CONTEXT, 2048)?;
        let ropes = match family.positions {
            Some(_) => Vec::new(),
            None => rope::read(&fields, family, head_dim, max_position_embeddings)?,
        };
        let max_position_embeddings =
            ropes.iter().map(|rope| rope.longest(max_position_embeddings)).max().unwrap_or(max_position_embeddings);
        let num_hidden_layers = fields.size(family.key("num_hidden_layers"), MAX_BLOCKS)?;
        let experts = experts(&fields, family, num_hidden_layers)?;
        let intermediate_size = match family.positions {
            // GPT-2's is four times the hidden size unless it says otherwise.
            Some(_) => fields.size_or(family.key("intermediate_size"), MAX_WIDTH, 4 * hidden_size)?,
            None => fields.size(family.key("intermediate_size"), MAX_WIDTH)?,
        };
        let multiplier = |key| if family.has_multipliers { fields.positive_or(key, MAX_SCALE, 1.0) } else { Ok(1.0) };
        let (attention_softcap, logit_softcap) = softcaps(&fields, family)?;
        let [query_key_value_bias, output_bias, feed_forward_bias] = if let Some(biases) = family.biases {
            biases
        } else {
            let attention = fields.truth_or("attention_bias", false)?;
            [attention, attention, fields.truth_or("mlp_bias", false)?]
        };
        // What is computed with is f32.
        #[expect(clippy::cast_possible_truncation, reason = "used in f32")]
        Ok(Self {
            family,
            other_architectures: other_architectures(&fields, family)?,
            packed,
            dtype: fields.text_or_none(["dtype", "torch_dtype"])?.map(|dtype| printable(&dtype)),
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.size("vocab_size", MAX_VOCABULARY)?,
            max_position_embeddings,
            norm_eps: fields.positive_or(family.key("rms_norm_eps"), 1.0, family.norm_eps)? as f32,
            activation: activation(&fields, family)?,
            query_key_value_bias,
            output_bias,
            feed_forward_bias,
            layers: layers(&fields, family, num_hidden_layers, experts.is_some())?,
            ropes,
            embedding_scale: if family.scales_embedding {
                (hidden_size as f32).sqrt()
            } else {
                multiplier("embedding_multiplier")? as f32
            },
            residual_scale: multiplier("residual_multiplier")? as f32,
            attention_scale: attention_scale(&fields, family, head_dim)? as f32,
            attention_softcap,
            logit_scale: (1.0 / multiplier("logits_scaling")?) as f32,
            logit_softcap,
            experts,
            tie_word_embeddings: fields.truth_or("tie_word_embeddings", family.is_tied)?,
            eos_token_ids: fields.token_ids("eos_token_id")?,
            generation: GenerationDefaults::default(),
        })
    }

    /// The length beyond which all tokens of a sequence are run again, once, for frequencies of another list.
    pub fn restart_beyond(&self) -> Option<usize> {
        self.ropes.iter().find_map(Rope::border).filter(|_| self.family.has_longrope)
    }

    /// Width of all queries of a token.
    pub fn queries(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all keys of a token, and of all values.
    pub fn keys(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }
}

/// What [`ModelConfig::packed`] says, from a `quantization_config`.
fn packed(quantization: Node) -> Result<Vec<(String, String)>> {
    let fields = Fields::of(quantization)?;
    let method = fields.text_or_none(["quant_method"])?;
    if method.as_deref() != Some(PACKED_METHOD) {
        let method = printable(method.as_deref().unwrap_or("unnamed"));
        return Err(quantization
            .error(format!("the checkpoint is already quantized (`{method}`), which is not supported"))
            .hint(Hint::naming(
                "name the unquantized checkpoint that it was made from; {} quantizes while loading",
                [Setting::Quantize(None)],
            )));
    }
    let version = fields.required("version")?;
    if version.whole()? != PACKED_VERSION {
        return Err(version
            .error(format!("only version {PACKED_VERSION} of packed checkpoints is read"))
            .hint(Hint::naming("{} makes one from the unquantized checkpoint", [Setting::SaveQuantized])));
    }
    let rules = fields.required("quantize")?.members()?;
    rules.into_iter().map(|rule| Ok((rule.name, rule.value.text()?))).collect()
}

/// Refuses what would change the computation of some family and is not there.
fn refuse_unsupported(fields: &Fields) -> Result<()> {
    for key in ["use_bidirectional_attention", "scale_attn_by_inverse_layer_idx", "add_cross_attention"] {
        if let Some(node) = fields.optional(key)
            && node.truth()?
        {
            return Err(node.error(format!("`{key}` is not supported")));
        }
    }
    Ok(())
}

fn activation(fields: &Fields, family: &Family) -> Result<Activation> {
    // Gemma's older configurations have its activation under the usual name too, where it counts for nothing.
    let Some(node) = fields.optional(family.key("hidden_act")) else {
        return Ok(family.activation);
    };
    let name = node.text()?;
    Activation::NAMES.iter().find(|(known, _)| *known == name).map(|(_, activation)| *activation).ok_or_else(|| {
        let known: Vec<_> = Activation::NAMES.iter().map(|(name, _)| format!("`{name}`")).collect();
        node.error(format!("activation `{}` is not supported; {} are", printable(&name), known.join(", ")))
    })
}

fn attention_scale(fields: &Fields, family: &Family, head_dim: usize) -> Result<f64> {
    if family.has_multipliers {
        return fields.positive_or("attention_multiplier", MAX_SCALE, 1.0);
    }
    let scalar = match family.query_pre_attn_scalar {
        Some(default) => fields.positive_or("query_pre_attn_scalar", MAX_SCALE, default)?,
        None if !fields.truth_or("scale_attn_weights", true)? => 1.0,
        None => head_dim as f64,
    };
    Ok(1.0 / scalar.sqrt())
}

/// The soft caps of attention and of the logits; a key that is `null` is none.
fn softcaps(fields: &Fields, family: &Family) -> Result<(Option<f32>, Option<f32>)> {
    let Some((attention, logits)) = family.softcaps else {
        return Ok((None, None));
    };
    let cap = |key, default: Option<f64>| -> Result<Option<f32>> {
        let cap = match fields.optional(key) {
            Some(_) => Some(fields.positive(key, MAX_SCALE)?),
            None => default.filter(|_| !fields.has(key)),
        };
        #[expect(clippy::cast_possible_truncation, reason = "used in f32")]
        Ok(cap.map(|cap| cap as f32))
    };
    Ok((cap("attn_logit_softcapping", attention)?, cap("final_logit_softcapping", logits)?))
}

fn experts(fields: &Fields, family: &Family, blocks: usize) -> Result<Option<Experts>> {
    let Some(defaults) = family.experts else {
        return Ok(None);
    };
    let key = if fields.optional("num_local_experts").is_some() { "num_local_experts" } else { "num_experts" };
    let count = fields.size(key, MAX_EXPERTS)?;
    if count * blocks > MAX_EXPERTS_OF_MODEL {
        let problem = format!("{count} experts in each of {blocks} blocks are more than {MAX_EXPERTS_OF_MODEL}");
        return Err(fields.error(key, problem));
    }
    let per_token = fields.size_or("num_experts_per_tok", MAX_EXPERTS, defaults.per_token)?;
    if per_token > count {
        let problem = format!("a token cannot use {per_token} of {count} experts");
        return Err(fields.error("num_experts_per_tok", problem));
    }
    Ok(Some(Experts {
        count,
        per_token,
        intermediate_size: fields.size(defaults.intermediate_size, MAX_WIDTH)?,
        is_normalized: !defaults.is_norm_configured || fields.truth_or("norm_topk_prob", false)?,
    }))
}

fn layers(fields: &Fields, family: &Family, count: usize, has_experts: bool) -> Result<Vec<Layer>> {
    let rotated = match (family.positions, family.no_rope_interval) {
        (Some(_), _) => vec![false; count],
        (None, None) => vec![true; count],
        (None, Some(interval)) => {
            if let Some(node) = fields.optional("no_rope_layers") {
                one_each(node, count, |node| Ok(node.whole()? != 0))?
            } else {
                all_but_every(fields.size_or("no_rope_layer_interval", MAX_BLOCKS, interval)?, count)
            }
        }
    };
    let windowed = windowed(fields, family, &rotated)?;
    let sparse_step = if has_experts { fields.size_or("decoder_sparse_step", MAX_BLOCKS, 1)? } else { 1 };
    let dense = match fields.optional("mlp_only_layers") {
        Some(node) if has_experts => node.elements()?.iter().map(Node::whole).collect::<Result<Vec<_>>>()?,
        _ => Vec::new(),
    };
    let layer = |at: usize| {
        let window = windowed[at];
        // The second RoPE is that of the blocks with a window.
        let rope = usize::from(window.is_some() && family.local_rope_theta.is_some());
        Layer {
            window,
            rope: rotated[at].then_some(rope),
            has_experts: has_experts && (at + 1).is_multiple_of(sparse_step) && !dense.contains(&(at as u64)),
        }
    };
    Ok((0..count).map(layer).collect())
}

/// The window of each block.
fn windowed(fields: &Fields, family: &Family, rotated: &[bool]) -> Result<Vec<Option<usize>>> {
    let count = rotated.len();
    let types = fields.optional("layer_types");
    if let (Some(node), None | Some(Windows { blocks: Windowed::All, .. })) = (types, family.windows) {
        let kinds = node.elements()?.iter().map(Node::text).collect::<Result<HashSet<_>>>()?;
        if kinds.len() > 1 {
            let family = family.architecture;
            return Err(node.error(format!("blocks of several types are not supported in `{family}`, which has one")));
        }
    }
    let Some(Windows { is_switched, usual, blocks }) = family.windows else {
        return Ok(vec![None; count]);
    };
    let is_used = !is_switched || fields.truth_or("use_sliding_window", false)?;
    let size = match (is_used, fields.optional("sliding_window")) {
        (false, _) => None,
        (true, Some(_)) => Some(fields.size("sliding_window", MAX_CONTEXT)?),
        (true, None) => usual.filter(|_| !fields.has("sliding_window")),
    };
    let slides_by_type = |node: &Node| match node.text()?.as_str() {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => {
            let other = printable(other);
            Err(node.error(format!(
                "attention of type `{other}` is not supported; `full_attention` and `sliding_attention` are"
            )))
        }
    };
    let slides = match (blocks, types) {
        (Windowed::All, _) | (Windowed::AllOrTypes, None) => vec![true; count],
        (_, Some(node)) => one_each(node, count, slides_by_type)?,
        (Windowed::AllButEvery(n), None) => {
            all_but_every(fields.size_or("sliding_window_pattern", MAX_BLOCKS, n)?, count)
        }
        (Windowed::Upper, None) => {
            let first = fields.optional("max_window_layers").map_or(Ok(28), |node| node.whole())?;
            (0..count as u64).map(|at| at >= first).collect()
        }
        (Windowed::WithoutRope, None) => rotated.iter().map(|rotated| !rotated).collect(),
    };
    Ok(slides.into_iter().map(|slides| size.filter(|_| slides)).collect())
}

/// For each block whether it is none of every n-th ones.
fn all_but_every(n: usize, count: usize) -> Vec<bool> {
    (1..=count).map(|nth| !nth.is_multiple_of(n)).collect()
}

/// The elements of a list that has one for each block.
fn one_each<T>(list: Node, count: usize, read: impl Fn(&Node) -> Result<T>) -> Result<Vec<T>> {
    let elements = list.elements()?;
    if elements.len() != count {
        return Err(list.error(format!("the list has {} elements for {count} blocks", elements.len())));
    }
    elements.iter().map(read).collect()
}

/// The family by `model_type`, as Transformers goes by it, or where there is none by `architectures`.
fn family(fields: &Fields) -> Result<&'static Family> {
    let names = match fields.optional("architectures") {
        Some(node) => node.elements()?.iter().map(Node::text).collect::<Result<Vec<_>>>()?,
        None => Vec::new(),
    };
    let by_name = FAMILIES.iter().find(|family| names.iter().any(|name| name == family.architecture));
    let supported = || format!("is not supported; supported: {}", families::supported());
    let Some(node) = fields.optional("model_type") else {
        return by_name.ok_or_else(|| match fields.optional("architectures") {
            Some(node) => node.error(format!("architecture {} {}", shown(&names), supported())),
            None => fields.error("model_type", "`model_type` is missing"),
        });
    };
    let model_type = node.text()?;
    FAMILIES.iter().find(|family| family.model_type == model_type).ok_or_else(|| {
        let model_type = printable(&model_type);
        match (by_name, fields.optional("architectures")) {
            (Some(family), _) => node.error(format!(
                "model type `{model_type}` {}; it counts, not the architecture `{}` beside it",
                supported(),
                family.architecture
            )),
            (None, Some(node)) => node.error(format!("architecture {} {}", shown(&names), supported())),
            (None, None) => node.error(format!("model type `{model_type}` {}", supported())),
        }
    })
}

/// The architectures where none of them is that of `family`.
fn other_architectures(fields: &Fields, family: &Family) -> Result<Option<String>> {
    let Some(node) = fields.optional("architectures") else { return Ok(None) };
    let names = node.elements()?.iter().map(Node::text).collect::<Result<Vec<_>>>()?;
    let is_other = !names.is_empty() && names.iter().all(|name| name != family.architecture);
    Ok(is_other.then(|| shown(&names)))
}

fn shown(names: &[String]) -> String {
    first_five(names.iter().map(|name| printable(name)))
}

#[cfg(test)]
mod tests;
