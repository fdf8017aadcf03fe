//! What quantizing costs: the squared error of seeded matrices, and how fast
//! weights go in, beside a plain read of memory in the same run.
//!
//! `cargo bench --bench quantize`; one thread, so figures are those of one core.
#![allow(clippy::print_stdout, reason = "a table is what this is for")]

#[path = "../tests/support/weights.rs"]
mod weights;

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use evenkeel::pool::Pool;
use evenkeel::quant::{MatrixLayout, PackedRows, Storage, WeightDtype, quantize_rows};
use half::bf16;

const ROWS: usize = 512;
const COLS: usize = 4096;

/// The fastest of several runs, in GB/s.
fn rate(bytes: usize, mut run: impl FnMut()) -> f64 {
    let mut fastest = Duration::MAX;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        let start = Instant::now();
        run();
        fastest = fastest.min(start.elapsed());
    }
    bytes as f64 / fastest.as_secs_f64() / 1e9
}

fn main() {
    let pool = Pool::new(NonZeroUsize::MIN);
    println!("relative squared error of {ROWS} × {COLS} weights, in thousandths");
    println!("weights  int8   int4  (bar)  nl4  (bar)");
    for (distribution, int4_bar, nl4_bar) in weights::DISTRIBUTIONS {
        let matrix = weights::matrix(distribution, ROWS, COLS);
        let error = |storage| weights::relative_error(storage, COLS, &matrix);
        let [int8, int4, nl4] = [Storage::Int8, Storage::Int4, Storage::Nl4].map(error);
        println!("{distribution:<8} {int8:.2}  {int4:>5.2}  {int4_bar:>5}  {nl4:.2}  {nl4_bar:>4}");
        assert!(int4 <= int4_bar && nl4 <= nl4_bar, "{distribution} is beyond its bar");
    }

    let f32s = weights::matrix("gauss", ROWS, COLS);
    let bf16s: Vec<u8> = f32s
        .as_chunks::<4>()
        .0
        .iter()
        .flat_map(|bytes| bf16::from_f32(f32::from_le_bytes(*bytes)).to_le_bytes())
        .collect();
    println!("\ninput of bf16 weights, one core");
    for (name, storage) in [("int8", Storage::Int8), ("int4", Storage::Int4), ("nl4", Storage::Nl4)] {
        let layout = MatrixLayout::new(storage, ROWS, COLS).expect("a layout");
        let mut packed = PackedRows::default();
        let rate = rate(bf16s.len(), || {
            quantize_rows(&pool, &layout, WeightDtype::Bf16, black_box(&bf16s), &mut packed).expect("finite weights");
        });
        println!("{name}    {rate:.3} GB/s");
    }
    // Larger than the caches, as weights are.
    let memory = vec![1u64; 1 << 25];
    let rate = rate(memory.len() * 8, || {
        black_box(black_box(&memory).iter().fold(0u64, |sum, word| sum.wrapping_add(*word)));
    });
    println!("a plain read of memory  {rate:.1} GB/s");
}
