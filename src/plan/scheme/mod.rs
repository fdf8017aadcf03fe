//! Which scheme packs which module.

pub mod choose;
mod group;
pub mod kinds;
mod knapsack;
mod mixed;
mod sample;

pub use kinds::KindReport;
