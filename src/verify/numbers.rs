//! The numbers of a check: made up, on their way to a GPU and back, and held against exact ones.

use std::fmt::Debug;
use std::sync::Arc;

use half::{bf16, f16};

use crate::backend::cuda::{DeviceMatrix, Gpu, Output, Region, Scratch};
use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::footprint::{CUDA_FEW_BLOCKS, CUDA_FEW_PARTS, WORD};
use crate::pool::Pool;
use crate::quant::{MatrixLayout, PackedRows, Storage, WeightDtype, quantize_rows};
use crate::random::Draws;

/// What a kernel gives is not what the reference does.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Mismatch(pub String);

/// The error of a [`Mismatch`].
pub fn mismatch(what: impl Into<String>) -> Error {
    Error::device(Mismatch(what.into()))
}

/// All ways in which weights stand on a GPU.
pub const STORAGES: [Storage; 6] = [
    Storage::Plain(WeightDtype::Bf16),
    Storage::Plain(WeightDtype::F16),
    Storage::Plain(WeightDtype::F32),
    Storage::Int8,
    Storage::Int4,
    Storage::Nl4,
];

/// Numbers between −1 and 1, the same for the same seed.
pub fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut draws = Draws::new(seed);
    (0..count).map(|_| (draws.draw() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// The values in `dtype`.
pub fn encode(dtype: WeightDtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        WeightDtype::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        WeightDtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        WeightDtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// What [`encode`] was given, rounded.
pub fn decode(dtype: WeightDtype, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    dtype.decode(bytes, &mut values);
    values
}

/// The values as `dtype` holds them.
pub fn rounded(dtype: WeightDtype, values: &[f32]) -> Vec<f32> {
    decode(dtype, &encode(dtype, values))
}

/// A matrix as the host packs it.
pub fn packed(layout: &MatrixLayout, weights: &[f32]) -> Result<Vec<u8>> {
    if let Storage::Plain(dtype) = layout.storage {
        let mut matrix = encode(dtype, weights);
        matrix.resize(layout.size().as_usize().unwrap_or(usize::MAX), 0);
        return Ok(matrix);
    }
    Ok(packed_rows(layout, WeightDtype::F32, &encode(WeightDtype::F32, weights))?.matrix(layout))
}

/// Rows as the host packs them.
pub fn packed_rows(layout: &MatrixLayout, dtype: WeightDtype, bytes: &[u8]) -> Result<PackedRows> {
    let mut rows = PackedRows::default();
    let packed = quantize_rows(&Pool::default(), layout, dtype, bytes, &mut rows);
    packed.map_err(|error| Error::input("weights of a check cannot be packed").caused_by(error))?;
    Ok(rows)
}

/// A buffer of its own, so that reading or writing beyond it may be noticed.
pub fn buffer(gpu: &Arc<Gpu>, len: usize) -> Result<Region> {
    gpu.allocate("a check", Bytes(len as u64))
}

/// A buffer of `bytes`.
pub fn upload(gpu: &Arc<Gpu>, bytes: &[u8]) -> Result<Region> {
    let region = buffer(gpu, bytes.len())?;
    region.write(bytes).map(|()| region)
}

/// A buffer of `words`.
pub fn words(gpu: &Arc<Gpu>, words: &[u32]) -> Result<Region> {
    upload(gpu, bytemuck::must_cast_slice(words))
}

/// A buffer of the values in f16.
pub fn halves(gpu: &Arc<Gpu>, values: &[f32]) -> Result<Region> {
    upload(gpu, &encode(WeightDtype::F16, values))
}

/// A buffer of the values in f32.
pub fn floats(gpu: &Arc<Gpu>, values: &[f32]) -> Result<Region> {
    upload(gpu, &encode(WeightDtype::F32, values))
}

/// The values that a buffer holds.
pub fn download(region: &Region, dtype: WeightDtype) -> Result<Vec<f32>> {
    let mut bytes = vec![0; region.len()];
    region.read(&mut bytes)?;
    Ok(decode(dtype, &bytes))
}

/// The matrix of `layout` that begins with `bytes`.
pub fn matrix(gpu: &Arc<Gpu>, layout: &MatrixLayout, bytes: &[u8]) -> Result<DeviceMatrix> {
    let region = buffer(gpu, layout.size().as_usize().unwrap_or(usize::MAX))?;
    region.write(bytes)?;
    Ok(DeviceMatrix::new(layout.clone(), region))
}

/// A norm or a bias.
pub fn vector(gpu: &Arc<Gpu>, dtype: WeightDtype, values: &[f32]) -> Result<DeviceMatrix> {
    let layout = layout(Storage::Plain(dtype), 1, values.len());
    matrix(gpu, &layout, &packed(&layout, values)?)
}

/// How a matrix stands in memory.
///
/// # Panics
/// It is larger than any plan can hold.
pub fn layout(storage: Storage, rows: usize, cols: usize) -> MatrixLayout {
    MatrixLayout::new(storage, rows, cols).unwrap_or_else(|| unreachable!("a check of {rows}×{cols}"))
}

/// What blocks that share a result need.
pub fn scratch(gpu: &Arc<Gpu>, [parts, arrivals]: [usize; 2]) -> Result<Scratch> {
    let scratch = Scratch { parts: buffer(gpu, parts)?, arrivals: buffer(gpu, arrivals)? };
    scratch.arrivals.clear().map(|()| scratch)
}

/// The same for products.
pub fn product_scratch(gpu: &Arc<Gpu>) -> Result<Scratch> {
    scratch(gpu, [CUDA_FEW_BLOCKS * CUDA_FEW_PARTS * WORD, CUDA_FEW_BLOCKS * WORD])
}

/// Holds numbers against exact ones: they may be off by `tolerance`, and by what their own rounding takes.
pub fn near(what: &str, ours: &[f32], exact: &[f64], tolerance: f64, output: Output) -> Result<()> {
    near_each(what, ours, exact, |_| tolerance, output)
}

/// [`near`] with a tolerance for each element.
pub fn near_each(
    what: &str,
    ours: &[f32],
    exact: &[f64],
    tolerance: impl Fn(usize) -> f64,
    output: Output,
) -> Result<()> {
    equal(&format!("{what}, elements"), &[ours.len()], &[exact.len()])?;
    let (rounding, least) = if output == Output::F16 { (0.0006, 1e-7) } else { (2e-6, 0.0) };
    let is_near =
        |at: usize| (f64::from(ours[at]) - exact[at]).abs() <= tolerance(at) + rounding * exact[at].abs() + least;
    match (0..ours.len()).find(|at| !is_near(*at)) {
        Some(at) => Err(mismatch(format!("{what}, element {at}: {}, not {}", ours[at], exact[at]))),
        None => Ok(()),
    }
}

/// Holds elements against others that have to be the same.
pub fn equal<T: PartialEq + Debug>(what: &str, ours: &[T], exact: &[T]) -> Result<()> {
    match ours.iter().zip(exact).position(|(ours, exact)| ours != exact) {
        Some(at) => Err(mismatch(format!("{what}, element {at}: {:?}, not {:?}", ours[at], exact[at]))),
        None if ours.len() != exact.len() => Err(mismatch(format!("{what}: {}, not {}", ours.len(), exact.len()))),
        None => Ok(()),
    }
}
