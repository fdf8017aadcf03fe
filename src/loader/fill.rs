//! Every weight from its shard into its arena.

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::arenas::Arenas;
use super::reader::{self, Slab, SlabBuffer};
use super::{LoadEvent, LoadOptions, LoadTimes};
use crate::backend::cuda::InFlight;
use crate::bytes::Bytes;
use crate::device::{DeviceError, DeviceId};
use crate::error::{Error, Hint, Result, Setting};
use crate::footprint::{Placed, STAGING_SLABS};
use crate::plan::Plan;
use crate::pool::Pool;
use crate::quant::{PackedRows, QuantizeError, Storage, quantize_rows};

/// Slabs that may be on their way to GPUs; the readers have the others.
const IN_FLIGHT: usize = STAGING_SLABS / 2;

/// Reads, packs and puts all weights. Gives what was taken of host memory for that, what was read past the page
/// cache, and where the time went.
pub fn fill(
    plan: &Plan,
    arenas: &mut Arenas,
    options: &LoadOptions,
    on_event: &mut impl FnMut(LoadEvent),
) -> Result<(Bytes, Bytes, LoadTimes)> {
    let (placed, checkpoint) = (&plan.weights[..], plan.checkpoint());
    let staging = plan.staging()?;
    let buffer = |_| match arenas.gpus.values().next() {
        Some(arenas) => arenas.gpu.allocate_pinned(staging.slab).map(SlabBuffer::Pinned),
        None => SlabBuffer::heap(staging),
    };
    let buffers = (0..STAGING_SLABS).map(buffer).collect::<Result<Vec<_>>>()?;
    let mut packed = PackedRows::default();
    let mut most_packed = Bytes::ZERO;
    let mut times = LoadTimes::default();
    let mut sent: VecDeque<Slab<InFlight>> = VecDeque::new();
    let mut put = |weight: usize, len: usize| {
        let target = &placed[weight];
        let bytes = Bytes(len as u64);
        on_event(LoadEvent::Placed { module: &target.weight.parameter.module, device: target.device, bytes });
    };
    let (waited, past_cache) = reader::read(checkpoint, placed, buffers, staging.transposed, |slab, back| {
        options.cancel.check()?;
        let Slab { weight, row, range, buffer } = slab;
        let target = &placed[weight];
        let buffer = match (buffer, arenas.gpus.get_mut(&target.device)) {
            (SlabBuffer::Pinned(buffer), Some(gpu)) => {
                let (Some(upload), matrix) = (&mut gpu.upload, &gpu.matrices[&weight]) else {
                    unreachable!("the ring is there until all is filled")
                };
                check_scales(target, row, &buffer[range.clone()])?;
                let buffer = upload.start(matrix, row, target.weight.data, buffer, range.clone())?;
                sent.push_back(Slab { weight, row, range, buffer });
                if sent.len() < IN_FLIGHT {
                    return Ok(());
                }
                let Some(first) = sent.pop_front() else { return Ok(()) };
                put(first.weight, first.range.len());
                let start = Instant::now();
                let buffer = receive(&options.pool, arenas, placed, first)?;
                times.gpus += start.elapsed().as_secs_f64();
                buffer
            }
            (buffer, _) => {
                let start = Instant::now();
                most_packed = most_packed.max(pack(arenas, target, row, &buffer[range.clone()], &mut packed, options)?);
                times.pack += start.elapsed().as_secs_f64();
                put(weight, range.len());
                buffer
            }
        };
        // The reader is gone once all is read.
        let _ = back.send(buffer);
        Ok(())
    })?;
    let start = Instant::now();
    for slab in sent {
        put(slab.weight, slab.range.len());
        receive(&options.pool, arenas, placed, slab)?;
    }
    times.gpus += start.elapsed().as_secs_f64();
    times.read = waited.as_secs_f64();
    for gpu in arenas.gpus.values_mut() {
        gpu.upload = None;
    }
    let ring = Bytes((staging.slab * STAGING_SLABS + staging.transposed) as u64);
    Ok((ring + most_packed, past_cache, times))
}

/// Waits for a slab on its way to a GPU and gives its buffer back.
fn receive(pool: &Pool, arenas: &mut Arenas, placed: &[Placed], sent: Slab<InFlight>) -> Result<SlabBuffer> {
    let target = &placed[sent.weight];
    let gpu = arenas.gpus.get_mut(&target.device);
    let Some(upload) = gpu.and_then(|gpu| gpu.upload.as_mut()) else {
        unreachable!("the ring is there until all is filled")
    };
    let (buffer, is_packed) = upload.finish(sent.buffer)?;
    if let (false, Some(dtype)) = (is_packed, target.weight.dtype()) {
        // The GPU knows only that there is a weight that cannot be packed; the host finds it.
        quantize_rows(pool, &target.layout, dtype, &buffer[sent.range], &mut PackedRows::default())
            .map_err(|e| broken_weight(target, sent.row, e))?;
        let what = format!("cannot pack tensor `{}`, and the host can", target.weight.parameter.tensor());
        return Err(Error::device(DeviceError::Failed(target.device, what)));
    }
    Ok(SlabBuffer::Pinned(buffer))
}

/// Packs rows on the CPU and puts them into host memory or onto the disk. Returns the bytes of the packed rows.
fn pack(
    arenas: &mut Arenas,
    target: &Placed,
    row: usize,
    bytes: &[u8],
    packed: &mut PackedRows,
    options: &LoadOptions,
) -> Result<Bytes> {
    let layout = &target.layout;
    let mut write = |offset: u64, bytes: &[u8]| {
        let offset = target.offset + offset;
        if let (Some(file), DeviceId::Disk) = (&arenas.disk, target.device) {
            let failed = |e| Error::io("write a scratch file in", &options.offload_directory, e);
            return file.write_all_at(bytes, offset).map_err(failed);
        }
        // The arena is as long as the layouts in it, so the offset is one into memory.
        #[expect(clippy::cast_possible_truncation, reason = "an offset into an arena")]
        arenas.memory[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    };
    match target.weight.data {
        Storage::Plain(dtype) if target.weight.data != layout.storage => {
            quantize_rows(&options.pool, layout, dtype, bytes, packed).map_err(|e| broken_weight(target, row, e))?;
            for (at, bytes) in packed.sections(layout, row) {
                write(at, bytes)?;
            }
            Ok(packed.bytes())
        }
        _ => {
            check_scales(target, row, bytes)?;
            write((row * target.weight.row_bytes()) as u64, bytes)?;
            Ok(Bytes::ZERO)
        }
    }
}

/// Refuses scales that no quantizer writes, in rows of what is packed already.
fn check_scales(target: &Placed, row: usize, bytes: &[u8]) -> Result<()> {
    let weight = &target.weight;
    if weight.dtype().is_some() {
        return Ok(());
    }
    match target.layout.broken_scale((row * weight.row_bytes()) as u64, bytes) {
        Some(row) => Err(Error::input(WeightError::BrokenScale { tensor: weight.parameter.tensor(), row })
            .hint(Hint::naming("the file is broken; {} makes it again", [Setting::SaveQuantized]))),
        None => Ok(()),
    }
}

/// The error of a weight of `target` that cannot be packed, in a slab that begins at `first_row`.
pub fn broken_weight(target: &Placed, first_row: usize, error: QuantizeError) -> Error {
    let tensor = target.weight.parameter.tensor();
    let error = match error {
        QuantizeError::NotFinite { row, col, value } => {
            WeightError::NotFinite { tensor, row: first_row + row, col, value }
        }
        QuantizeError::ScaleOverflow { row, scale } => {
            WeightError::ScaleOverflow { tensor, row: first_row + row, scale }
        }
    };
    let hint = Hint::naming("{} loads the weights as they are", [Setting::Quantize(Some("none"))]);
    Error::input(error).hint(hint)
}

/// A weight that cannot be packed, or was not packed by a quantizer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightError {
    /// A packed row's scale is NaN or an infinity.
    #[error("tensor `{tensor}` has a scale at row {row} that is not finite")]
    BrokenScale {
        /// The tensor.
        tensor: String,
        /// The row.
        row: usize,
    },
    /// NaN or an infinity.
    #[error("tensor `{tensor}` has {value} at row {row}, column {col}")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The row.
        row: usize,
        /// The column.
        col: usize,
        /// The value.
        value: f32,
    },
    /// The weights are too large for an f16 scale.
    #[error("tensor `{tensor}` needs a scale of {scale} at row {row}, which f16 cannot hold")]
    ScaleOverflow {
        /// The tensor.
        tensor: String,
        /// The row.
        row: usize,
        /// The scale.
        scale: f32,
    },
}
