//! Weights as the package compressed-tensors packs them, which vLLM and Transformers read.
//!
//! A matrix `X.weight` of N rows and K columns becomes `X.weight_packed`, codes above the smallest
//! one, the first in the lowest bits of a word: I32 `[N][K/8]` for int4, `[N][K/4]` for int8;
//! `X.weight_scale` in the dtype that the weights had, for each group of 32 columns for int4 and
//! each row for int8; and `X.weight_shape`, N and K. A weight is `scale * code`.

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::Stored;
use crate::architecture::{ModuleTree, Weight};
use crate::error::{Error, Hint, Result, Setting};
use crate::footprint::Placed;
use crate::pool::Pool;
use crate::quant::{
    GROUP_SIZE, Matrix, MatrixLayout, PackedRows, QuantizeError, QuantizeRules, Scheme, Storage, WeightDtype,
    quantize_rows,
};

/// What `quant_method` is in config.json.
const METHOD: &str = "compressed-tensors";

/// The rules for a model: the embedding and the head are kept, and matrices whose rows do not fill groups or words.
pub fn rules(scheme: Scheme, tree: &ModuleTree, weights: &[Weight]) -> Result<QuantizeRules> {
    let multiple = match scheme {
        Scheme::Int8 => size_of::<u32>(),
        Scheme::Int4 => GROUP_SIZE,
        Scheme::None | Scheme::Nl4 => {
            return Err(Error::usage(format!("`{METHOD}` has no `{scheme}`"))
                .hint(Hint::naming("{} or `int8`", [Setting::Quantize(Some("int4"))])));
        }
    };
    if let Some(weight) = weights.iter().find(|weight| weight.is_transposed()) {
        let tensor = weight.parameter.tensor();
        return Err(Error::input(format!("`{tensor}` is stored by columns, which `{METHOD}` does not pack")));
    }
    let mut rules = vec![(String::new(), scheme)];
    let outer = [tree.embedding(), "lm_head"];
    rules.extend(outer.map(|path| (path.to_owned(), Scheme::None)));
    let matrices = weights.iter().map(|weight| &weight.parameter).filter(|parameter| parameter.is_quantizable());
    let ragged = matrices.filter(|matrix| !matrix.cols.is_multiple_of(multiple) && !outer.contains(&&*matrix.module));
    rules.extend(ragged.map(|matrix| (matrix.module.clone(), Scheme::None)));
    Ok(QuantizeRules::new(rules))
}

/// `quantization_config` of config.json.
pub fn config(scheme: Scheme, placed: &[Placed]) -> Value {
    let kept = placed.iter().filter(|target| target.layout.storage == target.weight.data).map(|target| &target.weight);
    let matrices = kept.map(|weight| &weight.parameter).filter(|parameter| !parameter.is_vector());
    // A tied head is no tensor.
    let mut ignore: Vec<_> = matrices.map(|parameter| parameter.module.as_str()).collect();
    if !ignore.contains(&"lm_head") {
        ignore.push("lm_head");
    }
    let (bits, strategy, group) = match scheme {
        Scheme::Int8 => (8, "channel", None),
        _ => (4, "group", Some(GROUP_SIZE)),
    };
    let weights = json!({
        "num_bits": bits, "type": "int", "symmetric": true, "strategy": strategy, "group_size": group, "dynamic": false,
    });
    json!({
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    })
}

/// The tensors of a matrix: codes, scales, shape.
pub fn tensors(target: &Placed) -> [Stored; 3] {
    let layout = &target.layout;
    let (rows, cols) = (layout.rows as u64, layout.cols as u64);
    let name = |part: &str| format!("{}.weight_{part}", target.weight.parameter.module);
    let words = (code_row(layout) / size_of::<u32>()) as u64;
    [
        Stored::new(name("packed"), Dtype::I32, vec![rows, words]),
        Stored::new(name("scale"), target.weight.tensor.dtype, vec![rows, groups(layout) as u64]),
        Stored {
            content: [rows, cols].map(u64::to_le_bytes).concat(),
            ..Stored::new(name("shape"), Dtype::I64, vec![2])
        },
    ]
}

/// Bytes of a row's codes.
fn code_row(layout: &MatrixLayout) -> usize {
    if layout.storage == Storage::Int8 { layout.cols } else { layout.cols / 2 }
}

/// Scales of a row.
fn groups(layout: &MatrixLayout) -> usize {
    if layout.storage == Storage::Int8 { 1 } else { layout.cols / GROUP_SIZE }
}

/// The packed rows of a slab.
#[derive(Debug, Default)]
pub struct Rows {
    packed: PackedRows,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Rows {
    /// Packs whole rows of `weights`, from `first` on: scales are those of our own form, rounded to `dtype`, and
    /// codes are what is nearest under these. Gives codes and scales, each with its offset in its tensor.
    pub fn pack(
        &mut self,
        pool: &Pool,
        layout: &MatrixLayout,
        dtype: WeightDtype,
        first: usize,
        weights: &[u8],
    ) -> Result<[(u64, &[u8]); 2], QuantizeError> {
        quantize_rows(pool, layout, dtype, weights, &mut self.packed)?;
        let row_bytes = layout.cols * dtype.size();
        let rows = weights.len() / row_bytes;
        let (code_row, scale_row) = (code_row(layout), groups(layout) * dtype.size());
        self.codes.resize(rows * code_row, 0);
        self.scales.resize(rows * scale_row, 0);
        let Some(part) = MatrixLayout::new(layout.storage, rows, layout.cols) else {
            unreachable!("it has no more rows than the whole")
        };
        let bytes = self.packed.matrix(&part);
        let matrix = Matrix::new(&part, &bytes);
        let targets = self.codes.chunks_mut(code_row).zip(self.scales.chunks_mut(scale_row));
        let mut rows: Vec<_> = targets.zip(weights.chunks(row_bytes)).collect();
        pool.chunks(&mut rows, 1, |row, rows| {
            let ((codes, scales), weights) = &mut rows[0];
            let mut values = vec![0.0; layout.cols];
            dtype.decode(weights, &mut values);
            let groups = groups(layout);
            let parts = values.chunks(layout.cols / groups).zip(codes.chunks_mut(code_row / groups));
            for (group, ((values, codes), place)) in parts.zip(scales.chunks_mut(dtype.size())).enumerate() {
                let sub_scale = matrix.sub_scales(row).get(group).map_or(1.0, |sub_scale| f32::from(*sub_scale));
                let scale = round_into(matrix.scale(row) * sub_scale, dtype, place);
                let code = |value: f32, least: f32, most: f32| {
                    let code = if scale == 0.0 { 0.0 } else { (value / scale).round_ties_even() };
                    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 255")]
                    let above_least = (code.clamp(least, most) - least) as u8;
                    above_least
                };
                if layout.storage == Storage::Int8 {
                    for (byte, value) in codes.iter_mut().zip(values) {
                        *byte = code(*value, -128.0, 127.0);
                    }
                } else {
                    for (byte, [low, high]) in codes.iter_mut().zip(values.as_chunks::<2>().0) {
                        *byte = code(*low, -8.0, 7.0) | code(*high, -8.0, 7.0) << 4;
                    }
                }
            }
        });
        Ok([((first * code_row) as u64, &self.codes), ((first * scale_row) as u64, &self.scales)])
    }
}

/// Writes `value` in `dtype`, and returns what that holds.
fn round_into(value: f32, dtype: WeightDtype, bytes: &mut [u8]) -> f32 {
    match dtype {
        WeightDtype::Bf16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        WeightDtype::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        WeightDtype::F32 => bytes.copy_from_slice(&value.to_le_bytes()),
    }
    let mut rounded = [0.0];
    dtype.decode(bytes, &mut rounded);
    rounded[0]
}
