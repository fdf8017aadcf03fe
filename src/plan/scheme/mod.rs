//! Which scheme packs which module.

pub mod alternatives;
mod group;
pub mod kinds;
mod knapsack;
mod mixed;
mod sample;

pub use alternatives::Outline;
pub use kinds::KindReport;
