//! The buffers that stages of a GPU work in.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};

use super::exchange::Exchange;
use super::operands::WORD;
use super::{Gpu, MAX_HEAD_DIM, Region, Rotation, Rows, Scratch};
use crate::backend::Run;
use crate::error::{Error, Result};
use crate::footprint::{CudaBuffers, CudaRows, Extent};
use crate::model_config::{ModelConfig, Rope};
use crate::pool::lock;

/// What stands in a place of [`CudaRows`], for all rows.
#[derive(Clone, Copy)]
pub(super) enum Column {
    Token = 0,
    Draw = 2,
    Position = 3,
    Sequence = 4,
}

/// The buffers of a step on one GPU, shared by all its stages: they run in turn.
pub struct Workspace {
    pub(super) gpu: Arc<Gpu>,
    pub(super) extent: Extent,
    buffers: CudaBuffers<Region>,
    placed: Mutex<Placed>,
    pub(super) scratch: Scratch,
    exchange: Mutex<Exchange>,
}

/// What the buffers hold of sequences.
struct Placed {
    /// The pages of each.
    tables: Vec<u32>,
    /// For each rope of each, the least length that its frequencies are right for.
    lengths: Vec<usize>,
}

impl Deref for Workspace {
    type Target = CudaBuffers<Region>;

    fn deref(&self) -> &CudaBuffers<Region> {
        &self.buffers
    }
}

impl Workspace {
    /// Whether a GPU can compute such a model.
    pub fn check(config: &ModelConfig) -> Result<()> {
        if config.head_dim > MAX_HEAD_DIM {
            return Err(Error::input(format!(
                "heads of width {} cannot be computed on a GPU; the widest are {MAX_HEAD_DIM}",
                config.head_dim
            ))
            .hint("a device map of `{\"\": \"cpu\"}` computes on the CPU"));
        }
        Ok(())
    }

    /// Buffers in the next of `regions`, which are of [`CudaBuffers::sizes`].
    pub fn new(
        gpu: &Arc<Gpu>,
        config: &ModelConfig,
        extent: Extent,
        regions: &mut impl Iterator<Item = Region>,
    ) -> Result<Self> {
        let missing = |name| Error::device(format!("the workspace has no `{name}`"));
        let buffers = CudaBuffers::try_new(|name| regions.next().ok_or_else(|| missing(name)))?;
        for zeros in [&buffers.arrivals, &buffers.choice, &buffers.tables] {
            zeros.clear()?;
        }
        let of_sequence = config.ropes.iter().flat_map(|rope| rope.frequencies(0).into_owned());
        let frequencies = of_sequence.collect::<Vec<_>>().repeat(extent.sequences);
        buffers.frequencies.write(bytemuck::must_cast_slice(&frequencies))?;
        let tables = vec![0; extent.sequences * Extent::pages_of(extent.context)];
        let placed = Placed { tables, lengths: vec![0; extent.sequences * config.ropes.len()] };
        Ok(Self {
            placed: Mutex::new(placed),
            exchange: Mutex::new(Exchange::take(gpu, extent)?),
            gpu: Arc::clone(gpu),
            extent,
            scratch: Scratch { parts: buffers.parts.clone(), arrivals: buffers.arrivals.clone() },
            buffers,
        })
    }

    /// Tells where the tokens of `runs` stand, as the first of so many rows; and what is to be chosen behind them: by
    /// which random numbers, and behind which tokens, unless those were chosen last.
    ///
    /// # Panics
    /// A sequence has no page for a token, or one that there is not.
    pub(super) fn place(
        &self,
        ropes: &[Rope],
        runs: &[Run],
        rows: usize,
        choice: Option<(Option<&[u32]>, &[u32])>,
    ) -> Result<()> {
        self.place_tables(runs)?;
        self.place_frequencies(ropes, runs)?;
        let mut words = Vec::new();
        let mut column = |each: &mut dyn Iterator<Item = u32>, padding| {
            let end = words.len() + rows;
            words.extend(each);
            words.resize(end, padding);
        };
        if let Some((tokens, draws)) = choice {
            if let Some(tokens) = tokens {
                column(&mut tokens.iter().copied(), 0);
                column(&mut std::iter::empty(), 0);
            }
            column(&mut draws.iter().copied(), 0);
        }
        column(&mut runs.iter().flat_map(|run| run.position..run.position + run.tokens).map(word), u32::MAX);
        column(&mut runs.iter().flat_map(|run| std::iter::repeat_n(word(run.slot), run.tokens)), 0);
        let told = words.len() * WORD;
        let region = self.rows.part(rows * CudaRows::WORDS * WORD - told, told);
        self.exchange().tell(&region, &words)
    }

    /// Makes the pages of each sequence those of its run.
    fn place_tables(&self, runs: &[Run]) -> Result<()> {
        let each = Extent::pages_of(self.extent.context);
        let tables = &mut lock(&self.placed).tables;
        for run in runs {
            let (start, pages) = (run.slot * each, &run.pages[..Extent::pages_of(run.position + run.tokens)]);
            let there = &mut tables[start..start + pages.len()];
            let is_new = |at: &usize| there[*at] != pages[*at];
            let Some(first) = (0..pages.len()).find(is_new) else { continue };
            let behind = (first..pages.len()).rfind(is_new).unwrap_or(first) + 1;
            assert!(pages.iter().all(|page| (*page as usize) < self.extent.pages), "a page that there is not");
            there.copy_from_slice(pages);
            let region = self.tables.part((start + first) * WORD, (behind - first) * WORD);
            // One is queued, and nothing waits for it.
            match pages[first..behind] {
                [page] => region.fill(page)?,
                _ => region.write(bytemuck::must_cast_slice(&pages[first..behind]))?,
            }
        }
        Ok(())
    }

    /// Makes the frequencies of each sequence those of its length.
    fn place_frequencies(&self, ropes: &[Rope], runs: &[Run]) -> Result<()> {
        let lengths = &mut lock(&self.placed).lengths;
        for run in runs {
            for (at, rope) in ropes.iter().enumerate() {
                let (length, wanted) = (&mut lengths[run.slot * ropes.len() + at], rope.shortest_alike(run.length));
                if wanted != *length {
                    let frequencies = rope.frequencies(run.length);
                    let start = run.slot * pairs(ropes) + pairs(&ropes[..at]);
                    let region = self.frequencies.part(start * WORD, frequencies.len() * WORD);
                    region.write(bytemuck::must_cast_slice(&frequencies))?;
                    *length = wanted;
                }
            }
        }
        Ok(())
    }

    /// How a rope rotates.
    pub(super) fn rotation(&self, ropes: &[Rope], rope: usize) -> Rotation {
        let start = pairs(&ropes[..rope]) * WORD;
        let frequencies = self.frequencies.part(start, self.frequencies.len() - start);
        #[expect(clippy::cast_possible_truncation, reason = "angles are f32")]
        let factor = ropes[rope].attention_factor as f32;
        Rotation { frequencies, stride: pairs(ropes), pairs: ropes[rope].rotary_dim / 2, factor }
    }

    pub(super) fn exchange(&self) -> MutexGuard<'_, Exchange> {
        lock(&self.exchange)
    }

    /// A word of each of so many rows.
    pub(super) fn column(&self, column: Column, rows: usize) -> Region {
        self.rows.part(column as usize * rows * WORD, rows * WORD)
    }

    /// Where so many rows stand.
    pub(super) fn standing(&self, rows: usize) -> Rows {
        let [positions, sequences] = [Column::Position, Column::Sequence].map(|column| self.column(column, rows));
        Rows { positions, sequences, tables: self.tables.clone() }
    }
}

/// Pairs that ropes rotate.
fn pairs(ropes: &[Rope]) -> usize {
    ropes.iter().map(|rope| rope.rotary_dim / 2).sum()
}

/// A position or a slot as kernels take it: it is below the context or the batch, which are bounded.
#[expect(clippy::cast_possible_truncation, reason = "below 2^28")]
fn word(number: usize) -> u32 {
    number as u32
}
