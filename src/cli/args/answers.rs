//! The arguments of what answers, once or many times.

#[cfg(feature = "serve")]
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use evenkeel::Bytes;

use super::{ModelArguments, PlacementArguments, SamplingArguments, ThreadsArguments};

/// What there is room for.
#[derive(Debug, Args)]
pub struct RoomArguments {
    /// Sequences at once [default: as many as fit without leaving the GPUs for them, at most 64].
    #[arg(long, value_name = "N", help_heading = "Placement")]
    pub batch: Option<usize>,
    /// What all sequences share to keep keys and values in, as `4GiB`; room for the context of each by default.
    #[arg(long, value_name = "SIZE", help_heading = "Placement")]
    pub kv_memory: Option<Bytes>,
}

#[derive(Debug, Args)]
pub struct ChatArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    /// What the model is told before all else.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Conversation")]
    pub system: Option<String>,
    #[command(flatten)]
    pub placement: PlacementArguments,
    #[command(flatten)]
    pub threads: ThreadsArguments,
    #[command(flatten)]
    pub sampling: SamplingArguments,
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags are independent of each other")]
pub struct BatchArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    /// A file with a request a line, or `-` for standard input.
    #[arg(long, value_name = "FILE", help_heading = "Lines")]
    pub input: PathBuf,
    /// `jsonl`: requests as in OpenAI's batch files (`custom_id`, `method`, `url`, `body`), or bodies with a `prompt` or
    /// `messages`; `text`: a prompt a line.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = InputFormat::Jsonl, help_heading = "Lines")]
    pub input_format: InputFormat,
    /// Put each line of a text into the model's chat template, as what the user says.
    #[arg(long, help_heading = "Lines")]
    pub chat: bool,
    /// The file for an answer or an error a line, as they come, or `-` for standard output.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub output: PathBuf,
    /// Answer only lines that have no answer in the output yet, and write behind those that are there.
    #[arg(long, conflicts_with = "force", help_heading = "Output")]
    pub resume: bool,
    /// Replace the output.
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    #[command(flatten)]
    pub placement: PlacementArguments,
    #[command(flatten)]
    pub room: RoomArguments,
    /// As many sequences at once as fit, which is the default.
    #[arg(long, conflicts_with = "batch", help_heading = "Placement")]
    pub max_batch: bool,
    #[command(flatten)]
    pub threads: ThreadsArguments,
    /// How lines are answered that say nothing of it.
    #[command(flatten)]
    pub sampling: SamplingArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InputFormat {
    Jsonl,
    Text,
}

#[cfg(feature = "serve")]
#[derive(Debug, Args)]
pub struct ServeArguments {
    #[command(flatten)]
    pub model: ModelArguments,
    #[command(flatten)]
    pub placement: PlacementArguments,
    #[command(flatten)]
    pub room: RoomArguments,
    #[command(flatten)]
    pub threads: ThreadsArguments,
    /// Where to listen; a port of 0 takes one that is free.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8080", help_heading = "Server")]
    pub listen: SocketAddr,
    /// What clients have to send as `Authorization: Bearer KEY`; others see it here, and not in the variable
    /// EVENKEEL_API_KEY, which does the same.
    #[arg(long, value_name = "KEY", help_heading = "Server")]
    pub api_key: Option<String>,
    /// Let everybody ask who reaches an address that is not of this machine alone.
    #[arg(long, conflicts_with = "api_key", help_heading = "Server")]
    pub no_api_key: bool,
    /// Requests that wait for room at most; more are refused with status 429.
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Server")]
    pub max_waiting: usize,
    /// The name that the model goes by [default: the checkpoint's].
    #[arg(long, value_name = "NAME", help_heading = "Server")]
    pub served_model_name: Option<String>,
}
