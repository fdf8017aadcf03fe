//! Launches of quantize.cu.

use super::launch::Argument;
use crate::backend::cuda::driver::{Gpu, Region};
use crate::backend::cuda::modules::Kernel;
use crate::backend::cuda::operands::{DeviceMatrix, WORD, holds};
use crate::error::Result;
use crate::quant::{Storage, WeightDtype};

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
        holds(weights, [rows, layout.cols], dtype.size());
        holds(failed, [1], WORD);
        let head = [
            Argument::Region(weights),
            Argument::dtype(dtype),
            Argument::int(layout.cols),
            Argument::int(layout.padded_cols),
        ];
        let (kernel, threads) = match layout.storage {
            Storage::Int8 => (Kernel::quantize_int8, 256),
            Storage::Int4 => (Kernel::quantize_int4, 128),
            Storage::Nl4 => (Kernel::quantize_nl4, 128),
            Storage::Plain(_) => unreachable!("plain storage is copied, not quantized"),
        };
        let sections = Argument::sections(matrix, first).into_iter();
        let sections: Vec<_> = sections.filter(|section| !matches!(section, Argument::Null)).collect();
        self.launch(kernel, (rows, 1), threads, &[&head[..], &sections, &[Argument::Region(failed)]].concat())
    }
}
