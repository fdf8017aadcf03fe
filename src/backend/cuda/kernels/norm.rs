//! Launches of norm.cu, and norms as other kernels take them.

use super::launch::Argument;
use crate::backend::cuda::driver::{Gpu, Region};
use crate::backend::cuda::modules::Kernel;
use crate::backend::cuda::operands::{Norm, Output, holds};
use crate::error::Result;
use crate::model_config::NormKind;
use crate::quant::WeightDtype;

/// A norm as kernels take it; see norm.cuh.
pub fn arguments<'a>(norm: Option<&Norm<'a>>, width: usize) -> [Argument<'a>; 7] {
    let (kind, offset) = match norm.map(|norm| norm.kind) {
        Some(NormKind::Rms) => (0, 0.0),
        Some(NormKind::RmsPlusOne) => (0, 1.0),
        Some(NormKind::Layer) => (1, 0.0),
        None => (2, 0.0),
    };
    let vectors = [norm.map(|norm| &norm.affine.weight), norm.and_then(|norm| norm.affine.bias.as_ref())];
    let [[weight, weight_dtype], [bias, bias_dtype]] = vectors.map(|of| Argument::vector(of, 0..width));
    let [offset, epsilon] = [offset, norm.map_or(0.0, |norm| norm.epsilon)].map(Argument::F32);
    [Argument::I32(kind), weight, weight_dtype, bias, bias_dtype, offset, epsilon]
}

/// Every launch is queued on the compute stream, and panics where a region is shorter than its shapes say.
impl Gpu {
    /// `factor` times a norm of `rows` rows of `dtype` in `x`; without one, times the rows as they are.
    /// The shape is rows and their width.
    pub fn normalize(
        &self,
        norm: Option<&Norm>,
        (x, dtype): (&Region, WeightDtype),
        (rows, width): (usize, usize),
        y: &Region,
        output: Output,
        factor: f32,
    ) -> Result<()> {
        holds(x, [rows, width], dtype.size());
        holds(y, [rows, width], output.size());
        let arguments = [
            &[Argument::Region(x), Argument::dtype(dtype)],
            &arguments(norm, width)[..],
            &[Argument::Region(y), Argument::I32(output as i32), Argument::int(width), Argument::F32(factor)],
        ];
        self.launch(Kernel::normalize, (rows, 1), 256, &arguments.concat())
    }
}
