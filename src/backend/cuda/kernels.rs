//! The kernels: their PTX, and a typed launch for each. What a kernel computes
//! stands at the head of its `.cu` file.

use super::driver::{Argument, Gpu, Region};
use crate::error::Result;
use crate::quant::{MatrixLayout, Storage, WeightDtype};

/// Name, PTX and kernels of each file.
pub(super) const MODULES: &[(&str, &str, &[&str])] = &[
    ("attention", include_str!("kernels/attention.ptx"), &["attend", "rotate_and_append"]),
    ("elementwise", include_str!("kernels/elementwise.ptx"), &["activate", "embed", "top_k"]),
    (
        "matmul",
        include_str!("kernels/matmul.ptx"),
        &[
            "few_bf16",
            "few_f16",
            "few_f32",
            "few_int4",
            "few_int8",
            "many_bf16",
            "many_f16",
            "many_f32",
            "many_int4",
            "many_int8",
        ],
    ),
    ("norm", include_str!("kernels/norm.ptx"), &["normalize"]),
    ("quantize", include_str!("kernels/quantize.ptx"), &["quantize_int4", "quantize_int8"]),
];

/// The widest head that [`Gpu::attend`] takes.
pub const MAX_HEAD_DIM: usize = 512;
/// The most tokens that take the kernels which read each weight once.
const FEW: usize = 8;
/// Rows and tokens of a block of the others.
const TILE: usize = 64;
/// Bytes of an f16 and of an f32.
const HALF: usize = 2;
const FLOAT: usize = 4;

/// A matrix or vector on a GPU, in the canonical packing.
#[derive(Clone)]
pub struct DeviceMatrix {
    layout: MatrixLayout,
    region: Region,
}

impl DeviceMatrix {
    /// The matrix of `layout` at the start of `region`.
    ///
    /// # Panics
    /// The region is shorter than the layout.
    pub fn new(layout: MatrixLayout, region: Region) -> Self {
        assert!(region.len() as u64 >= layout.size().0, "a region is shorter than the matrix in it");
        Self { layout, region }
    }

    /// Where its sections stand.
    pub fn layout(&self) -> &MatrixLayout {
        &self.layout
    }

    /// The bytes from `offset` of the matrix on, where a section or a row of one starts.
    pub fn at(&self, offset: u64) -> Region {
        // The matrix lies in its region, whose length is a usize.
        #[expect(clippy::cast_possible_truncation, reason = "an offset into the region")]
        let offset = offset as usize;
        self.region.part(offset, self.region.len() - offset)
    }

    /// Codes, sub-scales and scales from `row` on; `None` for those that the storage has not.
    fn sections(&self, row: usize) -> [Option<Region>; 3] {
        let layout = &self.layout;
        let section = |there: bool, at| there.then(|| self.at(at));
        [
            Some(self.at(layout.codes_at(row))),
            section(layout.sub_scale_row > 0, layout.sub_scales_at(row)),
            section(layout.scale_row > 0, layout.scales_at(row)),
        ]
    }
}

/// Where a result goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Into a buffer of f16.
    F16 = 0,
    /// Into a buffer of f32.
    F32 = 1,
    /// Onto what a buffer of f32 holds.
    Add = 2,
}

impl Output {
    fn size(self) -> usize {
        if self == Self::F16 { HALF } else { FLOAT }
    }
}

/// What a norm does with a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + ε)`.
    Rms = 0,
    /// `(x − mean(x)) / sqrt(variance(x) + ε)`.
    Layer = 1,
}

/// A norm: `y = normalized(x) · (weight + offset) + bias`.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// How rows are normalized.
    pub kind: NormKind,
    /// A plain vector as long as a row.
    pub weight: &'a DeviceMatrix,
    /// Another.
    pub bias: Option<&'a DeviceMatrix>,
    /// Added to each weight.
    pub offset: f32,
    /// ε.
    pub epsilon: f32,
}

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(−x))`.
    Silu = 0,
    /// GELU by the hyperbolic tangent.
    GeluTanh = 1,
    /// GELU by the error function.
    Gelu = 2,
}

/// The shape of attention, and where it stands in the sequence.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key-value heads, which divides that of query heads.
    pub kv_heads: usize,
    /// Width of a head, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// Tokens that the cache has room for.
    pub context: usize,
    /// Position of the first token.
    pub position: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// The last keys that a query sees; 0 for all.
    pub window: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Bound of the scores; 0 for none.
    pub softcap: f32,
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
    }
}

/// A dimension as a kernel takes it. Configurations allow none above 2^28.
fn int(n: usize) -> Argument<'static> {
    Argument::I32(i32::try_from(n).unwrap_or_else(|_| unreachable!("a dimension of {n}")))
}

fn pointer(region: Option<&Region>) -> Argument<'_> {
    region.map_or(Argument::Null, Argument::Region)
}

/// A plain vector of `len` elements and its dtype; null where there is none.
fn vector(matrix: Option<&DeviceMatrix>, len: usize) -> (Argument<'_>, Argument<'static>) {
    match matrix.map(|matrix| (matrix, matrix.layout.storage)) {
        Some((matrix, Storage::Plain(dtype))) => {
            assert_eq!(matrix.layout.rows * matrix.layout.cols, len, "a vector of another length");
            (Argument::Region(&matrix.region), Argument::I32(dtype_number(dtype)))
        }
        Some(_) => unreachable!("norms and biases are plain"),
        None => (Argument::Null, Argument::I32(0)),
    }
}

/// Sees to it that a region holds `count` elements of `size` bytes.
#[track_caller]
fn holds(region: &Region, count: usize, size: usize) {
    assert!(region.len() >= count * size, "a kernel is given a region that is too short");
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
        let (kernel, threads, sections) = match layout.storage {
            Storage::Int8 => ("quantize_int8", 256, vec![pointer(codes.as_ref()), pointer(scales.as_ref())]),
            Storage::Int4 => (
                "quantize_int4",
                128,
                vec![pointer(codes.as_ref()), pointer(sub_scales.as_ref()), pointer(scales.as_ref())],
            ),
            Storage::Plain(_) => unreachable!("plain storage is copied, not quantized"),
        };
        self.launch(kernel, (rows, 1), threads, &[&head[..], &sections, &[Argument::Region(failed)]].concat())
    }

    /// `y = x · wᵀ + bias` for `tokens` rows of f16 in `x`.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn matmul(
        &self,
        matrix: &DeviceMatrix,
        bias: Option<&DeviceMatrix>,
        x: &Region,
        tokens: usize,
        y: &Region,
        output: Output,
    ) -> Result<()> {
        let (rows, cols) = (matrix.layout.rows, matrix.layout.cols);
        holds(x, tokens * cols, HALF);
        holds(y, tokens * rows, output.size());
        let names = match matrix.layout.storage {
            Storage::Plain(WeightDtype::Bf16) => ["few_bf16", "many_bf16"],
            Storage::Plain(WeightDtype::F16) => ["few_f16", "many_f16"],
            Storage::Plain(WeightDtype::F32) => ["few_f32", "many_f32"],
            Storage::Int8 => ["few_int8", "many_int8"],
            Storage::Int4 => ["few_int4", "many_int4"],
        };
        let (kernel, grid) = if tokens <= FEW {
            (names[0], (rows.div_ceil(8), 1))
        } else {
            (names[1], (rows.div_ceil(TILE), tokens.div_ceil(TILE)))
        };
        let [codes, sub_scales, scales] = matrix.sections(0);
        let (bias, bias_dtype) = vector(bias, rows);
        let arguments = [
            pointer(codes.as_ref()),
            pointer(sub_scales.as_ref()),
            pointer(scales.as_ref()),
            int(rows),
            int(cols),
            Argument::Region(x),
            int(tokens),
            bias,
            bias_dtype,
            Argument::Region(y),
            Argument::I32(output as i32),
        ];
        self.launch(kernel, grid, 256, &arguments)
    }

    /// A norm of `rows` rows of `dtype` in `x`; without one, the rows as they are.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn normalize(
        &self,
        norm: Option<Norm>,
        x: &Region,
        dtype: WeightDtype,
        shape: (usize, usize),
        y: &Region,
        output: Output,
    ) -> Result<()> {
        let (rows, width) = shape;
        holds(x, rows * width, dtype.size());
        holds(y, rows * width, output.size());
        let (weight, weight_dtype) = vector(norm.map(|norm| norm.weight), width);
        let (bias, bias_dtype) = vector(norm.and_then(|norm| norm.bias), width);
        let kind = norm.map_or(2, |norm| norm.kind as i32);
        let arguments = [
            Argument::Region(x),
            Argument::I32(dtype_number(dtype)),
            weight,
            weight_dtype,
            bias,
            bias_dtype,
            Argument::F32(norm.map_or(0.0, |norm| norm.offset)),
            Argument::Region(y),
            Argument::I32(output as i32),
            int(width),
            Argument::I32(kind),
            Argument::F32(norm.map_or(0.0, |norm| norm.epsilon)),
        ];
        self.launch("normalize", (rows, 1), 256, &arguments)
    }

    /// Rotates queries and keys by their positions, and puts keys and values into the cache.
    /// `frequencies` has an f32 for each pair that is rotated; `factor` scales them all.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn rotate_and_append(
        &self,
        shape: &Attention,
        [query, key, value]: [&Region; 3],
        [keys, values]: [&Region; 2],
        frequencies: &Region,
        factor: f32,
    ) -> Result<()> {
        shape.check(query, [keys, values]);
        for region in [key, value] {
            holds(region, shape.tokens * shape.kv_heads * shape.head_dim, HALF);
        }
        let pairs = frequencies.len() / FLOAT;
        assert!(2 * pairs <= shape.head_dim, "more pairs than a head has");
        let regions = [query, key, value, keys, values, frequencies].map(Argument::Region);
        let numbers = [
            int(shape.heads),
            int(shape.kv_heads),
            int(shape.head_dim),
            int(2 * pairs),
            int(shape.context),
            int(shape.position),
            Argument::F32(factor),
        ];
        self.launch("rotate_and_append", (shape.tokens, 1), 128, &[&regions[..], &numbers].concat())
    }

    /// Attention of `query` over the cache, into `out`.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn attend(&self, shape: &Attention, query: &Region, cache: [&Region; 2], out: &Region) -> Result<()> {
        shape.check(query, cache);
        holds(out, shape.tokens * shape.heads * shape.head_dim, HALF);
        assert!(shape.head_dim <= MAX_HEAD_DIM, "a head that is too wide");
        let regions = [query, cache[0], cache[1], out].map(Argument::Region);
        let numbers = [
            int(shape.heads),
            int(shape.kv_heads),
            int(shape.head_dim),
            int(shape.context),
            int(shape.position),
            int(shape.window),
            Argument::F32(shape.scale),
            Argument::F32(shape.softcap),
        ];
        self.launch("attend", (shape.tokens, shape.heads), 128, &[&regions[..], &numbers].concat())
    }

    /// `scale` times the rows of `matrix` that the u32 in `tokens` name, into f32.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn embed(&self, matrix: &DeviceMatrix, tokens: &Region, scale: f32, hidden: &Region) -> Result<()> {
        let (count, cols) = (tokens.len() / size_of::<u32>(), matrix.layout.cols);
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
        let arguments = [Argument::Region(gate), up, int(count), Argument::I32(activation as i32)];
        self.launch("activate", (count.div_ceil(256), 1), 256, &arguments)
    }

    /// The indices of the largest of `count` f32 in `logits`, best first, as many as `indices` has u32.
    ///
    /// # Errors
    /// The driver fails.
    ///
    /// # Panics
    /// A region is shorter than the shapes say.
    pub fn top_k(&self, logits: &Region, count: usize, indices: &Region) -> Result<()> {
        let k = indices.len() / size_of::<u32>();
        assert!(k <= count, "more of the best than there are");
        holds(logits, count, FLOAT);
        self.launch("top_k", (1, 1), 256, &[Argument::Region(logits), int(count), int(k), Argument::Region(indices)])
    }
}

impl Attention {
    fn check(&self, query: &Region, cache: [&Region; 2]) {
        assert!(self.position + self.tokens <= self.context, "more tokens than the cache holds");
        holds(query, self.tokens * self.heads * self.head_dim, HALF);
        for region in cache {
            holds(region, self.kv_heads * self.context * self.head_dim, HALF);
        }
    }
}
