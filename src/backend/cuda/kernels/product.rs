//! Launches of matmul.cu, mma_few.cu and mma_many.cu: products of one matrix or several, of few tokens or many,
//! with tensor cores and without.

use super::FEW;
use super::launch::Argument;
use super::norm;
use crate::backend::cuda::driver::{Gpu, Region};
use crate::backend::cuda::modules::{Kernel, TENSOR_CORES};
use crate::backend::cuda::operands::{Affine, GATED, Input, Output, Scratch, holds};
use crate::error::Result;
use crate::footprint::{CUDA_FEW_BLOCKS, CUDA_FEW_PARTS};
use crate::model_config::Activation;
use crate::quant::{Storage, WeightDtype};

/// Rows of a block of `few_…`.
const FEW_SLOTS: usize = 8;
/// Rows of a unit of `mma_few_…`, and its bytes of codes of each.
const MMA_FEW_SLOTS: usize = 16;
const MMA_FEW_BYTES: usize = 512;
/// Rows and tokens of a block of the others, and rows of a wide one of `mma_many_…`.
const TILE: usize = 64;
const WIDE_SLOTS: usize = 128;
/// The most matrices that one launch multiplies.
const MATRICES: usize = 3;

/// What becomes of the sums of a product.
#[derive(Clone, Copy)]
struct Epilogue {
    output: Output,
    factor: f32,
    activation: Option<Activation>,
}

impl Epilogue {
    const PLAIN: Self = Self { output: Output::F16, factor: 1.0, activation: None };
}

/// Every launch is queued on the compute stream, and panics where a region is shorter than its shapes say.
impl Gpu {
    /// `y = factor · (x · wᵀ + bias)` for `tokens` rows in `x`.
    pub fn matmul(
        &self,
        affine: &Affine,
        x: Input,
        tokens: usize,
        (y, output, factor): (&Region, Output, f32),
        scratch: &Scratch,
    ) -> Result<()> {
        self.product(&[(affine, y)], x, tokens, Epilogue { output, factor, activation: None }, scratch)
    }

    /// The fewest rows of a matrix of which so many tokens take wide blocks, where there are such.
    pub fn wide_rows(&self, tokens: usize) -> usize {
        WIDE_SLOTS * self.enough_wide().div_ceil(tokens.div_ceil(TILE))
    }

    /// From so many wide blocks on, narrow ones fill no more of the GPU.
    fn enough_wide(&self) -> usize {
        self.multiprocessors * 3 / 2
    }

    /// [`Gpu::matmul`] of the same `x` into f16 for several matrices, in one launch where their storage is one.
    pub fn matmuls(&self, parts: &[(&Affine, &Region)], x: Input, tokens: usize, scratch: &Scratch) -> Result<()> {
        let storage = |part: &(&Affine, &Region)| part.0.weight.layout.storage;
        let launches = || parts.chunk_by(|a, b| storage(a) == storage(b)).flat_map(|same| same.chunks(MATRICES));
        let x = if launches().count() > 1 { self.half(x, (tokens, parts[0].0.cols()))? } else { x };
        launches().try_for_each(|parts| self.product(parts, x, tokens, Epilogue::PLAIN, scratch))
    }

    /// `y = activation(gate(x)) · up(x)`, or without a gate `activation(up(x))`, times [`GATED`], in f16. Where gate
    /// and up differ in storage, `apart` holds what up gives.
    pub fn gated<'a>(
        &self,
        activation: Activation,
        (gate, up): (Option<&Affine>, &Affine),
        x: Input,
        tokens: usize,
        [y, apart]: [&'a Region; 2],
        scratch: &Scratch,
    ) -> Result<Input<'a>> {
        let scaled = Epilogue { factor: GATED, ..Epilogue::PLAIN };
        let activated = Epilogue { activation: Some(activation), ..scaled };
        match gate {
            Some(gate) if gate.weight.layout.storage != up.weight.layout.storage => {
                let x = self.half(x, (tokens, up.cols()))?;
                self.product(&[(gate, y)], x, tokens, Epilogue::PLAIN, scratch)?;
                self.product(&[(up, apart)], x, tokens, scaled, scratch)?;
                self.activate(activation, y, Some(apart), tokens * up.rows.len())?;
            }
            Some(gate) => self.product(&[(gate, y), (up, y)], x, tokens, activated, scratch)?,
            None => self.product(&[(up, y)], x, tokens, activated, scratch)?,
        }
        Ok(Input::Gated(y))
    }

    /// An input as rows of f16, normalized now where it is not yet. The shape is rows and their width.
    pub fn half<'a>(&self, x: Input<'a>, shape: (usize, usize)) -> Result<Input<'a>> {
        if let Input::Hidden { states, norm, normed } = x {
            self.normalize(norm, (states, WeightDtype::F32), shape, normed, Output::F16, 1.0)?;
            return Ok(Input::Half(normed));
        }
        Ok(x)
    }

    /// A launch of matrices of one storage; with an activation, of one, or of gate and up.
    fn product(
        &self,
        parts: &[(&Affine, &Region)],
        x: Input,
        tokens: usize,
        epilogue: Epilogue,
        scratch: &Scratch,
    ) -> Result<()> {
        use Storage::{Int4, Int8, Nl4, Plain};
        use WeightDtype::{Bf16, F16, F32};
        let (cols, storage) = (parts[0].0.cols(), parts[0].0.weight.layout.storage);
        assert!(parts.len() <= MATRICES, "more matrices than a launch takes");
        assert!(parts.iter().all(|(affine, _)| affine.cols() == cols && affine.weight.layout.storage == storage));
        let mma = self.capability >= TENSOR_CORES;
        let (few_kernel, many_kernels) = match storage {
            Plain(Bf16) if mma => (Kernel::few_bf16, [Kernel::mma_many_bf16_64, Kernel::mma_many_bf16_128]),
            Plain(F16) if mma => (Kernel::few_f16, [Kernel::mma_many_f16_64, Kernel::mma_many_f16_128]),
            Plain(Bf16) => (Kernel::few_bf16, [Kernel::many_bf16; 2]),
            Plain(F16) => (Kernel::few_f16, [Kernel::many_f16; 2]),
            Plain(F32) => (Kernel::few_f32, [Kernel::many_f32; 2]),
            Int8 if mma => (Kernel::mma_few_int8, [Kernel::mma_many_int8_64, Kernel::mma_many_int8_128]),
            Int4 if mma => (Kernel::mma_few_int4, [Kernel::mma_many_int4_64, Kernel::mma_many_int4_128]),
            Nl4 if mma => (Kernel::mma_few_nl4, [Kernel::mma_many_nl4_64, Kernel::mma_many_nl4_128]),
            Int8 => (Kernel::few_int8, [Kernel::many_int8; 2]),
            Int4 => (Kernel::few_int4, [Kernel::many_int4; 2]),
            Nl4 => (Kernel::few_nl4, [Kernel::many_nl4; 2]),
        };
        let mma_few = mma && tokens <= FEW && !matches!(storage, Storage::Plain(_));
        let x = if mma_few { x } else { self.half(x, (tokens, cols))? };
        let (states, norm, dtype, scale) = match x {
            Input::Half(x) => (x, None, WeightDtype::F16, 1.0),
            Input::Gated(x) => (x, None, WeightDtype::F16, GATED.recip()),
            Input::Hidden { states, norm, .. } => (states, norm, WeightDtype::F32, 1.0),
        };
        holds(states, [tokens, cols], dtype.size());

        let blocks_of = |slots: usize| match (epilogue.activation, parts) {
            (Some(_), [(gate, _), (up, _)]) => {
                assert!(gate.rows.len() == up.rows.len(), "a gate of another size");
                gate.rows.len().div_ceil(slots / 2)
            }
            _ => parts.iter().map(|(affine, _)| affine.rows.len().div_ceil(slots)).sum(),
        };
        let mut arguments = Vec::new();
        for (affine, y) in parts {
            let rows = affine.rows.len();
            holds(y, [tokens, rows], epilogue.output.size());
            let [bias, bias_dtype] = Argument::vector(affine.bias.as_ref(), affine.rows.clone());
            arguments.extend(Argument::sections(&affine.weight, affine.rows.start));
            arguments.extend([Argument::int(rows), bias, bias_dtype, Argument::Region(y)]);
        }
        let (null, zero) = (Argument::Null, Argument::I32(0));
        for _ in parts.len()..MATRICES {
            arguments.extend([null, null, null, zero, null, zero, null]);
        }
        arguments.extend([Argument::int(cols), Argument::Region(states)]);
        arguments.extend(mma_few.then(|| Argument::dtype(dtype)));
        arguments.extend([
            Argument::int(tokens),
            Argument::I32(epilogue.output as i32),
            Argument::F32(scale),
            Argument::F32(epilogue.factor),
        ]);
        arguments.push(Argument::activation(epilogue.activation));
        if tokens > FEW {
            let tiles = tokens.div_ceil(TILE);
            let is_mma = many_kernels[0] != many_kernels[1];
            // A wide block needs less of shared memory and of the caches; narrow ones fill more of the GPU.
            let is_wide = is_mma && blocks_of(WIDE_SLOTS) * tiles >= self.enough_wide();
            let (slots, threads) = (if is_wide { WIDE_SLOTS } else { TILE }, if is_mma { 128 } else { 256 });
            return self.launch(many_kernels[usize::from(is_wide)], (blocks_of(slots), tiles), threads, &arguments);
        }
        if !mma_few {
            return self.launch(few_kernel, (blocks_of(FEW_SLOTS), 1), 256, &arguments);
        }
        let [code_row, ..] = parts[0].0.weight.layout.row_bytes;
        let units: usize = blocks_of(MMA_FEW_SLOTS) * code_row.div_ceil(MMA_FEW_BYTES);
        let blocks = units.min(self.blocks_at_once(few_kernel, 256)?).min(CUDA_FEW_BLOCKS);
        scratch.holds(blocks * CUDA_FEW_PARTS, blocks);
        arguments.extend(norm::arguments(norm, cols));
        arguments.extend([Argument::Region(&scratch.parts), Argument::Region(&scratch.arrivals)]);
        self.launch(few_kernel, (blocks, 1), 256, &arguments)
    }
}
