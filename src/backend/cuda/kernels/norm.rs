//! Launches of norm.cu, and norms as other kernels take them.

use std::ops::Range;

use super::launch::Argument;
use crate::backend::cuda::driver::{Gpu, Region};
use crate::backend::cuda::modules::Kernel;
use crate::backend::cuda::operands::{DeviceMatrix, Norm, Output, holds};
use crate::error::Result;
use crate::model_config::NormKind;
use crate::quant::WeightDtype;

/// A plain vector as kernels take it: its elements, and their dtype; null where there is none.
pub struct Vector(Option<(Region, WeightDtype)>);

impl Vector {
    pub fn new(matrix: Option<&DeviceMatrix>, range: Range<usize>) -> Self {
        Self(matrix.map(|matrix| matrix.elements(range)))
    }

    pub fn given(&self) -> [Argument<'_>; 2] {
        match &self.0 {
            Some((elements, dtype)) => [Argument::Region(elements), Argument::dtype(*dtype)],
            None => [Argument::Null, Argument::I32(0)],
        }
    }
}

/// A norm as kernels take it; see norm.cuh.
pub struct NormArguments {
    kind: i32,
    weight: Vector,
    bias: Vector,
    offset: f32,
    epsilon: f32,
}

impl NormArguments {
    pub fn new(norm: Option<&Norm>, width: usize) -> Self {
        let (kind, offset) = match norm.map(|norm| norm.kind) {
            Some(NormKind::Rms) => (0, 0.0),
            Some(NormKind::RmsPlusOne) => (0, 1.0),
            Some(NormKind::Layer) => (1, 0.0),
            None => (2, 0.0),
        };
        let [weight, bias] = [norm.map(|norm| norm.affine.weight), norm.and_then(|norm| norm.affine.bias)]
            .map(|of| Vector::new(of, 0..width));
        Self { kind, weight, bias, offset, epsilon: norm.map_or(0.0, |norm| norm.epsilon) }
    }

    pub fn given(&self) -> [Argument<'_>; 7] {
        let ([weight, weight_dtype], [bias, bias_dtype]) = (self.weight.given(), self.bias.given());
        let [offset, epsilon] = [self.offset, self.epsilon].map(Argument::F32);
        [Argument::I32(self.kind), weight, weight_dtype, bias, bias_dtype, offset, epsilon]
    }
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
        let norm = NormArguments::new(norm, width);
        let arguments = [
            &[Argument::Region(x), Argument::dtype(dtype)],
            &norm.given()[..],
            &[Argument::Region(y), Argument::I32(output as i32), Argument::int(width), Argument::F32(factor)],
        ];
        self.launch(Kernel::normalize, (rows, 1), 256, &arguments.concat())
    }
}
