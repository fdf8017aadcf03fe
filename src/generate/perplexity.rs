//! How well a model predicts a text, and how far its predictions are from
//! those of the unquantized model.
//!
//! One token's logits are held at a time. What the unquantized model predicted
//! is kept in a scratch file, as log-probabilities in f16: two bytes for each
//! scored token and each token of the vocabulary.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use half::f16;
use half::slice::HalfFloatSliceExt;
use serde::Serialize;

use crate::bytes::Bytes;
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::fs;
use crate::loader::Model;
use crate::text::Tokenizer;

/// Tokens of a window, unless told otherwise.
pub const DEFAULT_WINDOW: usize = 512;

/// How a text is cut: every window begins with an empty context, and a token
/// is scored in the first window that holds it, unless nothing stands before it there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    length: usize,
    stride: usize,
    start: Vec<u32>,
}

impl Windows {
    /// Windows of `length` tokens, each beginning `stride` tokens behind the last.
    pub fn new(length: usize, stride: usize) -> Result<Self> {
        if length < 2 {
            return Err(Error::usage(format!("a window of {length} tokens has none to score; 2 is the least")));
        }
        if stride == 0 || stride > length {
            return Err(Error::usage(format!("a stride of {stride} is not between 1 and the {length} of a window")));
        }
        Ok(Self { length, stride, start: Vec::new() })
    }

    /// The same with `start` before every window, which is not scored; a context as long as a window still holds it.
    ///
    /// # Errors
    /// It leaves no room for a text.
    pub fn behind(mut self, start: Vec<u32>) -> Result<Self> {
        if start.is_empty() {
            return Ok(self);
        }
        // Nothing runs behind the last token of a window, so that there is room for one before the first.
        let length = self.length.saturating_add(1).checked_sub(start.len()).filter(|length| *length > 0);
        self.length = length.ok_or_else(|| {
            Error::usage(format!("a window of {} tokens has no room behind {} at its start", self.length, start.len()))
        })?;
        self.stride = self.stride.min(self.length);
        self.start = start;
        Ok(self)
    }

    /// The windows of a text of `count` tokens that have tokens to score, and the first of each that is scored.
    fn over(&self, count: usize) -> impl Iterator<Item = (Range<usize>, usize)> + use<> {
        let mut reached = 0;
        let (length, first) = (self.length, usize::from(self.start.is_empty()));
        (0..count).step_by(self.stride).map_while(move |start| {
            let end = count.min(start.saturating_add(length));
            let scored = reached.max(start + first);
            reached = end;
            (scored < end).then_some((start..end, scored))
        })
    }

    /// Tokens that are scored in a text of `count` tokens.
    pub fn scored(&self, count: usize) -> usize {
        self.over(count).map(|(window, scored)| window.end - scored).sum()
    }
}

/// The tokens that `tokenizer` puts before a text: a start token, or none.
///
/// # Errors
/// The tokenizer fails.
pub fn start_tokens(tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    // What it puts behind a text is not meant.
    const TEXT: &str = "a";
    let (bare, mut whole) = (tokenizer.encode(TEXT, false)?, tokenizer.encode(TEXT, true)?);
    let at = (0..=whole.len()).find(|at| whole[*at..].starts_with(&bare)).unwrap_or(0);
    whole.truncate(at);
    Ok(whole)
}

/// What the unquantized model predicted for every scored token.
pub struct Predictions {
    file: File,
    directory: PathBuf,
    row: Vec<f16>,
    likeliest: Vec<usize>,
}

impl Predictions {
    /// Room for the predictions of `scored` tokens in a scratch file in `directory`.
    pub fn new(directory: &Path, scored: usize, vocab_size: usize) -> Result<Self> {
        let file = fs::scratch_file(directory, Self::bytes(scored, vocab_size))?;
        let row = vec![f16::ZERO; vocab_size];
        Ok(Self { file, directory: directory.to_owned(), row, likeliest: Vec::with_capacity(scored) })
    }

    /// Bytes of the scratch file.
    pub fn bytes(scored: usize, vocab_size: usize) -> Bytes {
        Bytes((scored as u64).saturating_mul(vocab_size as u64).saturating_mul(size_of::<f16>() as u64))
    }

    fn offset(&self, at: usize) -> u64 {
        (at * size_of_val(&self.row[..])) as u64
    }

    fn push(&mut self, log_probabilities: &[f32], likeliest: usize) -> Result<()> {
        self.row.convert_from_f32_slice(log_probabilities);
        let offset = self.offset(self.likeliest.len());
        self.likeliest.push(likeliest);
        let written = self.file.write_all_at(bytemuck::cast_slice(&self.row), offset);
        written.map_err(|e| Error::io("write a scratch file in", &self.directory, e))
    }

    /// The log-probabilities at `at` into `log_probabilities`; returns the likeliest token.
    fn read(&mut self, at: usize, log_probabilities: &mut [f32]) -> Result<usize> {
        let offset = self.offset(at);
        let read = self.file.read_exact_at(bytemuck::cast_slice_mut(&mut self.row), offset);
        read.map_err(|e| Error::io("read a scratch file in", &self.directory, e))?;
        self.row.convert_to_f32_slice(log_probabilities);
        Ok(self.likeliest[at])
    }
}

/// What is done with predictions beside scoring them.
pub enum Comparison<'p> {
    /// Nothing.
    Alone,
    /// They are kept.
    Keep(&'p mut Predictions),
    /// They are held against those that were kept for the same text and windows.
    Against(&'p mut Predictions),
}

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// Tokens that were scored.
    pub tokens: usize,
    /// `exp` of the mean negative log-likelihood of a token.
    pub perplexity: f64,
    /// The standard error of the perplexity, tokens taken as independent.
    pub standard_error: f64,
    /// Wall time.
    pub seconds: f64,
    /// The distance from the unquantized model, where that is known.
    pub divergence: Option<Divergence>,
}

/// How far predictions are from the unquantized model's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Divergence {
    /// The mean over tokens of `Σ p · ln(p / q)`, p the unquantized model's probabilities.
    pub mean_kl: f64,
    /// Its standard error.
    pub standard_error: f64,
    /// The share of tokens for which both find the same token likeliest.
    pub same_top: f64,
}

impl Model {
    /// Scores `tokens`, window by window; `on_window` is told how many tokens were run so far.
    ///
    /// # Panics
    /// Predictions to compare with were kept for fewer tokens than are scored.
    pub fn perplexity(
        &mut self,
        tokens: &[u32],
        windows: &Windows,
        mut comparison: Comparison,
        cancel: &Cancel,
        mut on_window: impl FnMut(usize),
    ) -> Result<Perplexity> {
        let start = Instant::now();
        let (mut loss, mut kl, mut same) = (Mean::default(), Mean::default(), 0usize);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (window, scored) in windows.over(tokens.len()) {
            cancel.check()?;
            let mut outcome = Ok(());
            // Nothing stands behind the last token to score its logits by.
            let run = [&windows.start, &tokens[window.start..window.end - 1]].concat();
            self.score(&run, |at, logits| {
                let next = (window.start + at + 1).checked_sub(windows.start.len()).filter(|next| *next >= scored);
                let Some(next) = next.filter(|_| outcome.is_ok()) else { return };
                let likeliest = log_softmax(logits, &mut ours);
                match &mut comparison {
                    Comparison::Alone => {}
                    Comparison::Keep(predictions) => outcome = predictions.push(&ours, likeliest),
                    Comparison::Against(predictions) => {
                        theirs.resize(ours.len(), 0.0);
                        let top = predictions.read(loss.count, &mut theirs);
                        outcome = top.map(|top| same += usize::from(top == likeliest));
                        kl.push(divergence(&theirs, &ours));
                    }
                }
                loss.push(-f64::from(ours[tokens[next] as usize]));
            })?;
            outcome?;
            on_window(window.end);
        }
        if loss.count == 0 {
            return Err(Error::input(format!("the text has {} tokens, none of which can be scored", tokens.len())));
        }
        let perplexity = loss.mean().exp();
        let is_compared = matches!(comparison, Comparison::Against(_));
        Ok(Perplexity {
            tokens: loss.count,
            perplexity,
            standard_error: perplexity * loss.standard_error(),
            seconds: start.elapsed().max(Duration::from_nanos(1)).as_secs_f64(),
            divergence: is_compared.then(|| Divergence {
                mean_kl: kl.mean(),
                standard_error: kl.standard_error(),
                same_top: same as f64 / loss.count as f64,
            }),
        })
    }
}

/// The logarithms of the probabilities that `logits` stand for; returns the likeliest token, the first of equals.
fn log_softmax(logits: &[f32], log_probabilities: &mut Vec<f32>) -> usize {
    let (mut likeliest, mut largest) = (0, f32::NEG_INFINITY);
    for (token, logit) in logits.iter().enumerate() {
        if *logit > largest {
            (likeliest, largest) = (token, *logit);
        }
    }
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - largest).exp())).sum();
    #[expect(clippy::cast_possible_truncation, reason = "at most the logarithm of the vocabulary's size")]
    let log_sum = sum.ln() as f32;
    log_probabilities.clear();
    log_probabilities.extend(logits.iter().map(|logit| (logit - largest) - log_sum));
    likeliest
}

/// `Σ p · ln(p / q)`, from logarithms.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    // What f16 cannot hold as a logarithm has no probability to weigh with.
    let term = |(p, q): (&f32, &f32)| if p.is_finite() { f64::from(p.exp()) * f64::from(p - q) } else { 0.0 };
    p.iter().zip(q).map(term).sum()
}

/// A mean and what it is made of.
#[derive(Default)]
struct Mean {
    count: usize,
    sum: f64,
    squares: f64,
}

impl Mean {
    fn push(&mut self, value: f64) {
        self.count += 1;
        self.sum += value;
        self.squares += value * value;
    }

    fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }

    fn standard_error(&self) -> f64 {
        let variance = self.squares / self.count as f64 - self.mean() * self.mean();
        (variance.max(0.0) / (self.count.max(2) - 1) as f64).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_scored_in_the_first_window_that_can() {
        let windows = |length, stride, count| -> Vec<(Range<usize>, usize)> {
            Windows::new(length, stride).unwrap().over(count).collect()
        };
        assert_eq!(windows(4, 4, 10), [(0..4, 1), (4..8, 5), (8..10, 9)]);
        assert_eq!(windows(4, 4, 9), [(0..4, 1), (4..8, 5)]);
        assert_eq!(windows(4, 2, 9), [(0..4, 1), (2..6, 4), (4..8, 6), (6..9, 8)]);
        assert_eq!(windows(4, 1, 5), [(0..4, 1), (1..5, 4)]);
        assert_eq!(windows(8, 8, 1), []);
        assert_eq!(Windows::new(4, 3).unwrap().scored(100), 99);
        let behind = |start, count| -> Vec<(Range<usize>, usize)> {
            Windows::new(4, 4).unwrap().behind(vec![0; start]).unwrap().over(count).collect()
        };
        assert_eq!(behind(0, 9), [(0..4, 1), (4..8, 5)]);
        assert_eq!(behind(1, 9), [(0..4, 0), (4..8, 4), (8..9, 8)]);
        assert_eq!(behind(3, 5), [(0..2, 0), (2..4, 2), (4..5, 4)]);
        assert!(Windows::new(4, 4).unwrap().behind(vec![0; 5]).is_err());
        let overlapping = Windows::new(4, 2).unwrap().behind(vec![0]).unwrap();
        assert_eq!(overlapping.over(7).collect::<Vec<_>>(), [(0..4, 0), (2..6, 4), (4..7, 6)]);
        assert_eq!(Windows::new(usize::MAX, 1).unwrap().scored(100), 99);
        for (length, stride) in [(1, 1), (4, 0), (4, 5)] {
            assert!(Windows::new(length, stride).is_err(), "{length} {stride}");
        }
    }

    #[test]
    fn divergence_by_hand() {
        let (mut p, mut q) = (Vec::new(), Vec::new());
        assert_eq!(log_softmax(&[0.0, 3f32.ln()], &mut p), 1);
        assert_eq!(log_softmax(&[1.0, 1.0], &mut q), 0);
        // Σ p ln(p/q) with p = (1/4, 3/4), q = (1/2, 1/2).
        let wanted = 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln();
        assert!((divergence(&p, &q) - wanted).abs() < 1e-6);
        assert_eq!(divergence(&q, &q), 0.0);
        assert_eq!(divergence(&[0.0, f32::NEG_INFINITY], &[0.0, -5.0]), 0.0);
    }

    #[test]
    fn standard_errors_by_hand() {
        let mut mean = Mean::default();
        for value in [1.0, 2.0, 3.0, 4.0] {
            mean.push(value);
        }
        assert_eq!(mean.mean(), 2.5);
        assert!((mean.standard_error() - (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
    }
}
