//! The kernels: their PTX, and a typed launch for each. What a kernel computes
//! stands at the head of its `.cu` file.

use std::ops::Range;

use super::NEEDED_CAPABILITY;
use super::driver::{Gpu, Region};
use super::launch::Argument;
use super::operands::{Affine, Attention, Cache, DeviceMatrix, FLOAT, HALF, Norm, Output, Scratch, holds};
use crate::error::Result;
use crate::model_config::{Activation, NormKind};
use crate::quant::{KvDtype, Storage, WeightDtype};

/// The first compute capability whose tensor cores the kernels use.
pub(super) const TENSOR_CORES: (i32, i32) = (8, 0);

/// A file of kernels.
pub(super) struct Module {
    pub name: &'static str,
    /// The compute capability that its PTX is for; build_ptx.py says the same.
    pub capability: (i32, i32),
    pub ptx: &'static str,
    pub kernels: &'static [&'static str],
}

macro_rules! module {
    ($name:literal, $capability:expr, $kernels:expr) => {
        Module {
            name: $name,
            capability: $capability,
            ptx: include_str!(concat!("kernels/", $name, ".ptx")),
            kernels: &$kernels,
        }
    };
}

/// All files.
pub(super) const MODULES: &[Module] = &[
    module!("attention", NEEDED_CAPABILITY, ["attend_1", "attend_4", "rotate_and_store"]),
    module!("attention_mma", TENSOR_CORES, ["attend_many_128", "attend_many_256", "attend_many_64"]),
    module!("choose", NEEDED_CAPABILITY, ["cut", "draw", "largest"]),
    module!("elementwise", NEEDED_CAPABILITY, ["activate", "embed", "gather", "scatter_add"]),
    module!(
        "matmul",
        NEEDED_CAPABILITY,
        [
            "few_bf16",
            "few_f16",
            "few_f32",
            "few_int4",
            "few_int8",
            "few_nl4",
            "many_bf16",
            "many_f16",
            "many_f32",
            "many_int4",
            "many_int8",
            "many_nl4",
        ]
    ),
    module!("mma_few", TENSOR_CORES, ["mma_few_int4", "mma_few_int8", "mma_few_nl4"]),
    module!(
        "mma_many",
        TENSOR_CORES,
        [
            "mma_many_bf16_128",
            "mma_many_bf16_64",
            "mma_many_f16_128",
            "mma_many_f16_64",
            "mma_many_int4_128",
            "mma_many_int4_64",
            "mma_many_int8_128",
            "mma_many_int8_64",
            "mma_many_nl4_128",
            "mma_many_nl4_64",
        ]
    ),
    module!("norm", NEEDED_CAPABILITY, ["normalize"]),
    module!("quantize", NEEDED_CAPABILITY, ["quantize_int4", "quantize_int8", "quantize_nl4"]),
];

/// The most tokens that take the kernels which read each weight once, `few_…` and `mma_few_…`.
pub(super) const FEW: usize = 8;
/// Rows of a block of `attend_many_…`, each a head of a token.
const ATTEND_ROWS: usize = 64;
/// The kernel of tensor cores for `shape`, if there is one.
fn attend_many(shape: &Attention, cache: &Cache) -> Option<&'static str> {
    let fits = shape.tokens > FEW && shape.head_dim.is_multiple_of(8) && cache.dtype != KvDtype::F32;
    let kernels = [(64, "attend_many_64"), (128, "attend_many_128"), (256, "attend_many_256")];
    kernels.into_iter().find(|(width, _)| fits && shape.head_dim <= *width).map(|(_, kernel)| kernel)
}

pub(super) fn dtype_number(dtype: WeightDtype) -> i32 {
    match dtype {
        WeightDtype::Bf16 => 0,
        WeightDtype::F16 => 1,
        WeightDtype::F32 => 2,
    }
}

fn storage_number(storage: Storage) -> i32 {
    match storage {
        Storage::Plain(dtype) => dtype_number(dtype),
        Storage::Int8 => 3,
        Storage::Int4 => 4,
        Storage::Nl4 => 5,
    }
}

pub(super) fn activation_number(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
    }
}

/// A dimension as a kernel takes it. Configurations allow none above 2^28.
pub(super) fn int(n: usize) -> Argument<'static> {
    Argument::I32(i32::try_from(n).unwrap_or_else(|_| unreachable!("a dimension of {n}")))
}

pub(super) fn pointer(region: Option<&Region>) -> Argument<'_> {
    region.map_or(Argument::Null, Argument::Region)
}

/// The elements at `range` of a plain vector, and its dtype; null where there is none.
pub(super) fn vector(matrix: Option<&DeviceMatrix>, range: Range<usize>) -> (Option<Region>, Argument<'static>) {
    let Some(matrix) = matrix else { return (None, Argument::I32(0)) };
    let Storage::Plain(dtype) = matrix.layout.storage else { unreachable!("norms and biases are plain") };
    assert!(range.end <= matrix.layout.rows * matrix.layout.cols, "a vector that is too short");
    let elements = matrix.region.part(range.start * dtype.size(), range.len() * dtype.size());
    (Some(elements), Argument::I32(dtype_number(dtype)))
}

/// A norm as kernels take it; see norm.cuh.
pub(super) struct NormArguments {
    kind: i32,
    vectors: [(Option<Region>, Argument<'static>); 2],
    offset: f32,
    epsilon: f32,
}

impl NormArguments {
    pub(super) fn new(norm: Option<&Norm>, width: usize) -> Self {
        let (kind, offset) = match norm.map(|norm| norm.kind) {
            Some(NormKind::Rms) => (0, 0.0),
            Some(NormKind::RmsPlusOne) => (0, 1.0),
            Some(NormKind::Layer) => (1, 0.0),
            None => (2, 0.0),
        };
        let [weight, bias] = [norm.map(|norm| norm.affine.weight), norm.and_then(|norm| norm.affine.bias)];
        let vectors = [weight, bias].map(|of| vector(of, 0..width));
        Self { kind, vectors, offset, epsilon: norm.map_or(0.0, |norm| norm.epsilon) }
    }

    pub(super) fn given(&self) -> [Argument<'_>; 7] {
        let [(weight, weight_dtype), (bias, bias_dtype)] = &self.vectors;
        let (weight, bias) = (pointer(weight.as_ref()), pointer(bias.as_ref()));
        let [offset, epsilon] = [self.offset, self.epsilon].map(Argument::F32);
        [Argument::I32(self.kind), weight, *weight_dtype, bias, *bias_dtype, offset, epsilon]
    }
}

/// Every launch is queued on the compute stream.
impl Gpu {
    /// Packs `rows` rows of `dtype` from `weights` into `matrix` from row `first` on. Sets the u32
    /// `failed` where [`crate::quant::quantize_rows`] would fail on them.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn quantize(
        &self,
        matrix: &DeviceMatrix,
        first: usize,
        rows: usize,
        dtype: WeightDtype,
        weights: &Region,
        failed: &Region,
    ) -> Result<()> {
        let layout = &matrix.layout;
        assert!(first + rows <= layout.rows, "rows that the matrix has not");
        holds(weights, rows * layout.cols, dtype.size());
        holds(failed, 1, FLOAT);
        let [codes, sub_scales, scales] = matrix.sections(first);
        let head =
            [Argument::Region(weights), Argument::I32(dtype_number(dtype)), int(layout.cols), int(layout.padded_cols)];
        let (kernel, threads) = match layout.storage {
            Storage::Int8 => ("quantize_int8", 256),
            Storage::Int4 => ("quantize_int4", 128),
            Storage::Nl4 => ("quantize_nl4", 128),
            Storage::Plain(_) => unreachable!("plain storage is copied, not quantized"),
        };
        let sections: Vec<_> = [&codes, &sub_scales, &scales].into_iter().flatten().map(Argument::Region).collect();
        self.launch(kernel, (rows, 1), threads, &[&head[..], &sections, &[Argument::Region(failed)]].concat())
    }

    /// `factor` times a norm of `rows` rows of `dtype` in `x`; without one, times the rows as they are.
    /// The shape is rows and their width.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn normalize(
        &self,
        norm: Option<&Norm>,
        (x, dtype): (&Region, WeightDtype),
        (rows, width): (usize, usize),
        y: &Region,
        output: Output,
        factor: f32,
    ) -> Result<()> {
        holds(x, rows * width, dtype.size());
        holds(y, rows * width, output.size());
        let norm = NormArguments::new(norm, width);
        let arguments = [
            &[Argument::Region(x), Argument::I32(dtype_number(dtype))],
            &norm.given()[..],
            &[Argument::Region(y), Argument::I32(output as i32), int(width), Argument::F32(factor)],
        ];
        self.launch("normalize", (rows, 1), 256, &arguments.concat())
    }

    /// Normalizes the heads of queries and keys where there are norms for that, rotates them by their
    /// positions, and puts keys and values into the cache.
    /// `position` holds that of `shape`, an i32; a rope is an f32 for each pair that is rotated, and the factor
    /// of cosines and sines.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn rotate_and_store(
        &self,
        shape: &Attention,
        [query, key, value]: [&Region; 3],
        norms: [Option<&Norm>; 2],
        cache: &Cache,
        position: &Region,
        rope: Option<(&Region, f32)>,
    ) -> Result<()> {
        shape.check(query, cache);
        holds(position, 1, size_of::<i32>());
        for region in [key, value] {
            holds(region, shape.tokens * shape.kv_heads * shape.head_dim, HALF);
        }
        let pairs = rope.map_or(0, |(frequencies, _)| frequencies.len() / FLOAT);
        assert!(2 * pairs <= shape.head_dim, "more pairs than a head has");
        let numbers = [
            pointer(rope.map(|(frequencies, _)| frequencies)),
            int(shape.heads),
            int(shape.kv_heads),
            int(shape.head_dim),
            int(2 * pairs),
            int(shape.context),
            Argument::Region(position),
            Argument::F32(rope.map_or(1.0, |(_, factor)| factor)),
        ];
        let grid = (shape.tokens, shape.heads + 2 * shape.kv_heads);
        let regions = [query, key, value].map(Argument::Region);
        let [of_query, of_key] = norms.map(|norm| NormArguments::new(norm, shape.head_dim));
        let arguments = [&regions[..], &of_query.given(), &of_key.given(), &cache.arguments(), &numbers];
        self.launch("rotate_and_store", grid, 128, &arguments.concat())
    }

    /// Attention of `query` over the cache, into `out`. `position` holds that of `shape`, an i32. The scratch is
    /// as long as [`scratch`](crate::footprint::CudaAttention::scratch) says; its second region holds zeros.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn attend(
        &self,
        shape: &Attention,
        query: &Region,
        cache: &Cache,
        out: &Region,
        position: &Region,
        scratch: &Scratch,
    ) -> Result<()> {
        shape.check(query, cache);
        holds(position, 1, size_of::<i32>());
        holds(out, shape.tokens * shape.heads * shape.head_dim, HALF);
        let shares = shape.shares();
        let is_split = shares.parts > 1;
        if is_split {
            let parts = shape.tokens * shape.heads * shares.parts * (shape.head_dim + 2);
            scratch.holds(parts, shape.tokens * shares.blocks);
        }
        let numbers = [
            Argument::Region(out),
            pointer(is_split.then_some(&scratch.parts)),
            pointer(is_split.then_some(&scratch.arrivals)),
            int(shares.parts),
            int(shape.heads),
            int(shape.kv_heads),
            int(shape.head_dim),
            int(shape.context),
            Argument::Region(position),
            int(shape.window),
            Argument::F32(shape.scale),
            Argument::F32(shape.softcap),
            int(shape.tokens),
        ];
        let many = attend_many(shape, cache).filter(|_| self.capability >= TENSOR_CORES);
        let (kernel, grid, numbers) = if let Some(kernel) = many {
            let rows = shape.tokens * (shape.heads / shape.kv_heads);
            (kernel, (rows.div_ceil(ATTEND_ROWS) * shares.parts, shape.kv_heads), &numbers[..])
        } else {
            let kernel = if shares.heads == 1 { "attend_1" } else { "attend_4" };
            (kernel, (shape.tokens * shares.parts, shares.blocks), &numbers[..numbers.len() - 1])
        };
        self.launch(kernel, grid, 128, &[&[Argument::Region(query)][..], &cache.arguments(), numbers].concat())
    }

    /// `scale` times the rows of `matrix` that the u32 in `tokens` name, into f32 or onto it.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn embed(&self, affine: &Affine, tokens: &Region, scale: f32, hidden: &Region, output: Output) -> Result<()> {
        let (matrix, cols) = (affine.weight, affine.cols());
        let count = tokens.len() / size_of::<u32>();
        holds(hidden, count * cols, FLOAT);
        let [codes, sub_scales, scales] = matrix.sections(0);
        let arguments = [
            Argument::Region(tokens),
            pointer(codes.as_ref()),
            pointer(sub_scales.as_ref()),
            pointer(scales.as_ref()),
            Argument::I32(storage_number(matrix.layout.storage)),
            int(cols),
            Argument::F32(scale),
            Argument::I32(i32::from(output == Output::Add)),
            Argument::Region(hidden),
        ];
        self.launch("embed", (count, 1), 256, &arguments)
    }

    /// `gate = activation(gate) · up` for `count` elements of f16.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn activate(&self, activation: Activation, gate: &Region, up: Option<&Region>, count: usize) -> Result<()> {
        for region in up.into_iter().chain([gate]) {
            holds(region, count, HALF);
        }
        let up = up.map_or(Argument::Null, Argument::Region);
        let arguments = [Argument::Region(gate), up, int(count), Argument::I32(activation_number(activation))];
        self.launch("activate", (count.div_ceil(256), 1), 256, &arguments)
    }

    /// The rows of `x`, f16 of `width`, that the u32 in `tokens` name.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn gather(&self, x: &Region, tokens: &Region, width: usize, out: &Region) -> Result<()> {
        let count = tokens.len() / size_of::<u32>();
        holds(out, count * width, HALF);
        let arguments = [Argument::Region(x), Argument::Region(tokens), int(width), Argument::Region(out)];
        self.launch("gather", (count, 1), 256, &arguments)
    }

    /// Adds each row of `x`, f32 of `width`, times its f32 of `weights`, to the row of `out` that its
    /// u32 of `tokens` names; none is named twice.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn scatter_add(&self, x: &Region, tokens: &Region, weights: &Region, width: usize, out: &Region) -> Result<()> {
        let count = tokens.len() / size_of::<u32>();
        holds(x, count * width, FLOAT);
        holds(weights, count, FLOAT);
        let regions = [x, tokens, weights].map(Argument::Region);
        let arguments = [&regions[..], &[int(width), Argument::Region(out)]].concat();
        self.launch("scatter_add", (count, 1), 256, &arguments)
    }
}
