//! What a caller may choose about a plan.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::bisect;
use crate::bytes::{Bytes, MIB};
use crate::checkpoint::Checkpoint;
use crate::device_map::{DeviceMap, MAX_BATCH, MaxMemory};
use crate::error::{Error, Hint, ParseError, Result, Setting};
use crate::footprint::{Extent, State};
use crate::model_config::{Layer, ModelConfig};
use crate::name::{named, unknown};
use crate::pool::Pool;
use crate::quant::{KvDtype, QuantizeRules, Scheme};

/// Bytes of every device that a plan leaves free, unless told otherwise.
pub const DEFAULT_RESERVE: Bytes = Bytes(512 * MIB);
/// Rules that are still listed one by one.
const MOST_RULES: usize = 5;
/// Tokens of a prompt that are taken at once, unless told otherwise.
pub const DEFAULT_CHUNK: usize = 512;
/// The longest context that is planned unless a longer one is asked for.
pub const DEFAULT_CONTEXT: usize = 4096;

/// What a caller may choose. A choice that is left open is the device map's, else the default.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// The schemes; `none` for the whole model by default.
    pub quantize: Option<Quantize>,
    /// Longest context in tokens; the model's own by default, at most [`DEFAULT_CONTEXT`].
    pub context: Option<usize>,
    /// Sequences at once; 1 by default.
    pub batch: Option<usize>,
    /// What all sequences share to keep keys and values in; room for the longest context of each by default.
    pub kv_memory: Option<Bytes>,
    /// Tokens of a prompt that are taken at once, at most the context; [`DEFAULT_CHUNK`] by default.
    pub chunk: Option<usize>,
    /// The type of the KV cache's elements; f16 by default.
    pub kv_cache: Option<KvDtype>,
    /// Bytes left free on GPUs and host; [`DEFAULT_RESERVE`] by default.
    pub reserve: Option<Bytes>,
    /// Budgets that override what is free, never above it.
    pub max_memory: Option<MaxMemory>,
    /// Where the modules go; placed automatically by default.
    pub device_map: Option<DeviceMap>,
    /// Whether the map may have been made for another model.
    pub any_model: bool,
    /// How modules are placed automatically.
    pub strategy: Strategy,
    /// Whether the plan lists what every other way to place the model would give.
    pub alternatives: bool,
    /// Whether the plan lists the bits and the measured error of each kind of module.
    pub kinds: bool,
    /// The directory that keeps the errors of schemes that were measured; without one they are
    /// measured anew, and nothing is written.
    pub cache: Option<PathBuf>,
    /// The threads that measure errors.
    pub pool: Arc<Pool>,
}

/// How modules are placed where no device map says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// The fullest GPU has the least share of its memory taken.
    #[default]
    Balanced,
    /// As few GPUs as hold the model.
    Packed,
    /// Each device is filled in turn.
    Sequential,
    /// The least predicted time for a token.
    Fastest,
    /// What Transformers chooses for `device_map="auto"`, which is `balanced`: every GPU but the last is limited
    /// to a share of the model.
    HfAuto,
    /// What Transformers chooses for `balanced_low_0`: with as little as possible on GPU 0.
    HfBalancedLowZero,
    /// What Transformers chooses for `sequential`: every GPU is filled in turn.
    HfSequential,
}

impl Strategy {
    /// Whether Transformers is asked.
    pub fn is_transformers(self) -> bool {
        matches!(self, Self::HfAuto | Self::HfBalancedLowZero | Self::HfSequential)
    }
}

named!(Strategy, "a placement", {
    Balanced => "balanced",
    Packed => "packed",
    Sequential => "sequential",
    Fastest => "fastest",
    HfAuto => "hf-auto",
    HfBalancedLowZero => "hf-balanced_low_0",
    HfSequential => "hf-sequential",
});

/// How the schemes are chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quantize {
    /// One scheme for the whole model: that of the most bits with which no
    /// more leaves the GPUs than must. Where that is the one of the fewest bits, and the
    /// checkpoint is in a local directory, projections get more bits as far as there is room,
    /// so that the error that is measured on a few rows of each is the least.
    Auto,
    /// As these rules say.
    Rules(QuantizeRules),
}

impl From<Scheme> for Quantize {
    fn from(scheme: Scheme) -> Self {
        Self::Rules(QuantizeRules::whole_model(scheme))
    }
}

impl From<Scheme> for Option<Quantize> {
    fn from(scheme: Scheme) -> Self {
        Some(scheme.into())
    }
}

impl FromStr for Quantize {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<Scheme>() {
            Ok(scheme) => Ok(scheme.into()),
            Err(_) if text == "auto" => Ok(Self::Auto),
            Err(_) => {
                let names: Vec<_> = Scheme::ALL.into_iter().map(Scheme::name).chain(["auto"]).collect();
                Err(unknown(text, "a scheme", &names))
            }
        }
    }
}

impl fmt::Display for Quantize {
    /// `auto`, or the rules with those of single modules behind that of the whole model; of many the number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Rules(rules) => {
                let count = rules.iter().count();
                if count > MOST_RULES {
                    return write!(f, "mixed by {count} rules");
                }
                let rule = |(path, scheme)| format!("{path} {scheme}").trim_start().to_owned();
                f.write_str(&rules.iter().map(rule).collect::<Vec<_>>().join(", "))
            }
        }
    }
}

/// What a plan is made under: the caller's choices, else the map's, else the defaults.
pub struct Conditions {
    pub quantize: QuantizeRules,
    pub extent: Extent,
    pub kv_cache: KvDtype,
    pub max_memory: MaxMemory,
    pub reserve: Bytes,
}

impl Conditions {
    /// The conditions under `options`, in which `auto` has been decided, for a model whose
    /// embedding is at `embedding`. What is packed already stays so.
    pub fn of(checkpoint: &Checkpoint, embedding: &str, options: &PlanOptions) -> Result<Self> {
        let map = options.device_map.as_ref();
        let longest = checkpoint.config.max_position_embeddings;
        let quantize = match &options.quantize {
            Some(Quantize::Rules(rules)) => Some(rules.clone()),
            _ => map.and_then(|map| map.quantize.clone()),
        };
        let quantize = quantize.map(|rules| rules.for_embedding(embedding));
        let quantize = match (QuantizeRules::of_checkpoint(&checkpoint.config)?, quantize) {
            (Some(packed), Some(wanted)) if packed != wanted => {
                let (packed, wanted) = (Quantize::Rules(packed), Quantize::Rules(wanted));
                return Err(Error::usage(format!(
                    "`{}` is quantized already: {packed}; it cannot be loaded as {wanted}",
                    checkpoint.name
                ))
                .hint(Hint::naming(
                    "leave {} out, or name the checkpoint that it was made from",
                    [Setting::Quantize(None)],
                )));
            }
            (Some(packed), _) => packed,
            (None, wanted) => wanted.unwrap_or_else(|| QuantizeRules::whole_model(Scheme::None)),
        };
        let context = options.context.or_else(|| map?.context).unwrap_or(longest.min(DEFAULT_CONTEXT));
        if context > longest {
            return Err(Error::usage(format!(
                "a context of {context} tokens is longer than the {longest} that `{}` was made for",
                checkpoint.name
            ))
            .hint(Hint::naming("{} is the longest", [Setting::Context(longest)])));
        }
        let chunk = options.chunk.unwrap_or(DEFAULT_CHUNK).min(context);
        let sequences = options.batch.or_else(|| map?.batch).unwrap_or(1);
        if chunk == 0 || sequences == 0 {
            return Err(Error::usage("context, chunk and batch must be at least 1"));
        }
        if sequences > MAX_BATCH {
            return Err(Error::usage(format!("a batch of {sequences} is above {MAX_BATCH}, which is the most")));
        }
        // A step has room for a token of each.
        let extent = Extent::new(context, chunk.max(sequences), sequences);
        let kv_cache = options.kv_cache.or_else(|| map?.kv_cache).unwrap_or_default();
        let extent = match options.kv_memory.or_else(|| map?.kv_memory) {
            Some(memory) => sharing(memory, &checkpoint.config, extent, kv_cache)?,
            None => extent,
        };
        Ok(Self {
            quantize,
            extent,
            kv_cache,
            max_memory: options.max_memory.clone().or_else(|| map?.max_memory.clone()).unwrap_or_default(),
            reserve: options.reserve.unwrap_or(DEFAULT_RESERVE),
        })
    }
}

/// `extent` with as many pages as `memory` holds beside what each sequence keeps by itself, but no more than sequences
/// can use.
fn sharing(memory: Bytes, config: &ModelConfig, extent: Extent, dtype: KvDtype) -> Result<Extent> {
    let kept = |pages| {
        let extent = Extent { pages, ..extent };
        let state = |layer: &Layer| State::new(config, *layer, extent, dtype).map(|state| state.bytes());
        config.layers.iter().map(state).sum::<Option<Bytes>>()
    };
    let fits = |pages| kept(pages).is_some_and(|kept| kept <= memory);
    let one = Extent::pages_of(extent.context);
    if !fits(one) {
        let needed = kept(one).map_or_else(|| "more than can be planned".to_owned(), |bytes| bytes.to_string());
        return Err(Error::usage(format!(
            "{memory} for keys and values do not hold a context of {} tokens, which takes {needed}",
            extent.context
        ))
        .hint(Hint::naming("a shorter context takes less: {}", [Setting::Context(extent.context.div_ceil(2))])));
    }
    let pages = bisect(one, extent.pages, |pages| Ok(fits(pages)))?;
    Ok(Extent { pages, ..extent })
}
