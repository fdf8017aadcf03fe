//! The hidden states that pass from stage to stage.

use std::ops::Range;

use super::cuda::Region;
use crate::error::Result;

/// Hidden states of a chunk's tokens, f32 `[tokens][hidden_size]`, wherever the
/// stage before has left them: in host memory or on a GPU. They move only where
/// the next stage is elsewhere, from GPU to GPU without the host.
pub struct Hidden {
    width: usize,
    rows: Range<usize>,
    host: Vec<f32>,
    /// Where all rows of the chunk stand, if not in host memory.
    gpu: Option<Region>,
}

/// The rows that [`Hidden::select`] has put aside.
pub struct Chunk(Range<usize>, Option<Region>);

impl Hidden {
    /// Room for `tokens` tokens of a hidden state of `width`.
    pub fn new(tokens: usize, width: usize) -> Self {
        Self { width, rows: 0..0, host: vec![0.0; tokens * width], gpu: None }
    }

    /// Bytes in host memory.
    pub fn host_bytes(&self) -> usize {
        self.host.len() * size_of::<f32>()
    }

    /// Begins a chunk of `tokens` tokens, in host memory.
    pub fn begin(&mut self, tokens: usize) {
        (self.rows, self.gpu) = (0..tokens, None);
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.rows.len()
    }

    /// Makes some tokens of the chunk the only ones, until [`Hidden::restore`]: one where it is, several, in ascending
    /// order, at the chunk's beginning, where those are lost that were there.
    pub fn select(&mut self, rows: &[usize]) -> Result<Chunk> {
        let first = if let [row] = *rows { row } else { 0 };
        for (to, &from) in (first..).zip(rows).filter(|(to, from)| to != *from) {
            let (width, bytes) = (self.width, self.width * size_of::<f32>());
            if let Some(region) = &self.gpu {
                region.part(to * bytes, bytes).copy_from(&region.part(from * bytes, bytes))?;
            } else {
                self.host.copy_within(from * width..(from + 1) * width, to * width);
            }
        }
        Ok(Chunk(std::mem::replace(&mut self.rows, first..first + rows.len()), self.gpu.clone()))
    }

    /// Makes the chunk whole again.
    pub fn restore(&mut self, Chunk(rows, gpu): Chunk) {
        (self.rows, self.gpu) = (rows, gpu);
    }

    fn elements(&self) -> Range<usize> {
        self.rows.start * self.width..self.rows.end * self.width
    }

    /// The part of a chunk's region that the rows take.
    fn part(&self, region: &Region) -> Region {
        let elements = self.elements();
        region.part(elements.start * size_of::<f32>(), elements.len() * size_of::<f32>())
    }

    /// The hidden states in host memory.
    pub fn on_host(&mut self) -> Result<&mut [f32]> {
        let elements = self.elements();
        if let Some(region) = self.gpu.take() {
            self.part(&region).read(bytemuck::must_cast_slice_mut(&mut self.host[elements.clone()]))?;
        }
        Ok(&mut self.host[elements])
    }

    /// The hidden states in `region`, which has room for a whole chunk.
    pub fn on_gpu(&mut self, region: &Region) -> Result<Region> {
        let part = self.part(region);
        match &self.gpu {
            Some(now) if now.is(region) => {}
            Some(now) => part.copy_from(&self.part(now))?,
            None => part.write(bytemuck::must_cast_slice(&self.host[self.elements()]))?,
        }
        self.gpu = Some(region.clone());
        Ok(part)
    }

    /// Room for the hidden states in `region`, which a stage is about to fill.
    pub fn begin_on_gpu(&mut self, region: &Region) -> Region {
        self.gpu = Some(region.clone());
        self.part(region)
    }
}
