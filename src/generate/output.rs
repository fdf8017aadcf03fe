//! What is told of a sequence as its tokens come.

use super::{Finish, GenerateOptions, GenerateReport, Logprobs, Piece};
use crate::error::Result;
use crate::text::{TextStream, Tokenizer};

/// The text of a sequence, and why it ends.
pub struct Output {
    stream: TextStream,
    pub options: GenerateOptions,
    /// Interrupted, unless it has ended otherwise.
    pub report: GenerateReport,
}

impl Output {
    pub fn new(prompt: &[u32], options: GenerateOptions) -> Self {
        let report = GenerateReport {
            prompt_tokens: prompt.len(),
            generated_tokens: 0,
            prefill_seconds: 0.0,
            decode_seconds: 0.0,
            finish: Finish::Interrupted,
            launched_apart: None,
        };
        Self { stream: TextStream::new(prompt, options.stop.clone()), options, report }
    }

    /// The piece of a token, and whether it is the last one.
    pub fn take(
        &mut self,
        (token, logprobs): (u32, Option<Logprobs>),
        tokenizer: &Tokenizer,
        eos_token_ids: &[u32],
        context: usize,
    ) -> Result<(Piece, bool)> {
        let Self { stream, options, report } = self;
        report.generated_tokens += 1;
        let is_end = !options.ignore_eos && eos_token_ids.contains(&token);
        let (text, is_stopped) = if is_end { Default::default() } else { stream.push(token, tokenizer)? };
        let finish = if is_end {
            Some(Finish::EndOfText)
        } else if is_stopped {
            Some(Finish::Stop)
        } else if options.max_new_tokens == Some(report.generated_tokens) {
            Some(Finish::MaxNewTokens)
        } else if report.prompt_tokens + report.generated_tokens > context {
            Some(Finish::Context)
        } else {
            None
        };
        report.finish = finish.unwrap_or(report.finish);
        Ok((Piece { token: Some(token), text, logprobs }, finish.is_some()))
    }

    /// The text that was held back, once there is no more.
    pub fn rest(&mut self, tokenizer: &Tokenizer) -> Result<Option<Piece>> {
        let text = self.stream.finish(tokenizer)?;
        Ok((!text.is_empty()).then_some(Piece { token: None, text, logprobs: None }))
    }
}
