//! Typed launches of the kernels, a file beside each `.cu`; what a kernel computes stands at the head of that.

mod attention;
mod choose;
mod elementwise;
mod launch;
mod norm;
mod product;
mod quantize;

pub use choose::Choosing;
pub use launch::Graph;

/// The most tokens that take the kernels which read each weight once, `few_…` and `mma_few_…`; and those of
/// attention that do without tensor cores.
pub const FEW: usize = 8;
