//! The arguments, and nothing but the arguments.

mod answers;

use std::convert::Infallible;
use std::error::Error;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use evenkeel::{Bytes, DeviceId, KvDtype, Quantize, Scheme, Strategy};

#[cfg(feature = "serve")]
pub use answers::ServeArguments;
pub use answers::{BatchArguments, ChatArguments, InputFormat, RoomArguments};

const EXAMPLES: &str = "\
Examples:
  evenkeel plan meta-llama/Llama-3.1-8B --quantize int4 --device cuda:0=8GiB --device cpu=32GiB
  evenkeel generate --model ./Llama-3.1-8B --quantize int4 --prompt \"Ownership is\"
  evenkeel plan ./Llama-3.1-8B --device-map device_map.json";

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 bad input, 2 usage, 3 does not fit, 101 a bug, 130 interrupted";

/// Loads a Hugging Face checkpoint onto the devices that are there, after an exact plan.
#[derive(Debug, Parser)]
#[command(name = "evenkeel", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// What is shown and how.
    #[command(flatten)]
    pub output: OutputArguments,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer the lines of a file, many at once.
    Batch(Box<BatchArguments>),
    /// Talk with a model on the terminal.
    Chat(Box<ChatArguments>),
    /// Show the devices of this machine: GPUs, CPU and disk.
    Devices(DevicesArguments),
    /// Generate text behind a prompt.
    Generate(Box<GenerateArguments>),
    /// Measure how well a model predicts a text, and what a scheme costs.
    Perplexity(Box<PerplexityArguments>),
    /// Show what would go where, and whether it fits; reads no weights, or a few rows of them.
    Plan(Box<PlanArguments>),
    /// Write a checkpoint whose weights are quantized, which loads faster.
    Quantize(Box<QuantizeArguments>),
    /// Answer over HTTP, in the form of OpenAI's.
    #[cfg(feature = "serve")]
    Serve(Box<ServeArguments>),
    /// Run a tokenizer or a template for another process, on standard input and output.
    #[command(hide = true)]
    Sandbox,
}

impl Command {
    pub fn threads(&self) -> Option<NonZeroUsize> {
        match self {
            Self::Devices(_) | Self::Plan(_) | Self::Sandbox => None,
            Self::Batch(arguments) => arguments.threads.threads,
            Self::Chat(arguments) => arguments.threads.threads,
            Self::Generate(arguments) => arguments.threads.threads,
            Self::Perplexity(arguments) => arguments.threads.threads,
            Self::Quantize(arguments) => arguments.threads.threads,
            #[cfg(feature = "serve")]
            Self::Serve(arguments) => arguments.threads.threads,
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Messages")]
pub struct OutputArguments {
    /// Show errors and results only.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Colour messages.
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t = When::Auto)]
    pub color: When,
    /// Show bars on standard error.
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t = When::Auto)]
    pub progress: When,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// On a terminal.
    Auto,
    Always,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArguments {
    /// A directory with a checkpoint, or a repository on the Hub (`ORG/NAME`).
    #[arg(value_name = "MODEL", required_unless_present = "model_flag")]
    model: Option<String>,
    /// The same as a flag.
    #[arg(long = "model", value_name = "MODEL", conflicts_with = "model")]
    model_flag: Option<String>,
    /// Branch, tag or commit on the Hub.
    #[arg(long, value_name = "REVISION", default_value = "main")]
    pub revision: String,
}

impl ModelArguments {
    pub fn model(&self) -> &str {
        // Clap requires one of the two.
        self.model.as_deref().or(self.model_flag.as_deref()).unwrap_or_default()
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Placement")]
pub struct PlacementArguments {
    /// `none`, `int8`, `int4` or `nl4` for the whole model, where the last two keep embedding and head in int8;
    /// `auto` for the most bits that fit without leaving the GPUs: where only int4 does, projections of a
    /// checkpoint in a local directory get more as far as there is room, by the error that is measured on a few rows
    /// of each [default: the map's, or none].
    #[arg(long, value_name = "SCHEME")]
    pub quantize: Option<Quantize>,
    /// The type of the KV cache's elements: `f32`, `f16`, `bf16` or `int8` [default: the map's, or f16].
    #[arg(long, value_name = "TYPE")]
    pub kv_cache: Option<KvDtype>,
    /// A JSON file that says which module goes where; `auto`; a device for the whole model, as `cpu` or `cuda:0`;
    /// or a placement by its name here or in Transformers.
    #[arg(long, value_name = "auto|DEVICE|PLACEMENT|FILE", default_value = "auto")]
    pub device_map: Places,
    /// Use a device map that was made for another model.
    #[arg(long)]
    pub any_model: bool,
    /// How modules are placed under `auto`: `balanced` (the fullest GPU is as little full as can
    /// be), `packed` (the fewest GPUs), `sequential` (each in turn), `fastest` (the least predicted
    /// time for a token), or as Transformers would place them: `hf-auto`, `hf-sequential`, `hf-balanced_low_0`
    /// [default: balanced].
    #[arg(long, value_name = "PLACEMENT")]
    pub placement: Option<Strategy>,
    /// A device's budget, as `cpu=8GiB`; repeat it or separate by commas. `cpu=0` keeps weights out of host memory,
    /// which what is computed with still takes.
    #[arg(long, value_name = "DEVICE=SIZE", value_delimiter = ',', value_parser = budget)]
    pub max_memory: Vec<(DeviceId, Bytes)>,
    /// Memory left free on each device.
    #[arg(long, value_name = "SIZE", default_value = "512MiB")]
    pub reserve: Bytes,
    /// The longest context, prompt and answer together [default: the map's, or the model's up to 4096].
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// The directory for weights that go on the disk [default: $TMPDIR, or /var/tmp].
    #[arg(long, value_name = "DIRECTORY")]
    pub offload_dir: Option<PathBuf>,
}

/// What `--device-map` names.
#[derive(Clone, Debug)]
pub enum Places {
    Auto,
    Device(DeviceId),
    Strategy(Strategy),
    File(PathBuf),
}

impl FromStr for Places {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match (text, text.parse(), text.parse()) {
            ("auto", ..) => Self::Auto,
            ("balanced_low_0", ..) => Self::Strategy(Strategy::HfBalancedLowZero),
            (_, Ok(device), _) => Self::Device(device),
            (_, _, Ok(strategy)) => Self::Strategy(strategy),
            _ => Self::File(text.into()),
        })
    }
}

fn budget(text: &str) -> Result<(DeviceId, Bytes), Box<dyn Error + Send + Sync>> {
    let (device, size) = text.split_once('=').ok_or("write it like `cpu=8GiB`")?;
    Ok((device.trim().parse()?, size.parse()?))
}

#[derive(Debug, Args)]
pub struct DevicesArguments {
    /// Hold every kernel of each GPU against plain scalar code, copies between GPUs against what was sent, and the
    /// logits and the memory of small models against the CPU's and the plan's; takes up to a minute.
    #[arg(long)]
    pub verify: bool,
    /// The directory for weights that go on the disk [default: $TMPDIR, or /var/tmp].
    #[arg(long, value_name = "DIRECTORY", help_heading = "Placement")]
    pub offload_dir: Option<PathBuf>,
    /// How the devices are written to standard output.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Format::Text, help_heading = "Output")]
    pub format: Format,
    /// Write them again every so many seconds, until interrupted.
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "2",
        value_parser = clap::value_parser!(u64).range(1..=86_400),
        help_heading = "Output"
    )]
    pub watch: Option<u64>,
}

/// What is done where a device has less free than when the plan was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnShortfall {
    /// The load fails.
    Fail,
    /// The plan is made again, once.
    Replan,
}

#[derive(Debug, Args)]
pub struct GenerateArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    #[command(flatten)]
    pub prompt: PromptArguments,
    #[command(flatten)]
    pub placement: PlacementArguments,
    /// What to do where a GPU has less free than when the plan was made.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = OnShortfall::Fail, help_heading = "Placement")]
    pub on_shortfall: OnShortfall,
    #[command(flatten)]
    pub threads: ThreadsArguments,
    #[command(flatten)]
    pub sampling: SamplingArguments,
    /// `text`, or JSON Lines: an object for each token, then a summary.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Format::Text, help_heading = "Output")]
    pub format: Format,
    /// Show load time and where it went, tokens per second, and planned and measured memory on standard error.
    #[arg(long, help_heading = "Output")]
    pub stats: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Prompt")]
pub struct PromptArguments {
    /// The prompt; `-` reads standard input, as does a pipe without this flag.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// A file whose content, to the byte, is the prompt.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,
    /// Put the prompt into the checkpoint's chat template, as the user's message.
    #[arg(long)]
    pub chat: bool,
    /// The system message before it.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Threads")]
pub struct ThreadsArguments {
    /// Threads that compute on the CPU [default: one on each core].
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<NonZeroUsize>,
}

/// The most threads for each core that this process may use.
const THREADS_PER_CORE: usize = 4;

fn threads(text: &str) -> Result<NonZeroUsize, Box<dyn Error + Send + Sync>> {
    let most = std::thread::available_parallelism().map_or(1, usize::from).saturating_mul(THREADS_PER_CORE);
    let threads: NonZeroUsize = text.parse()?;
    if threads.get() > most {
        return Err(format!("{most} threads are the most here, {THREADS_PER_CORE} for each core").into());
    }
    Ok(threads)
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArguments {
    /// The most tokens to generate [default: the model's own, or 256, or what the context leaves].
    #[arg(long, value_name = "TOKENS")]
    pub max_new_tokens: Option<usize>,
    /// 0 always takes the likeliest token [default for this and the next four: as generation_config.json says where
    /// it has `do_sample`, or 0].
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Choose among the K likeliest tokens.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Choose among the likeliest tokens that together reach this probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Choose among tokens at least this probable, as a share of the likeliest one's probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f64>,
    /// Divide the logits of tokens that occurred by this.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// The same seed gives the same text on the same devices.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// End before this text; repeat it for several.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Go on behind an end-of-text token.
    #[arg(long)]
    pub ignore_eos: bool,
}

#[derive(Debug, Args)]
pub struct PerplexityArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    /// The text, a file in UTF-8.
    #[arg(long, value_name = "FILE", help_heading = "Text")]
    pub text: PathBuf,
    /// Tokens from the beginning of a window to that of the next; those that two windows share are
    /// context in the second [default: the window, which `--context` sets, or 512].
    #[arg(long, value_name = "TOKENS", help_heading = "Text")]
    pub stride: Option<usize>,
    /// Leave out the start token that the tokenizer puts before a text, which stands before every window otherwise.
    #[arg(long, help_heading = "Text")]
    pub no_start_token: bool,
    /// Score the beginning of the text only.
    #[arg(long, value_name = "TOKENS", help_heading = "Text")]
    pub max_tokens: Option<usize>,
    /// Load the model unquantized, then in each of these schemes or by `auto`, and compare. What the first
    /// predicts is kept in `--offload-dir`, two bytes for each token of text and vocabulary.
    #[arg(
        long,
        value_name = "SCHEMES",
        value_delimiter = ',',
        conflicts_with = "quantize",
        help_heading = "Quantization"
    )]
    pub compare: Vec<Quantize>,
    #[command(flatten)]
    pub placement: PlacementArguments,
    #[command(flatten)]
    pub threads: ThreadsArguments,
    /// How the figures are written to standard output.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Format::Text, help_heading = "Output")]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct QuantizeArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    /// `int8`, `int4` or `nl4` for the whole model, where the last two keep embedding and head in int8.
    #[arg(long, value_name = "SCHEME", help_heading = "Quantization")]
    pub quantize: Scheme,
    #[command(flatten)]
    pub threads: ThreadsArguments,
    /// The directory to make.
    #[arg(long, value_name = "DIRECTORY", help_heading = "Output")]
    pub output: PathBuf,
    /// How the weights are written. `compressed-tensors` takes `int8` and `int4`, and keeps embedding and head.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = PackedFormat::Evenkeel, help_heading = "Output")]
    pub format: PackedFormat,
    /// The most bytes of tensors in a file, unless one is larger by itself.
    #[arg(long, value_name = "SIZE", default_value = "5GB", help_heading = "Output")]
    pub max_shard_size: Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PackedFormat {
    /// As evenkeel loads them.
    Evenkeel,
    /// In the form of compressed-tensors, for vLLM and Transformers.
    CompressedTensors,
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags are independent of each other")]
pub struct PlanArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    #[command(flatten)]
    pub placement: PlacementArguments,
    /// Plan for this device in place of the machine's own, as `cuda:0=24GiB`, with its bandwidth as
    /// `cuda:0=24GiB@936GB/s`, or with a GPU's name as `cuda:0=24GiB@RTX 3090`; repeat it for several.
    #[arg(long, value_name = "DEVICE=SIZE", value_delimiter = ',', help_heading = "Placement")]
    pub device: Vec<String>,
    /// Sequences at once [default: the map's, or 1].
    #[arg(long, value_name = "N", help_heading = "Placement")]
    pub batch: Option<usize>,
    /// What all sequences share to keep keys and values in, as `4GiB`; room for the context of each by default.
    #[arg(long, value_name = "SIZE", help_heading = "Placement")]
    pub kv_memory: Option<Bytes>,
    /// Plan for the longest context that fits without leaving the GPUs for it.
    #[arg(long, conflicts_with_all = ["context", "max_batch"], help_heading = "Placement")]
    pub max_context: bool,
    /// Plan for the most sequences at once that fit without leaving the GPUs for them.
    #[arg(long, conflicts_with = "batch", help_heading = "Placement")]
    pub max_batch: bool,
    /// Show bits a weight and the relative error of each kind of module, which is measured on a few rows of the
    /// weights where these are in a local directory.
    #[arg(long, short, help_heading = "Output")]
    pub verbose: bool,
    /// Write the plan as a device map.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    /// Replace the file that `--output` names.
    #[arg(long, requires = "output", help_heading = "Output")]
    pub force: bool,
    /// Hold a device map against the model and the devices: exit 0 if it fits, 3 if not.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["device_map", "output"], help_heading = "Output")]
    pub check: Option<PathBuf>,
    /// How the plan is written to standard output.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = PlanFormat::Text, help_heading = "Output")]
    pub format: PlanFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlanFormat {
    /// A table; on a terminal with a bar for each device.
    Text,
    /// Everything, sizes in bytes.
    Json,
    /// The plain dictionary that Transformers takes as `device_map`.
    Hf,
    /// A picture.
    Svg,
    /// A page with the picture and the table.
    Html,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_flag_has_help_and_a_value_name() {
        Arguments::command().debug_assert();
        for command in Arguments::command().get_subcommands() {
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
        }
    }
}
