//! The kernels: their PTX, and a typed launch for each. What a kernel computes
//! stands at the head of its `.cu` file.

use std::ops::Range;

use super::NEEDED_CAPABILITY;
use super::driver::{Gpu, Region};
use super::launch::Argument;
use super::operands::{Affine, Attention, Cache, DeviceMatrix, FLOAT, HALF, Input, Norm, Output, Scratch, holds};
use crate::error::Result;
use crate::model_config::{Activation, NormKind};
use crate::plan::memory::{CUDA_FEW_BLOCKS, CUDA_FEW_PARTS};
use crate::quant::{KvDtype, Storage, WeightDtype};

/// The first compute capability whose tensor cores the kernels use.
const TENSOR_CORES: (i32, i32) = (8, 0);

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
const FEW: usize = 8;
/// Rows of a block of `few_…`.
const FEW_SLOTS: usize = 8;
/// Rows of a unit of `mma_few_…`, and its bytes of codes of each.
const MMA_FEW_SLOTS: usize = 16;
const MMA_FEW_BYTES: usize = 512;
/// Rows and tokens of a block of the others, and rows of a wide one of `mma_many_…`.
const TILE: usize = 64;
const WIDE_SLOTS: usize = 128;
/// Rows of a block of `attend_many_…`, each a head of a token.
const ATTEND_ROWS: usize = 64;
/// The most matrices that one launch multiplies.
const MATRICES: usize = 3;

/// The kernel of tensor cores for `shape`, if there is one.
fn attend_many(shape: &Attention, cache: &Cache) -> Option<&'static str> {
    let fits = shape.tokens > FEW && shape.head_dim.is_multiple_of(8) && cache.dtype != KvDtype::F32;
    let kernels = [(64, "attend_many_64"), (128, "attend_many_128"), (256, "attend_many_256")];
    kernels.into_iter().find(|(width, _)| fits && shape.head_dim <= *width).map(|(_, kernel)| kernel)
}

fn dtype_number(dtype: WeightDtype) -> i32 {
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

fn activation_number(activation: Activation) -> i32 {
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

fn pointer(region: Option<&Region>) -> Argument<'_> {
    region.map_or(Argument::Null, Argument::Region)
}

/// The elements at `range` of a plain vector, and its dtype; null where there is none.
fn vector(matrix: Option<&DeviceMatrix>, range: Range<usize>) -> (Option<Region>, Argument<'static>) {
    let Some(matrix) = matrix else { return (None, Argument::I32(0)) };
    let Storage::Plain(dtype) = matrix.layout.storage else { unreachable!("norms and biases are plain") };
    assert!(range.end <= matrix.layout.rows * matrix.layout.cols, "a vector that is too short");
    let elements = matrix.region.part(range.start * dtype.size(), range.len() * dtype.size());
    (Some(elements), Argument::I32(dtype_number(dtype)))
}

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

/// A norm as kernels take it; see norm.cuh.
struct NormArguments {
    kind: i32,
    vectors: [(Option<Region>, Argument<'static>); 2],
    offset: f32,
    epsilon: f32,
}

impl NormArguments {
    fn new(norm: Option<&Norm>, width: usize) -> Self {
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

    fn given(&self) -> [Argument<'_>; 7] {
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
    /// # Errors
    /// The driver fails.
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

    /// `y = factor · (x · wᵀ + bias)` for `tokens` rows in `x`.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
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

    /// [`Gpu::matmul`] of the same `x` into f16 for several matrices, in one launch where their storage is one.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn matmuls(&self, parts: &[(&Affine, &Region)], x: Input, tokens: usize, scratch: &Scratch) -> Result<()> {
        let storage = |part: &(&Affine, &Region)| part.0.weight.layout.storage;
        let launches = || parts.chunk_by(|a, b| storage(a) == storage(b)).flat_map(|same| same.chunks(MATRICES));
        let x = if launches().count() > 1 { self.half(x, (tokens, parts[0].0.cols()))? } else { x };
        launches().try_for_each(|parts| self.product(parts, x, tokens, Epilogue::PLAIN, scratch))
    }

    /// `y = activation(gate(x)) · up(x)`, or without a gate `activation(up(x))`, in f16. Where gate and up
    /// differ in storage, `apart` holds what up gives.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn gated(
        &self,
        activation: Activation,
        (gate, up): (Option<&Affine>, &Affine),
        x: Input,
        tokens: usize,
        [y, apart]: [&Region; 2],
        scratch: &Scratch,
    ) -> Result<()> {
        let activated = Epilogue { activation: Some(activation), ..Epilogue::PLAIN };
        match gate {
            Some(gate) if gate.weight.layout.storage != up.weight.layout.storage => {
                self.matmuls(&[(gate, y), (up, apart)], x, tokens, scratch)?;
                self.activate(activation, y, Some(apart), tokens * up.rows())
            }
            Some(gate) => self.product(&[(gate, y), (up, y)], x, tokens, activated, scratch),
            None => self.product(&[(up, y)], x, tokens, activated, scratch),
        }
    }

    /// An input as rows of f16, normalized now where it is not yet. The shape is rows and their width.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
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
        let (cols, storage) = (parts[0].0.cols(), parts[0].0.weight.layout.storage);
        assert!(parts.len() <= MATRICES, "more matrices than a launch takes");
        assert!(parts.iter().all(|(affine, _)| affine.cols() == cols && affine.weight.layout.storage == storage));
        let mma = self.capability >= TENSOR_CORES;
        let (few_kernel, many_kernels) = match storage {
            Storage::Plain(WeightDtype::Bf16) if mma => ("few_bf16", ["mma_many_bf16_64", "mma_many_bf16_128"]),
            Storage::Plain(WeightDtype::F16) if mma => ("few_f16", ["mma_many_f16_64", "mma_many_f16_128"]),
            Storage::Plain(WeightDtype::Bf16) => ("few_bf16", ["many_bf16"; 2]),
            Storage::Plain(WeightDtype::F16) => ("few_f16", ["many_f16"; 2]),
            Storage::Plain(WeightDtype::F32) => ("few_f32", ["many_f32"; 2]),
            Storage::Int8 if mma => ("mma_few_int8", ["mma_many_int8_64", "mma_many_int8_128"]),
            Storage::Int4 if mma => ("mma_few_int4", ["mma_many_int4_64", "mma_many_int4_128"]),
            Storage::Nl4 if mma => ("mma_few_nl4", ["mma_many_nl4_64", "mma_many_nl4_128"]),
            Storage::Int8 => ("few_int8", ["many_int8"; 2]),
            Storage::Int4 => ("few_int4", ["many_int4"; 2]),
            Storage::Nl4 => ("few_nl4", ["many_nl4"; 2]),
        };
        let mma_few = mma && tokens <= FEW && !matches!(storage, Storage::Plain(_));
        let x = if mma_few { x } else { self.half(x, (tokens, cols))? };
        let (states, norm, dtype) = match x {
            Input::Half(x) => (x, None, WeightDtype::F16),
            Input::Hidden { states, norm, .. } => (states, norm, WeightDtype::F32),
        };
        holds(states, tokens * cols, dtype.size());

        let blocks_of = |slots: usize| match (epilogue.activation, parts) {
            (Some(_), [(gate, _), (up, _)]) => {
                assert!(gate.rows() == up.rows(), "a gate of another size");
                gate.rows().div_ceil(slots / 2)
            }
            _ => parts.iter().map(|(affine, _)| affine.rows().div_ceil(slots)).sum(),
        };
        let given: Vec<_> = parts
            .iter()
            .map(|(affine, y)| {
                holds(y, tokens * affine.rows(), epilogue.output.size());
                let sections = affine.weight.sections(affine.rows.start);
                (sections, affine.rows(), vector(affine.bias, affine.rows.clone()), *y)
            })
            .collect();
        let mut arguments = Vec::new();
        for ([codes, sub_scales, scales], rows, (bias, bias_dtype), y) in &given {
            arguments.extend([codes, sub_scales, scales].map(|section| pointer(section.as_ref())));
            arguments.extend([int(*rows), pointer(bias.as_ref()), *bias_dtype, Argument::Region(y)]);
        }
        let (null, zero) = (Argument::Null, Argument::I32(0));
        for _ in given.len()..MATRICES {
            arguments.extend([null, null, null, zero, null, zero, null]);
        }
        arguments.extend([int(cols), Argument::Region(states)]);
        arguments.extend(mma_few.then_some(Argument::I32(dtype_number(dtype))));
        arguments.extend([int(tokens), Argument::I32(epilogue.output as i32), Argument::F32(epilogue.factor)]);
        arguments.push(Argument::I32(epilogue.activation.map_or(-1, activation_number)));
        if tokens > FEW {
            let tiles = tokens.div_ceil(TILE);
            let is_mma = many_kernels[0] != many_kernels[1];
            // A wide block needs less of shared memory and of the caches; narrow ones fill more of the GPU.
            let is_wide = is_mma && blocks_of(WIDE_SLOTS) * tiles >= self.multiprocessors * 3 / 2;
            let (slots, threads) = (if is_wide { WIDE_SLOTS } else { TILE }, if is_mma { 128 } else { 256 });
            return self.launch(many_kernels[usize::from(is_wide)], (blocks_of(slots), tiles), threads, &arguments);
        }
        if !mma_few {
            return self.launch(few_kernel, (blocks_of(FEW_SLOTS), 1), 256, &arguments);
        }
        let code_row = parts[0].0.weight.layout.code_row;
        let units: usize = blocks_of(MMA_FEW_SLOTS) * code_row.div_ceil(MMA_FEW_BYTES);
        let blocks = units.min(self.blocks_at_once(few_kernel, 256)?).min(CUDA_FEW_BLOCKS);
        scratch.holds(blocks * CUDA_FEW_PARTS, blocks);
        let norm = NormArguments::new(norm, cols);
        arguments.extend(norm.given());
        arguments.extend([Argument::Region(&scratch.parts), Argument::Region(&scratch.arrivals)]);
        self.launch(few_kernel, (blocks, 1), 256, &arguments)
    }

    /// `factor` times a norm of `rows` rows of `dtype` in `x`; without one, times the rows as they are.
    /// The shape is rows and their width.
    ///
    /// # Errors
    /// The driver fails.
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
    /// # Errors
    /// The driver fails.
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
    /// as long as [`scratch`](crate::plan::memory::CudaAttention::scratch) says; its second region holds zeros.
    ///
    /// # Errors
    /// The driver fails.
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
    /// # Errors
    /// The driver fails.
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
    /// # Errors
    /// The driver fails.
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
    /// # Errors
    /// The driver fails.
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
    /// # Errors
    /// The driver fails.
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
