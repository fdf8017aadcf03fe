//! Sequences, and the steps that bring them forward.

mod logprobs;
mod pages;
mod sampling;
mod scheduler;
mod sequence;

use std::sync::Arc;

use crate::backend::{Chosen, Pipeline, Run};
use crate::error::{Error, Hint, Result, Setting};
use crate::footprint::{Extent, LOGIT_ROWS};
use crate::model_config::ModelConfig;
use pages::Held;
use scheduler::{Scheduled, Scheduler};

pub use logprobs::Logprobs;
pub use sampling::Sampling;
pub use sequence::Sequence;

/// Says which tokens may come, as a grammar does.
pub trait Constraint: Send {
    /// Makes the logits of tokens that may not come next [`f32::MIN`].
    ///
    /// # Errors
    /// No token may come.
    fn mask(&mut self, logits: &mut [f32]) -> Result<()>;

    /// Takes note of the token that came.
    ///
    /// # Errors
    /// It may not come.
    fn accept(&mut self, token: u32) -> Result<()>;
}

/// A token that was chosen for a sequence, which is over where that failed.
#[derive(Debug)]
pub struct Stepped {
    /// The sequence's number.
    pub id: u64,
    /// The token, and how likely it was where that was asked for.
    pub token: Result<(u32, Option<Logprobs>)>,
}

/// What an engine has and does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineState {
    /// Sequences that are computed.
    pub running: usize,
    /// Sequences that wait for room.
    pub waiting: usize,
    /// Pages of the room for state.
    pub pages: usize,
    /// Those of them that sequences have.
    pub pages_used: usize,
    /// Pages of beginnings that are kept for sequences to come, and given up where room is needed.
    pub pages_kept: usize,
    /// Tokens of prompts so far.
    pub prompt_tokens: u64,
    /// Those of them that were kept from an earlier sequence.
    pub kept_tokens: u64,
    /// Tokens that were chosen so far.
    pub generated_tokens: u64,
    /// Times that a sequence had to give its pages back and was computed again.
    pub preemptions: u64,
}

/// Runs sequences through a model's stages.
pub struct EngineCore {
    pipeline: Pipeline,
    scheduler: Scheduler,
    context: usize,
    chunk: usize,
    /// A step that the head's device has begun with the tokens that it chose in the one before.
    ahead: Option<Vec<u64>>,
    /// Tokens so far.
    counts: EngineState,
}

/// Whose tokens a step chooses, in the order of its rows.
struct Begun {
    ids: Vec<u64>,
    /// What the host has chosen; a device still does.
    chosen: Option<Vec<Stepped>>,
}

impl EngineCore {
    /// An engine for what there is room for.
    pub fn new(pipeline: Pipeline, config: Arc<ModelConfig>, extent: Extent) -> Self {
        let chunk = pipeline.largest_chunk();
        let scheduler = Scheduler::new(config, extent);
        Self { pipeline, scheduler, context: extent.context, chunk, ahead: None, counts: EngineState::default() }
    }

    /// The stages.
    pub fn pipeline(&mut self) -> &mut Pipeline {
        &mut self.pipeline
    }

    /// Why a stage cannot repeat the launches of a step as one, where it would.
    pub fn why_apart(&self) -> Option<&str> {
        self.pipeline.why_apart()
    }

    /// Takes prompts in chunks of at most `tokens`; no more than the plan counts.
    pub fn limit_chunk(&mut self, tokens: usize) {
        self.chunk = tokens.clamp(1, self.pipeline.largest_chunk());
    }

    /// What it has and does now.
    pub fn state(&self) -> EngineState {
        let Scheduler { pages, running, waiting, preemptions, .. } = &self.scheduler;
        EngineState {
            running: running.len(),
            waiting: waiting.len(),
            pages: pages.count(),
            pages_used: pages.count() - pages.available(),
            pages_kept: pages.idle(),
            preemptions: *preemptions,
            ..self.counts
        }
    }

    /// Takes a sequence up as soon as there is room, and gives it its number. It is over once it has all its tokens, the
    /// context is full, or choosing one failed.
    ///
    /// # Errors
    /// Its prompt is empty or longer than the context, or has what is no token of the model.
    pub fn add(&mut self, sequence: Sequence) -> Result<u64> {
        self.check(&sequence.tokens)?;
        Ok(self.scheduler.add(sequence))
    }

    /// Ends a sequence. What it had is there for others.
    pub fn remove(&mut self, id: u64) {
        self.scheduler.remove(id);
    }

    /// Ends all of them.
    ///
    /// # Errors
    /// A device fails.
    pub fn clear(&mut self) -> Result<()> {
        self.scheduler.clear();
        if self.ahead.take().is_some() {
            self.pipeline.chooser()?.chosen()?;
        }
        Ok(())
    }

    /// Whether a device has begun with the tokens that it chose last.
    pub fn is_ahead(&self) -> bool {
        self.ahead.is_some()
    }

    /// Runs the next tokens of all sequences that there is room for, and gives those that were chosen behind them.
    /// Nothing is given while prompts are on their way, or where there is no sequence.
    ///
    /// # Errors
    /// A device fails, and the engine is of no more use.
    pub fn step(&mut self) -> Result<Vec<Stepped>> {
        let begun = match self.ahead.take() {
            Some(ids) => Begun { ids, chosen: None },
            None => self.begin()?,
        };
        if begun.chosen.is_none() && self.can_go_ahead(&begun.ids) {
            self.run_whole(&begun.ids, None)?;
            self.ahead = Some(begun.ids.clone());
        }
        self.finish(begun)
    }

    /// Whether a device can go on with the tokens that it is choosing for these sequences, which are all that there are.
    fn can_go_ahead(&mut self, ids: &[u64]) -> bool {
        let Scheduler { running, waiting, .. } = &self.scheduler;
        let is_same = waiting.is_empty() && running.iter().map(|sequence| &sequence.id).eq(ids);
        is_same && !ids.is_empty() && self.does_whole_steps() && self.scheduler.grow_ahead(self.context)
    }

    fn does_whole_steps(&mut self) -> bool {
        self.pipeline.chooser().is_ok_and(|chooser| chooser.does_whole_steps())
    }

    fn begin(&mut self) -> Result<Begun> {
        let scheduled = self.scheduler.schedule(self.chunk);
        let does_whole_steps = self.does_whole_steps();
        let running = &mut self.scheduler.running;
        let sampled = |next: &&Scheduled| next.tokens.end == running[next.at].tokens.len();
        let sampled: Vec<usize> = scheduled.iter().filter(sampled).map(|next| next.at).collect();
        let ids: Vec<u64> = sampled.iter().map(|at| running[*at].id).collect();
        if scheduled.is_empty() {
            return Ok(Begun { ids, chosen: Some(Vec::new()) });
        }
        let is_whole = scheduled.iter().all(|next| next.tokens.len() == 1) && sampled.len() == running.len();
        let is_for_host = sampled.iter().any(|at| running[*at].is_for_host()) || !self.pipeline.can_choose();
        if is_for_host {
            // What is chosen here, the device does not see.
            for at in &sampled {
                running[*at].is_begun = false;
            }
        } else {
            for next in &scheduled {
                let sequence = &mut running[next.at];
                if sequence.is_begun {
                    continue;
                }
                self.pipeline.chooser()?.begin(sequence.slot, &sequence.choice, &sequence.tokens)?;
                sequence.is_begun = true;
            }
        }
        if is_whole && !is_for_host && does_whole_steps {
            let tokens: Vec<u32> = running.iter().filter_map(|sequence| sequence.tokens.last().copied()).collect();
            self.run_whole(&ids, Some(&tokens))?;
            return Ok(Begun { ids, chosen: None });
        }
        let (mut tokens, mut runs, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for Scheduled { at, tokens: new, length } in &scheduled {
            let sequence = &running[*at];
            tokens.extend_from_slice(&sequence.tokens[new.clone()]);
            runs.push(Run {
                slot: sequence.slot,
                pages: &sequence.held.pages,
                position: new.start,
                tokens: new.len(),
                length: *length,
            });
            if sampled.contains(at) {
                rows.push(tokens.len() - 1);
            }
        }
        self.pipeline.run(&tokens, &runs)?;
        drop(runs);
        for Scheduled { at, tokens, .. } in &scheduled {
            let sequence = &mut running[*at];
            sequence.position = tokens.end;
            self.scheduler.pages.keep(&mut sequence.held, &sequence.tokens[..tokens.end]);
        }
        let chosen = if is_for_host { Some(self.choose(&sampled, &rows)?) } else { None };
        if chosen.is_none() && !rows.is_empty() {
            let draws: Vec<_> = sampled
                .iter()
                .map(|at| {
                    let sequence = &mut self.scheduler.running[*at];
                    (sequence.slot, sequence.draws.draw())
                })
                .collect();
            self.pipeline.choose(&rows, &draws)?;
        }
        Ok(Begun { ids, chosen: if rows.is_empty() { Some(Vec::new()) } else { chosen } })
    }

    /// Has a device run a token of each running sequence, those in `tokens` or those that it has chosen last, and choose
    /// the ones behind them.
    fn run_whole(&mut self, ids: &[u64], tokens: Option<&[u32]>) -> Result<()> {
        let running = &mut self.scheduler.running;
        debug_assert_eq!(running.len(), ids.len());
        let draws: Vec<u32> = running.iter_mut().map(|sequence| sequence.draws.draw()).collect();
        let runs: Vec<Run> = running
            .iter()
            .map(|sequence| Run {
                slot: sequence.slot,
                pages: &sequence.held.pages,
                position: sequence.position,
                tokens: 1,
                length: sequence.length_at(sequence.position),
            })
            .collect();
        self.pipeline.chooser()?.step(tokens, &runs, &draws)?;
        for sequence in running {
            sequence.position += 1;
            let known = sequence.position.min(sequence.tokens.len());
            self.scheduler.pages.keep(&mut sequence.held, &sequence.tokens[..known]);
        }
        Ok(())
    }

    /// Chooses on the host behind the rows of a step, each of a running sequence.
    fn choose(&mut self, sampled: &[usize], rows: &[usize]) -> Result<Vec<Stepped>> {
        let mut all = Vec::with_capacity(rows.len());
        for (sampled, rows) in sampled.chunks(LOGIT_ROWS).zip(rows.chunks(LOGIT_ROWS)) {
            let logits = self.pipeline.logits(rows)?;
            let width = logits.len() / rows.len();
            for (at, logits) in sampled.iter().zip(logits.chunks_mut(width)) {
                let sequence = &mut self.scheduler.running[*at];
                let (id, chosen) = (sequence.id, sequence.choose(logits));
                let token = match chosen {
                    Ok((Chosen { token, is_finite: true }, logprobs)) => Ok((token, logprobs)),
                    Ok(_) => Err(None),
                    Err(error) => Err(Some(error)),
                };
                all.push((id, sequence.tokens.len(), token));
            }
        }
        let stepped = |(id, len, token): (u64, usize, Result<_, Option<Error>>)| {
            let token = token.map_err(|error| error.unwrap_or_else(|| self.not_a_number(len)));
            Stepped { id, token }
        };
        Ok(all.into_iter().map(stepped).collect())
    }

    /// Waits for what a step has chosen, and gives it to its sequences. Those that are over are there no more.
    fn finish(&mut self, begun: Begun) -> Result<Vec<Stepped>> {
        let mut stepped: Vec<_> = if let Some(chosen) = begun.chosen {
            chosen
        } else {
            let chosen = self.pipeline.chooser()?.chosen()?;
            let of = |(id, chosen): (&u64, Chosen)| Stepped { id: *id, token: self.told(*id, chosen) };
            begun.ids.iter().zip(chosen).map(of).collect()
        };
        // Some were ended while their tokens were on their way.
        stepped.retain(|stepped| self.scheduler.running.iter().any(|sequence| sequence.id == stepped.id));
        for Stepped { id, token } in &stepped {
            let Some(sequence) = self.scheduler.running.iter_mut().find(|sequence| sequence.id == *id) else {
                continue;
            };
            let is_over = match token {
                Ok((token, _)) => {
                    if !sequence.is_counted {
                        sequence.is_counted = true;
                        self.counts.prompt_tokens += sequence.prompt as u64;
                        self.counts.kept_tokens += sequence.kept as u64;
                    }
                    self.counts.generated_tokens += 1;
                    sequence.push(*token);
                    sequence.tokens.len() >= sequence.most || sequence.tokens.len() > self.context
                }
                Err(_) => true,
            };
            if is_over {
                self.scheduler.remove(*id);
            }
        }
        Ok(stepped)
    }

    fn told(&self, id: u64, chosen: Chosen) -> Result<(u32, Option<Logprobs>)> {
        if chosen.is_finite {
            return Ok((chosen.token, None));
        }
        let running = self.scheduler.running.iter().find(|sequence| sequence.id == id);
        Err(self.not_a_number(running.map_or(0, |sequence| sequence.tokens.len())))
    }

    /// Runs a sequence of `tokens` and calls `visit` with each one's position and the logits behind it. All other
    /// sequences are ended.
    ///
    /// # Errors
    /// The tokens are none, too many, or not the model's, a device fails, or a logit is not a number.
    pub fn score(&mut self, tokens: &[u32], mut visit: impl FnMut(usize, &[f32])) -> Result<()> {
        self.check(tokens)?;
        self.clear()?;
        let mut held = Held::default();
        if !self.scheduler.pages.grow(&mut held, tokens.len()) {
            return Err(self.too_long(tokens.len()));
        }
        let scored = self.score_in(&held.pages, tokens, &mut visit);
        self.scheduler.pages.release(&mut held);
        scored
    }

    fn score_in(&mut self, pages: &[u32], tokens: &[u32], visit: &mut impl FnMut(usize, &[f32])) -> Result<()> {
        for (at, chunk) in tokens.chunks(self.chunk).enumerate() {
            let position = at * self.chunk;
            let run = Run { slot: 0, pages, position, tokens: chunk.len(), length: tokens.len() };
            self.pipeline.run(chunk, &[run])?;
            for row in 0..chunk.len() {
                let logits = self.pipeline.logits(&[row])?;
                if !logits.iter().all(|logit| logit.is_finite()) {
                    return Err(self.not_a_number(position + row + 1));
                }
                visit(position + row, logits);
            }
        }
        Ok(())
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        match tokens.len() {
            0 => Err(Error::input("there are no tokens to run")),
            len if len > self.context => Err(self.too_long(len)),
            _ => self.pipeline.check(tokens),
        }
    }

    fn too_long(&self, len: usize) -> Error {
        Error::input(format!("{len} tokens are more than the context of {} holds", self.context))
    }

    fn not_a_number(&self, tokens: usize) -> Error {
        let error = Error::input(format!("a logit behind token {tokens} is not a number"));
        let broken = "the checkpoint's weights are broken, or overflow in this scheme; try {}";
        let broken = Hint::naming(broken, [Setting::Quantize(Some("none"))]);
        if !self.pipeline.keeps_halves() {
            return error.hint(broken);
        }
        let range = "on a GPU activations are kept in f16, whose largest value is 65,504, and the model may have larger \
            ones; the CPU has no such limit: try {} with {}";
        error.hint(Hint::naming(range, [Setting::Cpu, Setting::KvCache("bf16")])).hint(broken)
    }
}
