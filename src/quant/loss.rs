//! What packing does to weights.

use super::{Matrix, MatrixLayout, PackedRows, QuantizeError, Storage, WeightDtype, quantize_rows};

/// The squared error of rows of `cols` weights in `storage`, and the squared weights.
///
/// # Panics
/// `storage` is plain.
pub fn squared_error(
    storage: Storage,
    dtype: WeightDtype,
    cols: usize,
    weights: &[u8],
) -> Result<(f64, f64), QuantizeError> {
    let row_bytes = cols * dtype.size();
    let rows = weights.len() / row_bytes;
    let (Some(layout), mut packed) = (MatrixLayout::new(storage, rows, cols), PackedRows::default()) else {
        unreachable!("the rows are in memory")
    };
    quantize_rows(&layout, dtype, weights, &mut packed)?;
    let bytes = packed.matrix(&layout);
    let matrix = Matrix::new(&layout, &bytes);
    let (mut exact, mut values) = (vec![0.0; cols], vec![0.0; cols]);
    let (mut error, mut norm) = (0.0, 0.0);
    for (row, bytes) in weights.chunks(row_bytes).enumerate() {
        dtype.decode(bytes, &mut exact);
        matrix.dequantize_row(row, &mut values);
        for (exact, value) in exact.iter().zip(&values) {
            error += f64::from(exact - value).powi(2);
            norm += f64::from(*exact).powi(2);
        }
    }
    Ok((error, norm))
}
