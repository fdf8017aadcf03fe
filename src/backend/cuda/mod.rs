//! NVIDIA GPUs, through the driver alone: the library is opened at run time,
//! and a machine without it has no GPUs.
//!
//! Only `driver.rs` and `kernels/launch.rs` have what is unsafe; of `kernels/`, a file of launches stands beside
//! each of kernels.

mod compile;
mod driver;
mod exchange;
mod fault;
mod installation;
mod kernels;
mod modules;
mod occupancy;
mod operands;
mod repeat;
mod stage;
mod upload;
mod workspace;

pub use compile::Compiling;
pub use driver::{Copying, Gpu, Pinned, Region, arena};
pub use installation::{GpuInfo, Installation, Mode, uuids};
pub use kernels::Choosing;
pub use modules::fingerprint;
pub use occupancy::Occupant;
pub use operands::{
    Affine, Attention, Cache, DeviceMatrix, GATED, Input, MAX_HEAD_DIM, Norm, Output, Rotation, Rows, Scratch,
};
pub use stage::CudaStage;
pub use upload::{InFlight, Upload};
pub use workspace::Workspace;
