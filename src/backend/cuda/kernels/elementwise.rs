//! Launches of elementwise.cu.

use super::launch::Argument;
use crate::backend::cuda::driver::{Gpu, Region};
use crate::backend::cuda::modules::Kernel;
use crate::backend::cuda::operands::{Affine, HALF, Output, WORD, holds};
use crate::error::Result;
use crate::model_config::Activation;

/// Every launch is queued on the compute stream, and panics where a region is shorter than its shapes say.
impl Gpu {
    /// `scale` times the rows of a matrix that the u32 in `tokens` name, into f32 or onto it; NaN for one that
    /// names none.
    pub fn embed(&self, affine: &Affine, tokens: &Region, scale: f32, hidden: &Region, output: Output) -> Result<()> {
        let (matrix, cols) = (&affine.weight, affine.cols());
        let count = tokens.len() / size_of::<u32>();
        holds(hidden, [count, cols], WORD);
        let [codes, sub_scales, scales] = Argument::sections(matrix, 0);
        let arguments = [
            Argument::Region(tokens),
            codes,
            sub_scales,
            scales,
            Argument::storage(matrix.layout.storage),
            Argument::int(matrix.layout.rows),
            Argument::int(cols),
            Argument::F32(scale),
            Argument::I32(i32::from(output == Output::Add)),
            Argument::Region(hidden),
        ];
        self.launch(Kernel::embed, (count, 1), 256, &arguments)
    }

    /// `gate = activation(gate) · up` for `count` elements of f16.
    pub fn activate(&self, activation: Activation, gate: &Region, up: Option<&Region>, count: usize) -> Result<()> {
        for region in up.into_iter().chain([gate]) {
            holds(region, [count], HALF);
        }
        let [gate, up] = [Some(gate), up].map(Argument::optional);
        let arguments = [gate, up, Argument::int(count), Argument::activation(Some(activation))];
        self.launch(Kernel::activate, (count.div_ceil(256), 1), 256, &arguments)
    }

    /// The rows of `x`, f16 of `width`, that the u32 in `tokens` name; NaN for one that names none.
    pub fn gather(&self, x: &Region, tokens: &Region, width: usize, out: &Region) -> Result<()> {
        let count = tokens.len() / size_of::<u32>();
        holds(out, [count, width], HALF);
        let [rows, width] = [x.len() / (width * HALF), width].map(Argument::int);
        let arguments = [Argument::Region(x), Argument::Region(tokens), rows, width, Argument::Region(out)];
        self.launch(Kernel::gather, (count, 1), 256, &arguments)
    }

    /// Adds each row of `x`, f32 of `width`, times its f32 of `weights`, to the row of `out` that its
    /// u32 of `tokens` names, if there is one; none is named twice.
    pub fn scatter_add(&self, x: &Region, tokens: &Region, weights: &Region, width: usize, out: &Region) -> Result<()> {
        let count = tokens.len() / size_of::<u32>();
        holds(x, [count, width], WORD);
        holds(weights, [count], WORD);
        let regions = [x, tokens, weights].map(Argument::Region);
        let [rows, width] = [out.len() / (width * WORD), width].map(Argument::int);
        let arguments = [&regions[..], &[rows, width, Argument::Region(out)]].concat();
        self.launch(Kernel::scatter_add, (count, 1), 256, &arguments)
    }
}
