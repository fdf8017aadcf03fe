//! Products, and what becomes of their input and their sums.

use std::sync::Arc;

use evenkeel::backend::cuda::{Affine, DeviceMatrix, GATED, Gpu, Input, Norm, Output};
use evenkeel::model_config::{Activation, NormKind};
use evenkeel::quant::{Matrix, MatrixLayout, Storage, WeightDtype, reference};
use evenkeel::verify;

use super::{
    STORAGES, buffer, download, floats, halves, near, near_each, packed, product_scratch, random, rounded, upload,
    vector,
};

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
            verify::product(gpu, storage, (rows, cols, tokens)).unwrap();
            // Some of the rows, as those of a fused matrix.
            let layout = MatrixLayout::new(storage, rows, cols).unwrap();
            let bytes = packed(&layout, &random(rows * cols, 4));
            let x = rounded(&random(tokens * cols, 5));
            let product = reference::matmul(&Matrix::new(&layout, &bytes), &x, tokens);
            let shift = random(rows, 6);
            let (first, last) = (rows / 3, rows - rows / 4);
            let y = buffer(gpu, tokens * (last - first) * 4);
            let (matrix, bias) =
                (DeviceMatrix::new(layout, upload(gpu, &bytes)), vector(gpu, WeightDtype::F32, &shift));
            let affine = Affine::new(matrix, Some(bias)).slice(first..last);
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
fn random_affine(gpu: &Arc<Gpu>, storage: Storage, rows: usize, cols: usize, seed: u64) -> Affine {
    let layout = MatrixLayout::new(storage, rows, cols).unwrap();
    let bytes = packed(&layout, &random(rows * cols, seed));
    let bias = vector(gpu, WeightDtype::F32, &random(rows, seed + 100));
    Affine::new(DeviceMatrix::new(layout, upload(gpu, &bytes)), Some(bias))
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
            let affines: Vec<_> =
                (0..3).map(|at| random_affine(gpu, storages[at], rows[at], cols, 30 + at as u64)).collect();
            let outputs = || rows.map(|rows| buffer(gpu, tokens * rows * 2));
            let (together, alone) = (outputs(), outputs());
            let parts: Vec<_> = affines.iter().zip(&together).collect();
            gpu.matmuls(&parts, Input::Half(&x), tokens, &scratch).unwrap();
            for ((affine, y), together) in affines.iter().zip(&alone).zip(&together) {
                gpu.matmul(affine, Input::Half(&x), tokens, (y, Output::F16, 1.0), &scratch).unwrap();
                let (y, together) = (download(y, WeightDtype::F16), download(together, WeightDtype::F16));
                let what = format!("{storages:?}, {} rows of {cols}, {tokens} tokens", affine.rows.len());
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
            let gate = random_affine(gpu, gate_storage, rows, cols, 40);
            let up = random_affine(gpu, up_storage, rows, cols, 41);
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
                    .map(|gated| gated * f64::from(GATED))
                    .collect();
                let (y, apart) = (buffer(gpu, tokens * rows * 2), buffer(gpu, tokens * rows * 2));
                let gate = has_gate.then_some(&gate);
                let rooms = [&y, &apart];
                gpu.gated(Activation::Silu, (gate, &up), Input::Half(&x), tokens, rooms, &scratch).unwrap();
                // Where both are multiplied apart, they are rounded to f16 between.
                let tolerance = if gate_storage == up_storage { 1e-5 } else { 0.02 };
                near(&what, &download(&y, WeightDtype::F16), &exact, tolerance * f64::from(GATED), Output::F16);
            }
        }
    }
}

/// What a feed-forward layer gives where gate and up multiply to millions, to what f16 holds times [`GATED`], and beyond.
pub fn gated_values_beyond_the_range_of_f16_are_right_or_nan(gpu: &Arc<Gpu>) {
    let scratch = product_scratch(gpu);
    let (hidden, wide) = (72, 100);
    let matrix = |storage, rows, cols, factor: f32, seed| {
        let layout = MatrixLayout::new(storage, rows, cols).unwrap();
        let weights: Vec<f32> = random(rows * cols, seed).iter().map(|weight| weight * factor).collect();
        let bytes = packed(&layout, &weights);
        (Affine::new(DeviceMatrix::new(layout.clone(), upload(gpu, &bytes)), None), layout, bytes)
    };
    let shift: Vec<f32> = random(hidden, 60).iter().map(|bias| bias * 1e6).collect();
    let bias = vector(gpu, WeightDtype::F32, &shift);
    let pairs = STORAGES.map(|storage| [storage; 2]).into_iter().chain([[Storage::Int8, Storage::Nl4]]);
    for [gate_storage, up_storage] in pairs {
        let (gate, ..) = matrix(gate_storage, wide, hidden, 2.0, 61);
        let (up, ..) = matrix(up_storage, wide, hidden, 60_000.0, 62);
        let (down, layout, bytes) = matrix(up_storage, hidden, wide, 1.0, 63);
        let down = Affine { bias: Some(bias.clone()), ..down };
        let mut row = vec![0.0; wide];
        let weights: Vec<Vec<f64>> = (0..hidden)
            .map(|at| {
                Matrix::new(&layout, &bytes).dequantize_row(at, &mut row);
                row.iter().map(|weight| f64::from(*weight)).collect()
            })
            .collect();
        for tokens in [1, 3, 9, 66] {
            let what = format!("{gate_storage:?} and {up_storage:?}, {tokens} tokens");
            for beyond in [None, Some(tokens - 1)] {
                let mut x = random(tokens * hidden, 64);
                if let Some(token) = beyond {
                    x[token * hidden..][..hidden].iter_mut().for_each(|x| *x *= 100.0);
                }
                let x = halves(gpu, &x);
                let [of_gate, of_up] = [&gate, &up].map(|affine| {
                    let y = buffer(gpu, tokens * wide * 4);
                    gpu.matmul(affine, Input::Half(&x), tokens, (&y, Output::F32, 1.0), &scratch).unwrap();
                    download(&y, WeightDtype::F32)
                });
                let pairs = of_gate.iter().zip(&of_up);
                let silu = |x: f64| x / (1.0 + (-x).exp());
                let gated: Vec<f64> = pairs.map(|(gate, up)| silu(f64::from(*gate)) * f64::from(*up)).collect();
                let largest = |row: &[f64]| row.iter().fold(0.0f64, |max, x| max.max(x.abs()));
                assert!(largest(&gated) > if beyond.is_none() { 3e5 } else { 1e7 }, "{}", largest(&gated));

                let [y, apart] = [0; 2].map(|_| buffer(gpu, tokens * wide * 2));
                let (pair, rooms) = ((Some(&gate), &up), [&y, &apart]);
                let x = gpu.gated(Activation::Silu, pair, Input::Half(&x), tokens, rooms, &scratch).unwrap();
                let before = random(tokens * hidden, 65);
                for (output, factor) in [(Output::F32, 1.0), (Output::Add, 0.5)] {
                    let y = floats(gpu, &before);
                    gpu.matmul(&down, x, tokens, (&y, output, factor), &scratch).unwrap();
                    let mut ours = download(&y, WeightDtype::F32);
                    if let Some(token) = beyond {
                        assert!(ours.drain(token * hidden..).all(f32::is_nan), "{what}");
                    }
                    let (mut exact, mut spread) = (Vec::new(), Vec::new());
                    for at in 0..ours.len() {
                        let gated = &gated[at / hidden * wide..][..wide];
                        let terms = || gated.iter().zip(&weights[at % hidden]).map(|(x, weight)| x * weight);
                        let onto = if output == Output::Add { f64::from(before[at]) } else { 0.0 };
                        exact.push(onto + f64::from(factor) * (terms().sum::<f64>() + f64::from(shift[at % hidden])));
                        spread.push(terms().map(|term| term * term).sum::<f64>().sqrt());
                    }
                    // Of what is rounded to f16; where both are multiplied apart, so are they.
                    let rounding = if gate_storage == up_storage { 1e-3 } else { 2e-3 };
                    near_each(&what, &ours, &exact, |i| rounding * spread[i] + 1e-6, Output::F32);
                }
            }
        }
    }
}

/// For a few tokens and for many, of which kernels of their own take the same weights.
pub fn products_of_bf16_weights_are_right_at_any_magnitude(gpu: &Arc<Gpu>) {
    let scratch = product_scratch(gpu);
    for (rows, cols, tokens) in [(17, 40, 9), (70, 33, 20), (650, 72, 70)] {
        let layout = MatrixLayout::new(Storage::Plain(WeightDtype::Bf16), rows, cols).unwrap();
        // All of one size, and of all sizes in one row.
        for sizes in [&[1e5][..], &[1e-6], &[1e-30], &[1e36], &[1e5, 1e-3, 1e-9, 1e-30]] {
            let weights = random(rows * cols, 70);
            let weights: Vec<f32> = weights.iter().enumerate().map(|(at, w)| w * sizes[at % sizes.len()]).collect();
            let bytes = packed(&layout, &weights);
            let affine = Affine::new(DeviceMatrix::new(layout.clone(), upload(gpu, &bytes)), None);
            let mut x = random(tokens * cols, 71);
            // What f16 has below its normal numbers, too.
            x[..cols].iter_mut().filter(|_| sizes[0] > 1e-9).for_each(|x| *x *= 1e-5);
            let x = rounded(&x);
            let exact = reference::matmul(&Matrix::new(&layout, &bytes), &x, tokens);
            let positive = |values: &[f32]| values.iter().map(|v| v.abs()).collect::<Vec<_>>();
            let bytes = packed(&layout, &positive(&weights));
            let terms = reference::matmul(&Matrix::new(&layout, &bytes), &positive(&x), tokens);
            let run = |x: &[f32]| {
                let y = buffer(gpu, x.len() / cols * rows * 4);
                let tokens = x.len() / cols;
                gpu.matmul(&affine, Input::Half(&halves(gpu, x)), tokens, (&y, Output::F32, 1.0), &scratch).unwrap();
                download(&y, WeightDtype::F32)
            };
            let few: Vec<f32> = x.chunks(8 * cols).flat_map(run).collect();
            for (tokens, ours) in [("few", few), ("many", run(&x))] {
                let what = format!("{rows}×{cols} of {sizes:?}, {tokens} tokens");
                near_each(&what, &ours, &exact, |i| 1e-6 * terms[i], Output::F32);
            }
        }
    }
}

pub fn every_activation_ends_a_product(gpu: &Arc<Gpu>) {
    let scratch = product_scratch(gpu);
    for storage in STORAGES {
        for (rows, tokens) in [(5, 1), (9, 5), (40, 9), (1600, 9)] {
            let x = halves(gpu, &random(tokens * 40, 60));
            let [gate, up] = [61, 62].map(|seed| random_affine(gpu, storage, rows, 40, seed));
            for activation in [Activation::GeluTanh, Activation::Gelu, Activation::QuickGelu, Activation::Relu] {
                for gate in [Some(&gate), None] {
                    let [together, y, apart] = [0; 3].map(|_| buffer(gpu, tokens * rows * 2));
                    let input = Input::Half(&x);
                    gpu.gated(activation, (gate, &up), input, tokens, [&together, &apart], &scratch).unwrap();
                    // What is multiplied first is rounded to f16 between.
                    let first = gate.unwrap_or(&up);
                    gpu.matmul(first, input, tokens, (&y, Output::F16, 1.0), &scratch).unwrap();
                    gpu.matmul(&up, input, tokens, (&apart, Output::F16, 1.0), &scratch).unwrap();
                    gpu.activate(activation, &y, gate.map(|_| &apart), tokens * rows).unwrap();
                    let scaled = |y| f64::from(y) * f64::from(GATED);
                    let exact: Vec<f64> = download(&y, WeightDtype::F16).into_iter().map(scaled).collect();
                    let what = format!("{activation:?}, {storage:?}, {rows} rows, {tokens} tokens, {}", gate.is_some());
                    let ours = download(&together, WeightDtype::F16);
                    near_each(&what, &ours, &exact, |i| 2e-3 * f64::from(GATED) + 2e-3 * exact[i].abs(), Output::F16);
                }
            }
        }
    }
}

pub fn hidden_states_are_normalized_on_the_way(gpu: &Arc<Gpu>) {
    let scratch = product_scratch(gpu);
    for storage in STORAGES {
        for (rows, cols, tokens) in [(40, 33, 1), (20, 72, 8), (330, 1100, 2), (70, 64, 9)] {
            let affine = random_affine(gpu, storage, rows, cols, 50);
            let other = Affine { bias: None, ..random_affine(gpu, Storage::Int8, rows, cols, 51) };
            let states = floats(gpu, &random(tokens * cols, 52).iter().map(|v| v * 5.0 + 1.0).collect::<Vec<_>>());
            let weight = vector(gpu, WeightDtype::Bf16, &random(cols, 53));
            let shift = vector(gpu, WeightDtype::F32, &random(cols, 54));
            for kind in [None, Some(NormKind::Rms), Some(NormKind::RmsPlusOne), Some(NormKind::Layer)] {
                let bias = (kind == Some(NormKind::Layer)).then(|| shift.clone());
                let of_norm = Affine::new(weight.clone(), bias);
                let norm = kind.map(|kind| Norm { kind, epsilon: 1e-5, affine: &of_norm });
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
            let (affine, x) = (Affine::new(matrix, None), halves(gpu, &x));
            gpu.matmul(&affine, Input::Half(&x), tokens, (&y, Output::F16, 1.0), &scratch).unwrap();
            for (i, y) in download(&y, WeightDtype::F16).iter().enumerate() {
                let what = format!("{storage:?}, {tokens} tokens, element {i}: {y}");
                match i / rows {
                    1 | 2 => assert!(y.is_nan(), "{what}"),
                    _ => assert!((y - cols as f32).abs() < 0.1, "{what}"),
                }
            }
        }
    }
}
