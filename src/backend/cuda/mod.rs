//! NVIDIA GPUs, through the driver alone: the library is opened at run time,
//! and a machine without it has no GPUs.
//!
//! | file | what |
//! | --- | --- |
//! | `driver.rs` | contexts, memory, copies |
//! | `installation.rs` | which GPUs there are |
//! | `modules.rs` | the kernels by name, and a GPU with them loaded |
//! | `operands.rs` | what kernels are given: matrices, norms, caches |
//! | `kernels/` | a file of launches beside each of kernels; `launch.rs` there and `driver.rs` have all that is unsafe |
//! | `repeat.rs` | launches that come again and again |
//! | `answers.rs` | chosen tokens on their way to the host |
//! | `upload.rs` | rows from the host into the canonical packing |
//! | `workspace.rs` | the buffers of a step |
//! | `stage.rs` | a run of modules on one GPU |

mod answers;
mod driver;
mod installation;
mod kernels;
mod modules;
mod operands;
mod repeat;
mod stage;
mod upload;
mod workspace;

pub use driver::{Buffer, Copying, Gpu, Pinned, Region, arena};
pub use installation::{GpuInfo, Installation, devices, measure_bandwidth};
pub use kernels::Choosing;
pub use operands::{Affine, Attention, Cache, DeviceMatrix, Input, MAX_HEAD_DIM, Norm, Output, Scratch};
pub use stage::CudaStage;
pub use upload::{InFlight, Upload};
pub use workspace::Workspace;
