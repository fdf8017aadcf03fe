//! A case of each kernel: the shapes are the caller's, the numbers made up, the result that of plain scalar Rust.

use std::sync::Arc;

use super::numbers::{
    buffer, download, encode, equal, floats, halves, layout, matrix, mismatch, near, packed, packed_rows,
    product_scratch, random, rounded, upload, vector, words,
};
use crate::backend::cuda::{Affine, Choosing, GATED, Gpu, Input, Norm, Output, Region};
use crate::backend::{Choice, Chooser, Chosen};
use crate::error::Result;
use crate::footprint::{CudaChoice, HALF, WORD};
use crate::model_config::{Activation, NormKind};
use crate::quant::{Matrix, MatrixLayout, PackedRows, Storage, WeightDtype, reference};

/// A product into f16, into f32 with a bias, and onto f32.
pub fn product(gpu: &Arc<Gpu>, storage: Storage, (rows, cols, tokens): (usize, usize, usize)) -> Result<()> {
    let (scratch, layout) = (product_scratch(gpu)?, layout(storage, rows, cols));
    let bytes = packed(&layout, &random(rows * cols, 4))?;
    let weight = matrix(gpu, &layout, &bytes)?;
    let x = rounded(WeightDtype::F16, &random(tokens * cols, 5));
    let product = reference::matmul(&Matrix::new(&layout, &bytes), &x, tokens);
    let (shift, before) = (random(rows, 6), random(tokens * rows, 7));
    for (output, factor) in [(Output::F16, 1.0), (Output::F32, 0.5), (Output::Add, 2.0)] {
        let has_bias = output == Output::F32;
        let bias = has_bias.then(|| vector(gpu, WeightDtype::F32, &shift)).transpose()?;
        let dtype = if output == Output::F16 { WeightDtype::F16 } else { WeightDtype::F32 };
        let y = upload(gpu, &encode(dtype, &before))?;
        let affine = Affine::new(weight.clone(), bias);
        gpu.matmul(&affine, Input::Half(&halves(gpu, &x)?), tokens, (&y, output, factor), &scratch)?;
        let exact = |(i, y): (usize, &f64)| {
            let onto = if output == Output::Add { f64::from(before[i]) } else { 0.0 };
            onto + f64::from(factor) * (y + if has_bias { f64::from(shift[i % rows]) } else { 0.0 })
        };
        let exact: Vec<f64> = product.iter().enumerate().map(exact).collect();
        let what = format!("{} {rows}×{cols} by {tokens}, {output:?}", storage.name());
        near(&what, &download(&y, dtype)?, &exact, 2e-6 * (cols as f64).sqrt(), output)?;
    }
    Ok(())
}

/// What stands before a feed-forward layer's last matrix, of states that are normalized on the way.
pub fn gated(gpu: &Arc<Gpu>, storage: Storage, (rows, cols, tokens): (usize, usize, usize)) -> Result<()> {
    let (scratch, layout) = (product_scratch(gpu)?, layout(storage, rows, cols));
    let states = floats(gpu, &random(tokens * cols, 52))?;
    let affine = Affine::new(vector(gpu, WeightDtype::F32, &random(cols, 53))?, None);
    let norm = Some(&Norm { kind: NormKind::Rms, epsilon: 1e-5, affine: &affine });
    let normed = buffer(gpu, tokens * cols * HALF)?;
    gpu.normalize(norm, (&states, WeightDtype::F32), (tokens, cols), &normed, Output::F16, 1.0)?;
    let x = download(&normed, WeightDtype::F16)?;
    let of = |seed| {
        let bytes = packed(&layout, &random(rows * cols, seed))?;
        let product = reference::matmul(&Matrix::new(&layout, &bytes), &x, tokens);
        Ok((Affine::new(matrix(gpu, &layout, &bytes)?, None), product))
    };
    let ((gate, of_gate), (up, of_up)) = (of(40)?, of(41)?);
    let pairs = of_gate.iter().zip(&of_up);
    let exact: Vec<f64> = pairs.map(|(gate, up)| activated(Activation::Silu, *gate) * up * f64::from(GATED)).collect();
    let (y, apart) = (buffer(gpu, tokens * rows * HALF)?, buffer(gpu, tokens * rows * HALF)?);
    let x = Input::Hidden { states: &states, norm, normed: &normed };
    gpu.gated(Activation::Silu, (Some(&gate), &up), x, tokens, [&y, &apart], &scratch)?;
    let what = format!("gate and up of {}, {rows}×{cols} by {tokens}", storage.name());
    // Each sum is off by as much as that of a product, times the other.
    let tolerance = 2e-5 * (cols as f64).sqrt() * f64::from(GATED);
    near(&what, &download(&y, WeightDtype::F16)?, &exact, tolerance, Output::F16)
}

/// Rows into f32 or f16, or onto f32, with weights of three types.
pub fn norm(gpu: &Arc<Gpu>, kind: NormKind, (rows, width): (usize, usize)) -> Result<()> {
    let offset = if kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
    for (dtype, factor, output) in [
        (WeightDtype::F32, 1.0, Output::F16),
        (WeightDtype::Bf16, 0.5, Output::F32),
        (WeightDtype::F16, 3.0, Output::Add),
    ] {
        let x_dtype = if output == Output::F32 { WeightDtype::F16 } else { WeightDtype::F32 };
        let x = rounded(x_dtype, &random(rows * width, 8));
        let [weight, shift] = [9, 10].map(|seed| rounded(dtype, &random(width, seed)));
        let before = random(rows * width, 11);
        let has_bias = kind == NormKind::Layer;
        let of_row = |(x, before): (&[f32], &[f32])| {
            let mean = |f: &dyn Fn(f64) -> f64| x.iter().map(|x| f(f64::from(*x))).sum::<f64>() / width as f64;
            let centre = if kind == NormKind::Layer { mean(&|x| x) } else { 0.0 };
            let inverse = 1.0 / (mean(&|x| (x - centre).powi(2)) + 1e-5).sqrt();
            let value = |i: usize| {
                let bias = if has_bias { f64::from(shift[i]) } else { 0.0 };
                let onto = if output == Output::Add { f64::from(before[i]) } else { 0.0 };
                let y = (f64::from(x[i]) - centre) * inverse * f64::from(weight[i] + offset) + bias;
                y * f64::from(factor) + onto
            };
            (0..width).map(value).collect::<Vec<_>>()
        };
        let exact: Vec<f64> = x.chunks(width).zip(before.chunks(width)).flat_map(of_row).collect();
        let shift = has_bias.then(|| vector(gpu, dtype, &shift)).transpose()?;
        let affine = Affine::new(vector(gpu, dtype, &weight)?, shift);
        let norm = Norm { kind, epsilon: 1e-5, affine: &affine };
        let y_dtype = if output == Output::F16 { WeightDtype::F16 } else { WeightDtype::F32 };
        let (x, y) = (upload(gpu, &encode(x_dtype, &x))?, upload(gpu, &encode(y_dtype, &before))?);
        gpu.normalize(Some(&norm), (&x, x_dtype), (rows, width), &y, output, factor)?;
        let what = format!("{kind:?} of {rows}×{width}, {output:?}");
        near(&what, &download(&y, y_dtype)?, &exact, 2e-5, output)?;
    }
    Ok(())
}

/// Rows of a matrix into f32, and onto it.
pub fn embedding(gpu: &Arc<Gpu>, storage: Storage, cols: usize) -> Result<()> {
    let (layout, tokens) = (layout(storage, 7, cols), [6u32, 0, 3, 3]);
    let bytes = packed(&layout, &random(7 * cols, 20))?;
    let affine = Affine::new(matrix(gpu, &layout, &bytes)?, None);
    let (ids, hidden) = (words(gpu, &tokens)?, buffer(gpu, tokens.len() * cols * WORD)?);
    gpu.embed(&affine, &ids, 2.0, &hidden, Output::F32)?;
    let mut row = vec![0.0; cols];
    let mut of_token = |token: &u32| {
        Matrix::new(&layout, &bytes).dequantize_row(*token as usize, &mut row);
        row.iter().map(|v| 2.0 * f64::from(*v)).collect::<Vec<_>>()
    };
    let exact: Vec<f64> = tokens.iter().flat_map(&mut of_token).collect();
    let what = format!("rows of {} {cols} wide", storage.name());
    near(&what, &download(&hidden, WeightDtype::F32)?, &exact, 0.0, Output::F32)?;
    gpu.embed(&affine, &ids, -1.0, &hidden, Output::Add)?;
    let halved: Vec<f64> = exact.iter().map(|v| v / 2.0).collect();
    near(&format!("{what}, added"), &download(&hidden, WeightDtype::F32)?, &halved, 1e-6, Output::F32)
}

/// An activation as it is defined.
fn activated(activation: Activation, x: f64) -> f64 {
    // erf by its series, which converges for the arguments here.
    let erf = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    };
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::Relu => x.max(0.0),
    }
}

/// An activation, with what up gives and without.
pub fn activation(gpu: &Arc<Gpu>, activation: Activation, count: usize) -> Result<()> {
    let of = |seed, factor: f32| {
        rounded(WeightDtype::F16, &random(count, seed).iter().map(|v| v * factor).collect::<Vec<_>>())
    };
    let (gate, up) = (of(21, 4.0), of(22, 1.0));
    for has_up in [true, false] {
        let (ours, factor) = (halves(gpu, &gate)?, halves(gpu, &up)?);
        gpu.activate(activation, &ours, has_up.then_some(&factor), count)?;
        let value = |i: usize| activated(activation, gate[i].into()) * if has_up { f64::from(up[i]) } else { 1.0 };
        let exact: Vec<f64> = (0..count).map(value).collect();
        let what = format!("{activation:?}, {count}");
        near(&what, &download(&ours, WeightDtype::F16)?, &exact, 1e-6, Output::F16)?;
    }
    Ok(())
}

/// The rows of an expert's tokens.
pub fn gathered(gpu: &Arc<Gpu>, width: usize) -> Result<()> {
    let (tokens, x) = ([4u32, 0, 2], rounded(WeightDtype::F16, &random(5 * width, 24)));
    let out = buffer(gpu, tokens.len() * width * HALF)?;
    gpu.gather(&halves(gpu, &x)?, &words(gpu, &tokens)?, width, &out)?;
    let rows: Vec<f32> = tokens.iter().flat_map(|token| x[*token as usize * width..][..width].to_vec()).collect();
    equal("rows of tokens", &download(&out, WeightDtype::F16)?, &rows)
}

/// What an expert gives, onto the rows of its tokens.
pub fn scattered(gpu: &Arc<Gpu>, width: usize) -> Result<()> {
    let (tokens, weights) = ([4u32, 0, 2], [0.5f32, -1.0, 2.0]);
    let (y, before) = (random(3 * width, 25), random(5 * width, 26));
    let sum = floats(gpu, &before)?;
    gpu.scatter_add(&floats(gpu, &y)?, &words(gpu, &tokens)?, &floats(gpu, &weights)?, width, &sum)?;
    let mut exact: Vec<f64> = before.iter().map(|v| f64::from(*v)).collect();
    for (at, token) in tokens.iter().enumerate() {
        for i in 0..width {
            exact[*token as usize * width + i] += f64::from(weights[at]) * f64::from(y[at * width + i]);
        }
    }
    near("sums of tokens", &download(&sum, WeightDtype::F32)?, &exact, 1e-6, Output::F32)
}

/// Packs rows of a matrix from `first` on: the rows, and whether the kernel found that they cannot be.
pub fn pack(
    gpu: &Arc<Gpu>,
    layout: &MatrixLayout,
    first: usize,
    dtype: WeightDtype,
    bytes: &[u8],
) -> Result<(PackedRows, bool)> {
    let rows = bytes.len() / (layout.cols * dtype.size());
    let (matrix, failed) = (matrix(gpu, layout, &[])?, words(gpu, &[0])?);
    gpu.quantize(&matrix, first, rows, dtype, &upload(gpu, bytes)?, &failed)?;
    let mut packed = PackedRows::default();
    for (at, section) in packed.0.iter_mut().enumerate() {
        section.resize(rows * layout.row_bytes[at], 0);
        // Of nothing there is nothing to read.
        if !section.is_empty() {
            matrix.at(layout.sections(first)[at]).read(section)?;
        }
    }
    Ok((packed, download(&failed, WeightDtype::F32)?[0].to_bits() != 0))
}

/// Rows of a matrix from `first` on, bit for bit as the host packs them.
pub fn quantized(
    gpu: &Arc<Gpu>,
    storage: Storage,
    (first, cols): (usize, usize),
    dtype: WeightDtype,
    weights: &[f32],
) -> Result<()> {
    let rows = weights.len() / cols;
    let from = Storage::Plain(dtype).name();
    let what = format!("{} from {from}, {rows} rows of {cols} from row {first}", storage.name());
    let (layout, bytes) = (layout(storage, first + rows + 1, cols), encode(dtype, weights));
    let host = packed_rows(&layout, dtype, &bytes)?;
    let (ours, failed) = pack(gpu, &layout, first, dtype, &bytes)?;
    if failed {
        return Err(mismatch(format!("{what}: refused")));
    }
    for (at, section) in ["codes", "sub-scales", "scales"].into_iter().enumerate().rev() {
        equal(&format!("{what}: {section}"), &ours.0[at], &host.0[at])?;
    }
    Ok(())
}

/// What a GPU chooses tokens in.
pub struct Choices<'a> {
    gpu: &'a Arc<Gpu>,
    scratch: Region,
    seen: Region,
    chosen: Region,
}

impl<'a> Choices<'a> {
    /// For choices among `count` logits.
    pub fn new(gpu: &'a Arc<Gpu>, count: usize) -> Result<Self> {
        let needed = CudaChoice::new(count);
        let cleared = |len| {
            let region = buffer(gpu, len)?;
            region.clear().map(|()| region)
        };
        let (scratch, seen) = (cleared(needed.scratch)?, cleared(needed.seen)?);
        Ok(Self { gpu, scratch, seen, chosen: buffer(gpu, 3 * WORD)? })
    }

    /// Marks tokens as those that occurred.
    pub fn mark(&self, tokens: &[u32]) -> Result<()> {
        let mut bits = vec![0u32; self.seen.len() / WORD];
        for token in tokens {
            bits[*token as usize / 32] |= 1 << (token % 32);
        }
        self.seen.write(bytemuck::must_cast_slice(&bits))
    }

    /// The token, and whether all logits are finite.
    pub fn choose(&self, choice: &Choice, softcap: f32, logits: &[f32], uniform: u32) -> Result<Chosen> {
        self.chosen.part(2 * WORD, WORD).fill(uniform)?;
        let at = Choosing { scratch: &self.scratch, seen: &self.seen, chosen: &self.chosen, stride: 1 };
        self.gpu.choose(choice, softcap, &floats(self.gpu, logits)?, logits.len(), &at)?;
        let mut words = [0u32; 3];
        self.chosen.read(bytemuck::must_cast_slice_mut(&mut words))?;
        Ok(Chosen { token: words[0], is_finite: words[1] == 0 })
    }
}

/// A choice among `count` logits, as the host makes it.
pub fn choice(gpu: &Arc<Gpu>, choice: &Choice, count: usize) -> Result<()> {
    let (choices, logits, seen) = (Choices::new(gpu, count)?, random(count, 31), [0, 7, 300]);
    let logits: Vec<f32> = logits.iter().map(|logit| logit * 8.0).collect();
    for uniform in [1, 1 << 31, u32::MAX - 1, u32::MAX / 3] {
        choices.mark(&seen)?;
        let ours = choices.choose(choice, 0.0, &logits, uniform)?;
        let host = Chooser::new(*choice, &seen).choose(&mut logits.clone(), uniform);
        equal(&format!("{choice:?} of {count} logits"), &[ours], &[host])?;
    }
    Ok(())
}
