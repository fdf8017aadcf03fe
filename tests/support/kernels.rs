//! One table of cases for the GPU's kernels, for the stand-in and for silicon: each against
//! plain scalar Rust.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::cast_possible_truncation, clippy::float_cmp, reason = "tests know their numbers")]

use std::sync::Arc;

use evenkeel::backend::cuda::{Affine, DeviceMatrix, Gpu, Norm, Output, Region, Scratch};
use evenkeel::bytes::Bytes;
use evenkeel::footprint::{CUDA_FEW_BLOCKS, CUDA_FEW_PARTS};
use evenkeel::model_config::{Activation, NormKind};
use evenkeel::pool::Pool;
use evenkeel::quant::{Matrix, MatrixLayout, PackedRows, Storage, WeightDtype, quantize_rows};
use half::{bf16, f16};

mod attention;
mod choices;
mod packing;
mod products;
#[allow(unused_imports, reason = "each test binary uses a part")]
pub use {attention::*, choices::*, packing::*, products::*};

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
            attention_of_several_sequences_equals_the_reference
            attention_over_a_ring_equals_the_reference
            attention_over_what_is_no_number_is_none
            a_ring_gives_what_the_whole_context_does
            embeddings_are_the_rows
            every_activation_ends_a_product
            nan_and_what_overflows_stay_with_their_token
            norms_equal_the_reference
            products_equal_the_reference
            products_of_bf16_weights_are_right_at_any_magnitude
            products_in_one_launch_are_those_of_each
            gates_are_applied_to_what_up_gives
            gated_values_beyond_the_range_of_f16_are_right_or_nan
            hidden_states_are_normalized_on_the_way
            quantizing_is_bit_for_bit_the_hosts
            rotation_equals_the_reference
            the_first_of_the_largest_logits_is_found
            the_tokens_of_an_expert_go_there_and_back
            a_number_that_names_no_row_reaches_none
            tokens_are_drawn_as_often_as_they_are_likely
            what_cannot_be_packed_is_noticed
        }
    };
}
#[allow(unused_imports, reason = "each test binary uses a part")]
pub(crate) use every_case;

pub const DTYPES: [WeightDtype; 3] = [WeightDtype::Bf16, WeightDtype::F16, WeightDtype::F32];
pub use evenkeel::verify::STORAGES;

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
    gpu.allocate("a test", Bytes(len as u64)).unwrap()
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
    if let Storage::Plain(dtype) = layout.storage {
        let mut matrix = encode(dtype, weights);
        matrix.resize(layout.size().as_usize().unwrap(), 0);
        return matrix;
    }
    let mut rows = PackedRows::default();
    quantize_rows(&Pool::default(), layout, WeightDtype::F32, &encode(WeightDtype::F32, weights), &mut rows).unwrap();
    rows.matrix(layout)
}

#[track_caller]
fn near(what: &str, ours: &[f32], exact: &[f64], tolerance: f64, output: Output) {
    near_each(what, ours, exact, |_| tolerance, output);
}

/// [`near`] with a tolerance for each element.
#[track_caller]
fn near_each(what: &str, ours: &[f32], exact: &[f64], tolerance: impl Fn(usize) -> f64, output: Output) {
    assert_eq!(ours.len(), exact.len(), "{what}");
    let rounding = if output == Output::F16 { 0.0006 } else { 2e-6 };
    for (i, (ours, exact)) in ours.iter().zip(exact).enumerate() {
        let allowed = tolerance(i) + rounding * exact.abs() + if output == Output::F16 { 1e-7 } else { 0.0 };
        assert!((f64::from(*ours) - exact).abs() <= allowed, "{what}, element {i}: {ours}, not {exact}");
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
                (WeightDtype::F16, 1.0, Output::F32),
                (WeightDtype::F32, 1.0, Output::F32),
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
                let affine = Affine::new(weight, has_bias.then_some(shift));
                let norm = Norm { kind, epsilon: 1e-5, affine: &affine };
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
    let affine = Affine::new(vector(gpu, WeightDtype::F32, &[2.0; 7]), None);
    let norm = Norm { kind: NormKind::Rms, epsilon: 0.0, affine: &affine };
    gpu.normalize(Some(&norm), (&in_place, WeightDtype::F32), (3, 7), &in_place, Output::F32, 1.0).unwrap();
    let squares: Vec<f32> =
        download(&in_place, WeightDtype::F32).chunks(7).map(|y| y.iter().map(|y| y * y).sum()).collect();
    assert!(squares.iter().all(|sum| (sum - 28.0).abs() < 1e-3), "{squares:?}");
    let y = buffer(gpu, 42);
    gpu.normalize(None, (&floats(gpu, &x), WeightDtype::F32), (3, 7), &y, Output::F16, 1.0).unwrap();
    assert_eq!(download(&y, WeightDtype::F16), rounded(&x));
}

pub fn embeddings_are_the_rows(gpu: &Arc<Gpu>) {
    for storage in STORAGES {
        for cols in [5, 32, 300] {
            let layout = MatrixLayout::new(storage, 7, cols).unwrap();
            let bytes = packed(&layout, &random(7 * cols, 20));
            let tokens = [6u32, 0, 3, 3];
            let hidden = buffer(gpu, tokens.len() * cols * 4);
            let affine = Affine::new(DeviceMatrix::new(layout.clone(), upload(gpu, &bytes)), None);
            let ids: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
            let ids = upload(gpu, &ids);
            gpu.embed(&affine, &ids, 2.0, &hidden, Output::F32).unwrap();
            let mut row = vec![0.0; cols];
            let exact: Vec<f64> = tokens
                .iter()
                .flat_map(|token| {
                    Matrix::new(&layout, &bytes).dequantize_row(*token as usize, &mut row);
                    row.iter().map(|v| 2.0 * f64::from(*v)).collect::<Vec<_>>()
                })
                .collect();
            near(&format!("{storage:?}, {cols}"), &download(&hidden, WeightDtype::F32), &exact, 0.0, Output::F32);
            gpu.embed(&affine, &ids, -1.0, &hidden, Output::Add).unwrap();
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
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::Relu => x.max(0.0),
    };
    let all = [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::QuickGelu, Activation::Relu];
    for activation in all {
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
    let gates = [60_000.0, f32::NAN, 32_752.0, -60_000.0, f32::INFINITY];
    let (gate, up) = (halves(gpu, &gates), halves(gpu, &[1000.0, 1.0, 2.0, 1000.0, 1.0]));
    gpu.activate(Activation::Relu, &gate, Some(&up), 5).unwrap();
    let ours = download(&gate, WeightDtype::F16);
    assert!([0, 1, 4].iter().all(|at| ours[*at].is_nan()) && ours[2..4] == [65_504.0, 0.0], "{ours:?}");
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

pub fn a_number_that_names_no_row_reaches_none(gpu: &Arc<Gpu>) {
    let (rows, width) = (3u32, 70);
    let ids: Vec<u8> = [2, rows, u32::MAX].iter().flat_map(|row| row.to_le_bytes()).collect();
    let ids = upload(gpu, &ids);
    // The rows that are there, then the others.
    let split = |region: &Region, dtype| {
        let values = download(region, dtype);
        (values[..width].to_vec(), values[width..].to_vec())
    };
    let weights = random(rows as usize * width, 27);
    for storage in STORAGES {
        let layout = MatrixLayout::new(storage, rows as usize, width).unwrap();
        let matrix = DeviceMatrix::new(layout.clone(), upload(gpu, &packed(&layout, &weights)));
        let hidden = buffer(gpu, 3 * width * 4);
        gpu.embed(&Affine::new(matrix, None), &ids, 1.0, &hidden, Output::F32).unwrap();
        let (there, others) = split(&hidden, WeightDtype::F32);
        assert!(there.iter().all(|v| v.is_finite()) && others.iter().all(|v| v.is_nan()), "{storage:?}");
    }
    let out = buffer(gpu, 3 * width * 2);
    gpu.gather(&halves(gpu, &weights), &ids, width, &out).unwrap();
    let (there, others) = split(&out, WeightDtype::F16);
    assert_eq!(there, rounded(&weights[2 * width..]));
    assert!(others.iter().all(|v| v.is_nan()));
    let sum = floats(gpu, &weights);
    gpu.scatter_add(&floats(gpu, &weights), &ids, &floats(gpu, &[0.0; 3]), width, &sum).unwrap();
    assert_eq!(download(&sum, WeightDtype::F32), weights);
}
