//! One table of cases for the GPU's kernels, for the stand-in and for silicon: each against
//! plain scalar Rust.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::cast_possible_truncation, clippy::float_cmp, reason = "tests know their numbers")]

use std::sync::Arc;

use evenkeel::backend::cuda::{Affine, Attention, Cache, DeviceMatrix, Gpu, Input, Norm, Output, Region, Scratch};
use evenkeel::bytes::Bytes;
use evenkeel::model_config::{Activation, NormKind};
use evenkeel::plan::memory::{CUDA_FEW_BLOCKS, CUDA_FEW_PARTS, CudaAttention, KvLayout};
use evenkeel::quant::{KvDtype, Matrix, MatrixLayout, PackedRows, Storage, WeightDtype, quantize_rows, reference};
use half::{bf16, f16};

mod choices;
#[allow(unused_imports, reason = "each test binary uses a part")]
pub use choices::*;

/// The functions here that hold a kernel against its reference, for a macro that makes tests of them.
#[allow(unused_macros, reason = "each test binary uses a part")]
macro_rules! every_case {
    ($tests:ident) => {
        $tests! {
            a_logit_that_is_not_finite_is_found
            a_token_is_drawn_as_the_reference_draws_it
            a_token_that_was_chosen_is_penalized
            activations_equal_the_reference
            attention_equals_the_reference
            embeddings_are_the_rows
            nan_and_what_overflows_stay_with_their_token
            norms_equal_the_reference
            products_equal_the_reference
            products_in_one_launch_are_those_of_each
            gates_are_applied_to_what_up_gives
            hidden_states_are_normalized_on_the_way
            quantizing_is_bit_for_bit_the_hosts
            rotation_equals_the_reference
            the_first_of_the_largest_logits_is_found
            the_tokens_of_an_expert_go_there_and_back
            tokens_are_drawn_as_often_as_they_are_likely
            what_cannot_be_packed_is_noticed
        }
    };
}
#[allow(unused_imports, reason = "each test binary uses a part")]
pub(crate) use every_case;

pub const DTYPES: [WeightDtype; 3] = [WeightDtype::Bf16, WeightDtype::F16, WeightDtype::F32];
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
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 2.0
    };
    (0..count).map(next).collect()
}

pub fn encode(dtype: WeightDtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        WeightDtype::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        WeightDtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        WeightDtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

fn decode(dtype: WeightDtype, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    dtype.decode(bytes, &mut values);
    values
}

/// The values as a GPU's f16 buffer holds them.
fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| f16::from_f32(*v).to_f32()).collect()
}

/// A buffer of its own, so that reading or writing beyond it is noticed.
pub fn buffer(gpu: &Arc<Gpu>, len: usize) -> Region {
    Region::new(&gpu.allocate("a test", Bytes(len as u64)).unwrap(), 0, len)
}

fn upload(gpu: &Arc<Gpu>, bytes: &[u8]) -> Region {
    let region = buffer(gpu, bytes.len());
    region.write(bytes).unwrap();
    region
}

/// What blocks that share a result need.
fn scratch(gpu: &Arc<Gpu>, [parts, arrivals]: [usize; 2]) -> Scratch {
    let scratch = Scratch { parts: buffer(gpu, parts), arrivals: buffer(gpu, arrivals) };
    scratch.arrivals.clear().unwrap();
    scratch
}

/// The same for products.
fn product_scratch(gpu: &Arc<Gpu>) -> Scratch {
    scratch(gpu, [CUDA_FEW_BLOCKS * CUDA_FEW_PARTS * 4, CUDA_FEW_BLOCKS * 4])
}

/// A position, as kernels read it.
fn placed(gpu: &Arc<Gpu>, position: usize) -> Region {
    let region = buffer(gpu, 4);
    region.fill(position as u32).unwrap();
    region
}

fn halves(gpu: &Arc<Gpu>, values: &[f32]) -> Region {
    upload(gpu, &encode(WeightDtype::F16, values))
}

fn floats(gpu: &Arc<Gpu>, values: &[f32]) -> Region {
    upload(gpu, &encode(WeightDtype::F32, values))
}

fn download(region: &Region, dtype: WeightDtype) -> Vec<f32> {
    let mut bytes = vec![0; region.len()];
    region.read(&mut bytes).unwrap();
    decode(dtype, &bytes)
}

fn vector(gpu: &Arc<Gpu>, dtype: WeightDtype, values: &[f32]) -> DeviceMatrix {
    let layout = MatrixLayout::new(Storage::Plain(dtype), 1, values.len()).unwrap();
    let mut bytes = encode(dtype, values);
    bytes.resize(layout.size().as_usize().unwrap(), 0);
    DeviceMatrix::new(layout, upload(gpu, &bytes))
}

/// A matrix as the host packs it.
pub fn packed(layout: &MatrixLayout, weights: &[f32]) -> Vec<u8> {
    let mut matrix = vec![0; layout.size().as_usize().unwrap()];
    let mut put = |at: u64, section: &[u8]| matrix[at as usize..at as usize + section.len()].copy_from_slice(section);
    if let Storage::Plain(dtype) = layout.storage {
        put(layout.codes_at(0), &encode(dtype, weights));
        return matrix;
    }
    let mut rows = PackedRows::default();
    quantize_rows(layout, WeightDtype::F32, &encode(WeightDtype::F32, weights), &mut rows).unwrap();
    put(layout.codes_at(0), &rows.codes);
    put(layout.sub_scales_at(0), &rows.sub_scales);
    put(layout.scales_at(0), &rows.scales);
    matrix
}

#[track_caller]
fn near(what: &str, ours: &[f32], exact: &[f64], tolerance: f64, output: Output) {
    assert_eq!(ours.len(), exact.len(), "{what}");
    let rounding = if output == Output::F16 { 0.0006 } else { 2e-6 };
    for (i, (ours, exact)) in ours.iter().zip(exact).enumerate() {
        let allowed = tolerance + rounding * exact.abs() + if output == Output::F16 { 1e-7 } else { 0.0 };
        assert!((f64::from(*ours) - exact).abs() <= allowed, "{what}, element {i}: {ours}, not {exact}");
    }
}

/// Quantizes `weights` from row `first` of a matrix on; gives the rows, and whether it failed.
fn quantized(
    gpu: &Arc<Gpu>,
    layout: &MatrixLayout,
    first: usize,
    dtype: WeightDtype,
    bytes: &[u8],
) -> (PackedRows, bool) {
    let rows = bytes.len() / (layout.cols * dtype.size());
    let region = buffer(gpu, layout.size().as_usize().unwrap());
    let failed = upload(gpu, &[0; 4]);
    let matrix = DeviceMatrix::new(layout.clone(), region.clone());
    gpu.quantize(&matrix, first, rows, dtype, &upload(gpu, bytes), &failed).unwrap();
    let section = |at: u64, row: usize| {
        let mut bytes = vec![0; rows * row];
        if row > 0 {
            region.part(at as usize, bytes.len()).read(&mut bytes).unwrap();
        }
        bytes
    };
    let packed = PackedRows {
        codes: section(layout.codes_at(first), layout.code_row),
        sub_scales: section(layout.sub_scales_at(first), layout.sub_scale_row),
        scales: section(layout.scales_at(first), layout.scale_row),
    };
    (packed, download(&failed, WeightDtype::F32)[0].to_bits() != 0)
}

/// Rows that try the corners of the search: zeros, ties, extremes and numbers of every size.
fn corners(cols: usize) -> Vec<Vec<f32>> {
    let row = |f: &dyn Fn(usize) -> f32| (0..cols).map(f).collect();
    vec![
        row(&|_| 0.0),
        row(&|k| if k == cols / 2 { -3.0 } else { 0.0 }),
        row(&|k| (k % 16) as f32 - 8.0),
        row(&|k| (k % 31) as f32 * 0.5),
        row(&|_| 1e-6),
        row(&|k| if k % 2 == 0 { 1e-42 } else { 0.0 }),
        row(&|k| (k as f32 * 0.37).sin() * 10f32.powf((k % 9) as f32 - 5.0)),
        row(&|k| (k as f32 * 0.61).cos() * 3000.0),
        row(&|k| -0.0 * k as f32),
    ]
}

pub fn quantizing_is_bit_for_bit_the_hosts(gpu: &Arc<Gpu>) {
    for storage in [Storage::Int8, Storage::Int4, Storage::Nl4] {
        for dtype in DTYPES {
            for (rows, cols) in [(1, 1), (3, 5), (7, 31), (2, 32), (3, 33), (5, 100), (2, 768), (1, 5000)] {
                for (first, weights) in
                    [(0, random(rows * cols, 1)), (4, random(rows * cols, 2).iter().map(|w| w * w * w).collect())]
                {
                    same(gpu, storage, first, rows, cols, dtype, &weights);
                }
            }
            for cols in [5, 32, 96] {
                for (at, weights) in corners(cols).into_iter().enumerate() {
                    same(gpu, storage, at, 1, cols, dtype, &weights);
                }
            }
        }
    }
}

fn same(gpu: &Arc<Gpu>, storage: Storage, first: usize, rows: usize, cols: usize, dtype: WeightDtype, weights: &[f32]) {
    let what = format!("{storage:?} from {dtype:?}, {rows} rows of {cols} from row {first}");
    let layout = MatrixLayout::new(storage, first + rows + 1, cols).unwrap();
    let bytes = encode(dtype, weights);
    let mut host = PackedRows::default();
    quantize_rows(&layout, dtype, &bytes, &mut host).unwrap();
    let (ours, failed) = quantized(gpu, &layout, first, dtype, &bytes);
    assert!(!failed, "{what}");
    assert_eq!(ours.scales, host.scales, "{what}: scales");
    assert_eq!(ours.sub_scales, host.sub_scales, "{what}: sub-scales");
    assert_eq!(ours.codes, host.codes, "{what}: codes");
}

pub fn what_cannot_be_packed_is_noticed(gpu: &Arc<Gpu>) {
    for (storage, value) in [
        (Storage::Int8, f32::NAN),
        (Storage::Int8, f32::INFINITY),
        (Storage::Int4, f32::NAN),
        (Storage::Int4, f32::NEG_INFINITY),
        (Storage::Int4, 3e38),
        (Storage::Nl4, f32::NAN),
        (Storage::Nl4, f32::INFINITY),
        (Storage::Nl4, 3e38),
    ] {
        let (rows, cols) = (3, 70);
        let mut weights = random(rows * cols, 3);
        weights[cols + 66] = value;
        let layout = MatrixLayout::new(storage, rows, cols).unwrap();
        let (_, failed) = quantized(gpu, &layout, 0, WeightDtype::F32, &encode(WeightDtype::F32, &weights));
        assert!(failed, "{storage:?} {value}");
    }
}

pub fn products_equal_the_reference(gpu: &Arc<Gpu>) {
    let scratch = product_scratch(gpu);
    for storage in STORAGES {
        for (rows, cols, tokens) in [
            (1, 1, 1),
            (3, 5, 2),
            (17, 31, 3),
            (16, 32, 8),
            (33, 33, 9),
            (40, 100, 12),
            (64, 256, 1),
            (5, 768, 7),
            (70, 72, 66),
            (130, 20, 10),
            (70, 456, 65),
            // Wide blocks, where a GPU has few multiprocessors.
            (650, 330, 70),
            (800, 136, 130),
            (18, 4200, 8),
            (3, 16_500, 1),
            (700, 1100, 1),
            (300, 2100, 3),
        ] {
            let layout = MatrixLayout::new(storage, rows, cols).unwrap();
            let bytes = packed(&layout, &random(rows * cols, 4));
            let matrix = DeviceMatrix::new(layout.clone(), upload(gpu, &bytes));
            let x = rounded(&random(tokens * cols, 5));
            let product = reference::matmul(&Matrix::new(&layout, &bytes), &x, tokens);
            let shift = random(rows, 6);
            let bias = vector(gpu, WeightDtype::F32, &shift);
            let before = random(tokens * rows, 7);
            for (output, factor) in [(Output::F16, 1.0), (Output::F32, 0.5), (Output::Add, 2.0)] {
                let bias = (output == Output::F32).then_some(&bias);
                let dtype = if output == Output::F16 { WeightDtype::F16 } else { WeightDtype::F32 };
                let y = upload(gpu, &encode(dtype, &before));
                let (affine, x) = (Affine::new(&matrix, bias), halves(gpu, &x));
                gpu.matmul(&affine, Input::Half(&x), tokens, (&y, output, factor), &scratch).unwrap();
                let exact: Vec<f64> = product
                    .iter()
                    .enumerate()
                    .map(|(i, y)| {
                        let onto = if output == Output::Add { f64::from(before[i]) } else { 0.0 };
                        onto + f64::from(factor) * (y + bias.map_or(0.0, |_| f64::from(shift[i % rows])))
                    })
                    .collect();
                let what = format!("{storage:?} {rows}×{cols}, {tokens} tokens, {output:?}");
                near(&what, &download(&y, dtype), &exact, 2e-6 * (cols as f64).sqrt(), output);
            }
            // Some of the rows, as those of a fused matrix.
            let (first, last) = (rows / 3, rows - rows / 4);
            let y = buffer(gpu, tokens * (last - first) * 4);
            let affine = Affine::new(&matrix, Some(&bias)).slice(first..last);
            gpu.matmul(&affine, Input::Half(&halves(gpu, &x)), tokens, (&y, Output::F32, 1.0), &scratch).unwrap();
            let exact: Vec<f64> = (0..tokens)
                .flat_map(|token| (first..last).map(move |row| (token, row)))
                .map(|(token, row)| product[token * rows + row] + f64::from(shift[row]))
                .collect();
            let what = format!("{storage:?} {rows}×{cols}, rows {first} to {last}");
            near(&what, &download(&y, WeightDtype::F32), &exact, 2e-6 * (cols as f64).sqrt(), Output::F32);
        }
    }
}

/// A matrix of random weights and a bias, on the GPU.
fn random_affine(gpu: &Arc<Gpu>, storage: Storage, rows: usize, cols: usize, seed: u64) -> [DeviceMatrix; 2] {
    let layout = MatrixLayout::new(storage, rows, cols).unwrap();
    let bytes = packed(&layout, &random(rows * cols, seed));
    [DeviceMatrix::new(layout, upload(gpu, &bytes)), vector(gpu, WeightDtype::F32, &random(rows, seed + 100))]
}

pub fn products_in_one_launch_are_those_of_each(gpu: &Arc<Gpu>) {
    let scratch = product_scratch(gpu);
    for storages in STORAGES.map(|storage| [storage; 3]).into_iter().chain([
        [Storage::Int4, Storage::Int4, Storage::Int8],
        [Storage::Nl4, Storage::Plain(WeightDtype::Bf16), Storage::Int4],
    ]) {
        for (rows, cols, tokens) in
            [([40, 7, 16], 72, 1), ([64, 130, 9], 100, 5), ([3, 65, 128], 33, 70), ([300, 900, 70], 72, 70)]
        {
            let x = halves(gpu, &random(tokens * cols, 5));
            let matrices: Vec<_> =
                (0..3).map(|at| random_affine(gpu, storages[at], rows[at], cols, 30 + at as u64)).collect();
            let affines: Vec<_> = matrices.iter().map(|[weight, bias]| Affine::new(weight, Some(bias))).collect();
            let outputs = || rows.map(|rows| buffer(gpu, tokens * rows * 2));
            let (together, alone) = (outputs(), outputs());
            let parts: Vec<_> = affines.iter().zip(&together).collect();
            gpu.matmuls(&parts, Input::Half(&x), tokens, &scratch).unwrap();
            for ((affine, y), together) in affines.iter().zip(&alone).zip(&together) {
                gpu.matmul(affine, Input::Half(&x), tokens, (y, Output::F16, 1.0), &scratch).unwrap();
                let (y, together) = (download(y, WeightDtype::F16), download(together, WeightDtype::F16));
                let what = format!("{storages:?}, {} rows of {cols}, {tokens} tokens", affine.rows());
                // What blocks share depends on all that is in the launch.
                let exact: Vec<f64> = y.into_iter().map(f64::from).collect();
                near(&what, &together, &exact, 1e-5, Output::F16);
            }
        }
    }
}

pub fn gates_are_applied_to_what_up_gives(gpu: &Arc<Gpu>) {
    let scratch = product_scratch(gpu);
    let pairs = STORAGES.map(|storage| [storage; 2]).into_iter().chain([[Storage::Int8, Storage::Nl4]]);
    for [gate_storage, up_storage] in pairs {
        for (rows, cols, tokens) in [(1, 33, 1), (40, 72, 3), (17, 100, 8), (70, 40, 9), (130, 33, 66), (400, 72, 70)] {
            let what = format!("{gate_storage:?} and {up_storage:?}, {rows}×{cols}, {tokens} tokens");
            let x = halves(gpu, &random(tokens * cols, 5));
            let [gate, gate_bias] = random_affine(gpu, gate_storage, rows, cols, 40);
            let [up, up_bias] = random_affine(gpu, up_storage, rows, cols, 41);
            let (gate, up) = (Affine::new(&gate, Some(&gate_bias)), Affine::new(&up, Some(&up_bias)));
            let [of_gate, of_up] = [&gate, &up].map(|affine| {
                let y = buffer(gpu, tokens * rows * 4);
                gpu.matmul(affine, Input::Half(&x), tokens, (&y, Output::F32, 1.0), &scratch).unwrap();
                download(&y, WeightDtype::F32)
            });
            let silu = |x: f32| f64::from(x) / (1.0 + (-f64::from(x)).exp());
            for has_gate in [true, false] {
                let exact: Vec<f64> = of_gate
                    .iter()
                    .zip(&of_up)
                    .map(|(gate, up)| if has_gate { silu(*gate) * f64::from(*up) } else { silu(*up) })
                    .collect();
                let (y, apart) = (buffer(gpu, tokens * rows * 2), buffer(gpu, tokens * rows * 2));
                let gate = has_gate.then_some(&gate);
                let rooms = [&y, &apart];
                gpu.gated(Activation::Silu, (gate, &up), Input::Half(&x), tokens, rooms, &scratch).unwrap();
                // Where both are multiplied apart, they are rounded to f16 between.
                let tolerance = if gate_storage == up_storage { 1e-5 } else { 0.02 };
                near(&what, &download(&y, WeightDtype::F16), &exact, tolerance, Output::F16);
            }
        }
    }
}

pub fn hidden_states_are_normalized_on_the_way(gpu: &Arc<Gpu>) {
    let scratch = product_scratch(gpu);
    for storage in STORAGES {
        for (rows, cols, tokens) in [(40, 33, 1), (20, 72, 8), (330, 1100, 2), (70, 64, 9)] {
            let [matrix, bias] = random_affine(gpu, storage, rows, cols, 50);
            let other = random_affine(gpu, Storage::Int8, rows, cols, 51);
            let (affine, other) = (Affine::new(&matrix, Some(&bias)), Affine::new(&other[0], None));
            let states = floats(gpu, &random(tokens * cols, 52).iter().map(|v| v * 5.0 + 1.0).collect::<Vec<_>>());
            let weight = vector(gpu, WeightDtype::Bf16, &random(cols, 53));
            let shift = vector(gpu, WeightDtype::F32, &random(cols, 54));
            for kind in [None, Some(NormKind::Rms), Some(NormKind::RmsPlusOne), Some(NormKind::Layer)] {
                let bias = (kind == Some(NormKind::Layer)).then_some(&shift);
                let norm = kind.map(|kind| Norm { kind, epsilon: 1e-5, affine: Affine::new(&weight, bias) });
                let [before, normed] = [0; 2].map(|_| buffer(gpu, tokens * cols * 2));
                let shape = (tokens, cols);
                let f32 = WeightDtype::F32;
                gpu.normalize(norm.as_ref(), (&states, f32), shape, &before, Output::F16, 1.0).unwrap();
                let on_the_way = Input::Hidden { states: &states, norm: norm.as_ref(), normed: &normed };
                let [ours, wanted] = [on_the_way, Input::Half(&before)].map(|x| {
                    let [y, up, single, other_y] = [0; 4].map(|_| buffer(gpu, tokens * rows * 2));
                    gpu.gated(Activation::Silu, (Some(&affine), &affine), x, tokens, [&y, &up], &scratch).unwrap();
                    gpu.matmuls(&[(&affine, &single), (&other, &other_y)], x, tokens, &scratch).unwrap();
                    [y, single, other_y].map(|y| download(&y, WeightDtype::F16))
                });
                assert_eq!(ours, wanted, "{kind:?}, {storage:?}, {rows}×{cols}, {tokens} tokens");
            }
        }
    }
}

pub fn nan_and_what_overflows_stay_with_their_token(gpu: &Arc<Gpu>) {
    let scratch = product_scratch(gpu);
    for storage in STORAGES {
        for (rows, cols, tokens) in [(17, 40, 4), (17, 40, 12)] {
            let layout = MatrixLayout::new(storage, rows, cols).unwrap();
            let matrix = DeviceMatrix::new(layout.clone(), upload(gpu, &packed(&layout, &vec![1.0; rows * cols])));
            let mut x = vec![1.0; tokens * cols];
            x[cols + 3] = f32::NAN;
            x[2 * cols..3 * cols].fill(65504.0);
            let y = buffer(gpu, tokens * rows * 2);
            let (affine, x) = (Affine::new(&matrix, None), halves(gpu, &x));
            gpu.matmul(&affine, Input::Half(&x), tokens, (&y, Output::F16, 1.0), &scratch).unwrap();
            for (i, y) in download(&y, WeightDtype::F16).iter().enumerate() {
                let what = format!("{storage:?}, {tokens} tokens, element {i}: {y}");
                match i / rows {
                    1 => assert!(y.is_nan(), "{what}"),
                    2 => assert_eq!(*y, 65504.0, "{what}"),
                    _ => assert!((y - cols as f32).abs() < 0.1, "{what}"),
                }
            }
        }
    }
}

pub fn norms_equal_the_reference(gpu: &Arc<Gpu>) {
    for (rows, width) in [(1, 1), (3, 5), (2, 64), (5, 300), (1, 4097)] {
        for kind in [NormKind::Rms, NormKind::RmsPlusOne, NormKind::Layer] {
            let offset = if kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
            for (dtype, factor, output) in [
                (WeightDtype::F32, 1.0, Output::F16),
                (WeightDtype::Bf16, 0.5, Output::F32),
                (WeightDtype::F16, 3.0, Output::Add),
            ] {
                let x_dtype = if output == Output::F32 { WeightDtype::F16 } else { WeightDtype::F32 };
                let x = decode(x_dtype, &encode(x_dtype, &random(rows * width, 8)));
                let weight = decode(dtype, &encode(dtype, &random(width, 9)));
                let shift = decode(dtype, &encode(dtype, &random(width, 10)));
                let before = random(rows * width, 11);
                let has_bias = kind == NormKind::Layer;
                let exact: Vec<f64> = x
                    .chunks(width)
                    .zip(before.chunks(width))
                    .flat_map(|(x, before)| {
                        let mean =
                            |f: &dyn Fn(f64) -> f64| x.iter().map(|x| f(f64::from(*x))).sum::<f64>() / width as f64;
                        let centre = if kind == NormKind::Layer { mean(&|x| x) } else { 0.0 };
                        let inverse = 1.0 / (mean(&|x| (x - centre).powi(2)) + 1e-5).sqrt();
                        let value = |i: usize| {
                            let bias = if has_bias { f64::from(shift[i]) } else { 0.0 };
                            let onto = if output == Output::Add { f64::from(before[i]) } else { 0.0 };
                            let y = (f64::from(x[i]) - centre) * inverse * f64::from(weight[i] + offset) + bias;
                            y * f64::from(factor) + onto
                        };
                        (0..width).map(value).collect::<Vec<_>>()
                    })
                    .collect();
                let (weight, shift) = (vector(gpu, dtype, &weight), vector(gpu, dtype, &shift));
                let bias = has_bias.then_some(&shift);
                let norm = Norm { kind, epsilon: 1e-5, affine: Affine::new(&weight, bias) };
                let y_dtype = if output == Output::F16 { WeightDtype::F16 } else { WeightDtype::F32 };
                let y = upload(gpu, &encode(y_dtype, &before));
                let x = upload(gpu, &encode(x_dtype, &x));
                gpu.normalize(Some(&norm), (&x, x_dtype), (rows, width), &y, output, factor).unwrap();
                let what = format!("{kind:?} of {rows}×{width}, {output:?}");
                near(&what, &download(&y, y_dtype), &exact, 2e-5, output);
            }
        }
    }
    let x = random(21, 12);
    let in_place = floats(gpu, &x);
    let weight = vector(gpu, WeightDtype::F32, &[2.0; 7]);
    let norm = Norm { kind: NormKind::Rms, epsilon: 0.0, affine: Affine::new(&weight, None) };
    gpu.normalize(Some(&norm), (&in_place, WeightDtype::F32), (3, 7), &in_place, Output::F32, 1.0).unwrap();
    let squares: Vec<f32> =
        download(&in_place, WeightDtype::F32).chunks(7).map(|y| y.iter().map(|y| y * y).sum()).collect();
    assert!(squares.iter().all(|sum| (sum - 28.0).abs() < 1e-3), "{squares:?}");
    let y = buffer(gpu, 42);
    gpu.normalize(None, (&floats(gpu, &x), WeightDtype::F32), (3, 7), &y, Output::F16, 1.0).unwrap();
    assert_eq!(download(&y, WeightDtype::F16), rounded(&x));
}

/// A cache of one dtype: `vectors` of `head_dim` as the host stores them, on the GPU, and as they read back.
struct TestCache {
    layout: KvLayout,
    regions: [Region; 2],
    stored: [Vec<f32>; 2],
}

impl TestCache {
    fn new(gpu: &Arc<Gpu>, dtype: KvDtype, head_dim: usize, values: [&[f32]; 2]) -> Self {
        let vectors = values[0].len() / head_dim;
        let codes = (vectors * dtype.code_bytes(head_dim)).next_multiple_of(4);
        let layout = KvLayout { dtype, codes, scales: vectors * dtype.scale_bytes() };
        let each = values.map(|values| {
            let mut bytes = vec![0u8; layout.codes + layout.scales];
            for (at, vector) in values.chunks(head_dim).enumerate() {
                let width = dtype.code_bytes(head_dim);
                let mut words = vec![0u32; width.div_ceil(4)];
                let scale = dtype.encode(vector, &mut bytemuck::cast_slice_mut(&mut words)[..width]);
                bytes[at * width..][..width].copy_from_slice(&bytemuck::cast_slice(&words)[..width]);
                if layout.scales > 0 {
                    bytes[layout.codes + at * 4..][..4].copy_from_slice(&scale.to_le_bytes());
                }
            }
            (upload(gpu, &bytes), Self::decode(layout, head_dim, &bytes))
        });
        let [(keys, stored_keys), (values, stored_values)] = each;
        Self { layout, regions: [keys, values], stored: [stored_keys, stored_values] }
    }

    fn decode(layout: KvLayout, head_dim: usize, bytes: &[u8]) -> Vec<f32> {
        let width = layout.dtype.code_bytes(head_dim);
        let mut values = Vec::new();
        for (at, codes) in bytes[..layout.codes / width * width].chunks(width).enumerate() {
            let scale = bytes[layout.codes..].as_chunks().0.get(at).map_or(1.0, |bytes| f32::from_le_bytes(*bytes));
            // Aligned as the decoder wants it.
            let mut words = vec![0u32; width.div_ceil(4)];
            bytemuck::cast_slice_mut(&mut words)[..width].copy_from_slice(codes);
            let mut vector = vec![0.0; head_dim];
            layout.dtype.decode(&bytemuck::cast_slice(&words)[..width], scale, &mut vector);
            values.extend(vector);
        }
        values
    }

    fn cache(&self) -> Cache {
        Cache::new(self.layout, &self.regions)
    }

    fn read_back(&self, which: usize, head_dim: usize) -> Vec<f32> {
        let mut bytes = vec![0; self.regions[which].len()];
        self.regions[which].read(&mut bytes).unwrap();
        Self::decode(self.layout, head_dim, &bytes)
    }
}

/// Softmax over all keys that each query sees, in f64; and for each element the root of the sum of the squares
/// of its terms, by which what comes of their rounding is measured.
fn attention(shape: &Attention, query: &[f32], keys: &[f32], values: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let width = shape.head_dim;
    let (mut out, mut spread) = (Vec::new(), Vec::new());
    for (at, query) in query.chunks(width).enumerate() {
        let (token, head) = (at / shape.heads, at % shape.heads);
        let last = shape.position + token;
        let first = if shape.window > 0 { (last + 1).saturating_sub(shape.window) } else { 0 };
        let row = |cache: &'_ [f32], key: usize, d: usize| {
            f64::from(cache[(head * shape.kv_heads / shape.heads * shape.context + key) * width + d])
        };
        let score = |key: usize| {
            let dot: f64 =
                (0..width).map(|d| f64::from(query[d]) * row(keys, key, d)).sum::<f64>() * f64::from(shape.scale);
            let cap = f64::from(shape.softcap);
            if cap > 0.0 { cap * (dot / cap).tanh() } else { dot }
        };
        let weights: Vec<f64> = (first..=last).map(|key| score(key).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for d in 0..width {
            let terms = (first..=last).map(|key| weights[key - first] / sum * row(values, key, d));
            out.push(terms.clone().sum());
            spread.push(terms.map(|term| term * term).sum::<f64>().sqrt());
        }
    }
    (out, spread)
}

pub fn attention_equals_the_reference(gpu: &Arc<Gpu>) {
    for (heads, kv_heads, head_dim, position, tokens, window, softcap) in [
        (1, 1, 2, 0, 1, 0, 0.0),
        (4, 2, 16, 0, 5, 0, 0.0),
        (6, 2, 20, 3, 4, 0, 30.0),
        (2, 1, 64, 140, 2, 0, 0.0),
        (2, 2, 66, 300, 1, 130, 0.0),
        (4, 1, 8, 2, 9, 3, 5.0),
        (1, 1, 256, 127, 2, 0, 0.0),
        (1, 1, 512, 5, 1, 0, 0.0),
        (10, 2, 24, 700, 1, 0, 0.0),
        (4, 2, 16, 1500, 3, 900, 20.0),
        (3, 3, 130, 2100, 1, 0, 0.0),
        (2, 1, 4, 300, 280, 0, 0.0),
        (4, 2, 64, 0, 40, 0, 0.0),
        (4, 1, 128, 100, 35, 0, 0.0),
        (3, 3, 80, 5, 70, 30, 0.0),
        (6, 2, 256, 37, 20, 0, 20.0),
        (2, 1, 192, 300, 9, 0, 0.0),
        (4, 1, 32, 700, 33, 130, 50.0),
        (7, 1, 128, 200, 67, 1, 0.0),
    ] {
        let context = position + tokens + 3;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = Attention { heads, kv_heads, head_dim, context, position, tokens, window, scale, softcap };
        let random_cache =
            |seed| random(kv_heads * context * head_dim, seed).iter().map(|v| v * 2.0).collect::<Vec<_>>();
        let query = rounded(&random(tokens * heads * head_dim, 13));
        let scratch = scratch(gpu, CudaAttention::scratch(heads, kv_heads, head_dim, tokens, context));
        for dtype in KvDtype::ALL {
            let cache = TestCache::new(gpu, dtype, head_dim, [&random_cache(14), &random_cache(15)]);
            let (exact, spread) = attention(&shape, &query, &cache.stored[0], &cache.stored[1]);
            // A step leaves the counts as the next one needs them.
            for _ in 0..2 {
                let out = buffer(gpu, tokens * heads * head_dim * 2);
                let (query, cache) = (halves(gpu, &query), cache.cache());
                gpu.attend(&shape, &query, &cache, &out, &placed(gpu, position), &scratch).unwrap();
                let ours = download(&out, WeightDtype::F16);
                // Tensor cores take weights and values as f16.
                let rounding = if tokens > 8 { 1.5e-3 } else { 0.0 };
                for (i, (exact, spread)) in exact.iter().zip(&spread).enumerate() {
                    let what = format!("{shape:?} {dtype} {i}");
                    near(&what, &ours[i..=i], &[*exact], 1e-5 + rounding * spread, Output::F16);
                }
            }
        }
    }
}

pub fn rotation_equals_the_reference(gpu: &Arc<Gpu>) {
    for (heads, kv_heads, head_dim, pairs, position, tokens, factor) in
        [(4, 2, 16, 8, 0, 3, 1.0), (3, 1, 10, 5, 1000, 2, 1.0), (2, 2, 64, 16, 7, 4, 1.25), (2, 1, 8, 0, 1, 1, 1.0)]
    {
        let (context, scale) = (position + tokens + 1, 1.0);
        let shape = Attention { heads, kv_heads, head_dim, context, position, tokens, window: 0, scale, softcap: 0.0 };
        let frequencies: Vec<f32> = (0..pairs).map(|i| 10f32.powf(-(i as f32) / 4.0)).collect();
        let input = |heads: usize, seed| rounded(&random(tokens * heads * head_dim, seed));
        let (query, key, value) = (input(heads, 16), input(kv_heads, 17), input(kv_heads, 18));
        let rotate = |x: &[f32], heads: usize| -> Vec<f64> {
            let mut y: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            for (at, head) in y.chunks_mut(head_dim).enumerate() {
                for i in 0..pairs {
                    let angle = f64::from((position + at / heads) as f32 * frequencies[i]);
                    let (sin, cos) = (angle.sin() * f64::from(factor), angle.cos() * f64::from(factor));
                    let (a, b) = (head[i], head[i + pairs]);
                    (head[i], head[i + pairs]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
            y
        };
        let before = random(kv_heads * context * head_dim, 19);
        for dtype in KvDtype::ALL {
            let queries = halves(gpu, &query);
            let cache = TestCache::new(gpu, dtype, head_dim, [&before, &before]);
            let table = floats(gpu, &frequencies);
            let rope = (pairs > 0).then_some((&table, factor));
            let inputs = [&queries, &halves(gpu, &key), &halves(gpu, &value)];
            let (at, no_norms) = (placed(gpu, position), [None; 2]);
            gpu.rotate_and_store(&shape, inputs, no_norms, &cache.cache(), &at, rope).unwrap();
            let what = format!("{shape:?}, {pairs} pairs, {dtype}");

            // What is normalized on the way is what is normalized before.
            let weights = [20, 21].map(|seed| vector(gpu, WeightDtype::Bf16, &random(head_dim, seed)));
            let norm = |weight| Norm { kind: NormKind::Rms, epsilon: 1e-5, affine: Affine::new(weight, None) };
            let norms = weights.each_ref().map(norm);
            let [on_the_way, first] = [true, false].map(|on_the_way| {
                let cache = TestCache::new(gpu, dtype, head_dim, [&before, &before]);
                let (query, key) = (halves(gpu, &query), halves(gpu, &key));
                let given = norms.each_ref().map(|norm| on_the_way.then_some(norm));
                for (x, heads, norm) in [(&query, heads, &norms[0]), (&key, kv_heads, &norms[1])] {
                    if !on_the_way {
                        let (x, shape) = ((x, WeightDtype::F16), (tokens * heads, head_dim));
                        gpu.normalize(Some(norm), x, shape, x.0, Output::F16, 1.0).unwrap();
                    }
                }
                let inputs = [&query, &key, &halves(gpu, &value)];
                gpu.rotate_and_store(&shape, inputs, given, &cache.cache(), &at, rope).unwrap();
                [download(&query, WeightDtype::F16), cache.read_back(0, head_dim), cache.read_back(1, head_dim)]
            });
            assert_eq!(on_the_way, first, "{what}");

            near(&what, &download(&queries, WeightDtype::F16), &rotate(&query, heads), 1e-6, Output::F16);
            let stored = |rows: &[f64], unchanged: &[f32]| {
                let mut all: Vec<f64> = unchanged.iter().map(|v| f64::from(*v)).collect();
                for (at, row) in rows.chunks(head_dim).enumerate() {
                    let (token, head) = (at / kv_heads, at % kv_heads);
                    all[(head * context + position + token) * head_dim..][..head_dim].copy_from_slice(row);
                }
                all
            };
            let step = match dtype {
                KvDtype::F32 => 1e-6,
                KvDtype::F16 => 1e-3,
                KvDtype::Bf16 => 1e-2,
                KvDtype::Int8 => 1.3 / 127.0,
            };
            let value: Vec<f64> = value.iter().map(|v| f64::from(*v)).collect();
            for (which, rows) in [rotate(&key, kv_heads), value].iter().enumerate() {
                let exact = stored(rows, &cache.stored[which]);
                near(&what, &cache.read_back(which, head_dim), &exact, step, Output::F32);
            }
        }
    }
}

pub fn embeddings_are_the_rows(gpu: &Arc<Gpu>) {
    for storage in STORAGES {
        for cols in [5, 32, 300] {
            let layout = MatrixLayout::new(storage, 7, cols).unwrap();
            let bytes = packed(&layout, &random(7 * cols, 20));
            let tokens = [6u32, 0, 3, 3];
            let hidden = buffer(gpu, tokens.len() * cols * 4);
            let matrix = DeviceMatrix::new(layout.clone(), upload(gpu, &bytes));
            let ids: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
            let ids = upload(gpu, &ids);
            gpu.embed(&Affine::new(&matrix, None), &ids, 2.0, &hidden, Output::F32).unwrap();
            let mut row = vec![0.0; cols];
            let exact: Vec<f64> = tokens
                .iter()
                .flat_map(|token| {
                    Matrix::new(&layout, &bytes).dequantize_row(*token as usize, &mut row);
                    row.iter().map(|v| 2.0 * f64::from(*v)).collect::<Vec<_>>()
                })
                .collect();
            near(&format!("{storage:?}, {cols}"), &download(&hidden, WeightDtype::F32), &exact, 0.0, Output::F32);
            gpu.embed(&Affine::new(&matrix, None), &ids, -1.0, &hidden, Output::Add).unwrap();
            let halved: Vec<f64> = exact.iter().map(|v| v / 2.0).collect();
            near(
                &format!("{storage:?}, {cols}, added"),
                &download(&hidden, WeightDtype::F32),
                &halved,
                1e-6,
                Output::F32,
            );
        }
    }
}

pub fn activations_equal_the_reference(gpu: &Arc<Gpu>) {
    // erf by its series, which converges for the arguments here.
    let erf = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    };
    let exact = |activation, x: f64| match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
        }
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
    };
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
        for count in [1, 255, 600] {
            let gate: Vec<f32> = rounded(&random(count, 21).iter().map(|v| v * 4.0).collect::<Vec<_>>());
            let up = rounded(&random(count, 22));
            for with_up in [true, false] {
                let (ours, factor) = (halves(gpu, &gate), halves(gpu, &up));
                gpu.activate(activation, &ours, with_up.then_some(&factor), count).unwrap();
                let value =
                    |i: usize| exact(activation, f64::from(gate[i])) * if with_up { f64::from(up[i]) } else { 1.0 };
                let exact: Vec<f64> = (0..count).map(value).collect();
                near(
                    &format!("{activation:?}, {count}"),
                    &download(&ours, WeightDtype::F16),
                    &exact,
                    1e-6,
                    Output::F16,
                );
            }
        }
    }
    let (gate, up) = (halves(gpu, &[60_000.0, f32::NAN]), halves(gpu, &[1000.0, 1.0]));
    gpu.activate(Activation::Silu, &gate, Some(&up), 2).unwrap();
    let ours = download(&gate, WeightDtype::F16);
    assert!(ours[0] == 65_504.0 && ours[1].is_nan(), "{ours:?}");
}

pub fn the_tokens_of_an_expert_go_there_and_back(gpu: &Arc<Gpu>) {
    let (width, tokens) = (300, [4u32, 0, 2]);
    let (x, y, before) = (rounded(&random(5 * width, 24)), random(3 * width, 25), random(5 * width, 26));
    let ids: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    let (ids, out) = (upload(gpu, &ids), buffer(gpu, 3 * width * 2));
    gpu.gather(&halves(gpu, &x), &ids, width, &out).unwrap();
    let rows: Vec<f32> = tokens.iter().flat_map(|token| x[*token as usize * width..][..width].to_vec()).collect();
    assert_eq!(download(&out, WeightDtype::F16), rows);
    let (weights, sum) = ([0.5f32, -1.0, 2.0], floats(gpu, &before));
    gpu.scatter_add(&floats(gpu, &y), &ids, &floats(gpu, &weights), width, &sum).unwrap();
    let mut exact: Vec<f64> = before.iter().map(|v| f64::from(*v)).collect();
    for (at, token) in tokens.iter().enumerate() {
        for i in 0..width {
            exact[*token as usize * width + i] += f64::from(weights[at]) * f64::from(y[at * width + i]);
        }
    }
    near("the sum", &download(&sum, WeightDtype::F32), &exact, 1e-6, Output::F32);
}
