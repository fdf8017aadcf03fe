//! One table of cases for the GPU's kernels, for the stand-in and for silicon: each against
//! plain scalar Rust.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::cast_possible_truncation, clippy::float_cmp, reason = "tests know their numbers")]

use std::sync::Arc;

use evenkeel::backend::cuda::{Affine, DeviceMatrix, Gpu, Norm, Output, Region, Scratch};
use evenkeel::model_config::{Activation, NormKind};
use evenkeel::quant::{MatrixLayout, WeightDtype};
use evenkeel::verify;
pub use evenkeel::verify::{STORAGES, encode, random};

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
/// The values as a GPU's f16 buffer holds them.
fn rounded(values: &[f32]) -> Vec<f32> {
    verify::rounded(WeightDtype::F16, values)
}

/// A buffer of its own, so that reading or writing beyond it is noticed.
pub fn buffer(gpu: &Arc<Gpu>, len: usize) -> Region {
    verify::buffer(gpu, len).unwrap()
}

fn upload(gpu: &Arc<Gpu>, bytes: &[u8]) -> Region {
    verify::upload(gpu, bytes).unwrap()
}

/// What blocks that share a result need.
fn scratch(gpu: &Arc<Gpu>, bytes: [usize; 2]) -> Scratch {
    verify::scratch(gpu, bytes).unwrap()
}

/// The same for products.
fn product_scratch(gpu: &Arc<Gpu>) -> Scratch {
    verify::product_scratch(gpu).unwrap()
}

/// A position, as kernels read it.
fn placed(gpu: &Arc<Gpu>, position: usize) -> Region {
    verify::placed(gpu, position).unwrap()
}

fn halves(gpu: &Arc<Gpu>, values: &[f32]) -> Region {
    verify::halves(gpu, values).unwrap()
}

fn floats(gpu: &Arc<Gpu>, values: &[f32]) -> Region {
    verify::floats(gpu, values).unwrap()
}

fn download(region: &Region, dtype: WeightDtype) -> Vec<f32> {
    verify::download(region, dtype).unwrap()
}

fn vector(gpu: &Arc<Gpu>, dtype: WeightDtype, values: &[f32]) -> DeviceMatrix {
    verify::vector(gpu, dtype, values).unwrap()
}

/// A matrix as the host packs it.
pub fn packed(layout: &MatrixLayout, weights: &[f32]) -> Vec<u8> {
    verify::packed(layout, weights).unwrap()
}

#[track_caller]
fn near(what: &str, ours: &[f32], exact: &[f64], tolerance: f64, output: Output) {
    verify::near(what, ours, exact, tolerance, output).unwrap();
}

/// [`near`] with a tolerance for each element.
#[track_caller]
fn near_each(what: &str, ours: &[f32], exact: &[f64], tolerance: impl Fn(usize) -> f64, output: Output) {
    verify::near_each(what, ours, exact, tolerance, output).unwrap();
}

pub fn norms_equal_the_reference(gpu: &Arc<Gpu>) {
    for shape in [(1, 1), (3, 5), (2, 64), (5, 300), (1, 4097)] {
        for kind in [NormKind::Rms, NormKind::RmsPlusOne, NormKind::Layer] {
            verify::norm(gpu, kind, shape).unwrap();
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
            verify::embedding(gpu, storage, cols).unwrap();
        }
    }
}

pub fn activations_equal_the_reference(gpu: &Arc<Gpu>) {
    let all = [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::QuickGelu, Activation::Relu];
    for activation in all {
        for count in [1, 255, 600] {
            verify::activation(gpu, activation, count).unwrap();
        }
    }
    let gates = [60_000.0, f32::NAN, 32_752.0, -60_000.0, f32::INFINITY];
    let (gate, up) = (halves(gpu, &gates), halves(gpu, &[1000.0, 1.0, 2.0, 1000.0, 1.0]));
    gpu.activate(Activation::Relu, &gate, Some(&up), 5).unwrap();
    let ours = download(&gate, WeightDtype::F16);
    assert!([0, 1, 4].iter().all(|at| ours[*at].is_nan()) && ours[2..4] == [65_504.0, 0.0], "{ours:?}");
}

pub fn the_tokens_of_an_expert_go_there_and_back(gpu: &Arc<Gpu>) {
    verify::gathered(gpu, 300).unwrap();
    verify::scattered(gpu, 300).unwrap();
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
