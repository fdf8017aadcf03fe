//! Which module goes on which device.

mod fastest;
pub mod hf;
mod runs;

pub use fastest::fastest;
pub use runs::{Capacity, balanced, packed, sequential};
