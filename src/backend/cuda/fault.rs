//! What a code of the driver means to whoever owns the machine.

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::machine::{Fault, needs};

/// The error's name and text, such as `CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)`.
pub fn name(error: DriverError) -> String {
    let text = |text: Result<&std::ffi::CStr, DriverError>| text.ok().map(|text| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Some(name), Some(text)) => format!("{name} ({text})"),
        _ => format!("error {}", error.0 as i32),
    }
}

/// What helps against an error, where that is known.
pub fn hint(error: DriverError) -> Option<String> {
    use CUresult as Code;
    let hint = match error.0 {
        Code::CUDA_ERROR_STUB_LIBRARY => {
            "the first libcuda.so on the library path is the CUDA toolkit's stub: take `…/stubs` out of LD_LIBRARY_PATH"
        }
        Code::CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "another process has the GPU for itself, or its compute mode forbids it: `nvidia-smi -q -d COMPUTE` says which"
        }
        Code::CUDA_ERROR_OUT_OF_MEMORY => "other processes have filled the GPU: `nvidia-smi` lists them",
        Code::CUDA_ERROR_NO_DEVICE | Code::CUDA_ERROR_INVALID_DEVICE => {
            "there is no GPU to be seen: a container has to be given them (docker's `gpus`), and CUDA_VISIBLE_DEVICES may hide them"
        }
        Code::CUDA_ERROR_SYSTEM_NOT_READY => {
            "the GPUs wait for the fabric manager: `sudo systemctl start nvidia-fabricmanager`"
        }
        Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the driver was updated while it ran, or a container brings another libcuda: reboot, or match the two"
        }
        Code::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "this GPU takes no newer libcuda than its driver's: take the `compat` directory out of LD_LIBRARY_PATH"
        }
        Code::CUDA_ERROR_UNKNOWN => {
            "the kernel module is not well, as after a suspend: `sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm`"
        }
        Code::CUDA_ERROR_JIT_COMPILER_NOT_FOUND => {
            "libnvidia-ptxjitcompiler.so.1 is not there: a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        }
        Code::CUDA_ERROR_JIT_COMPILATION_DISABLED => "CUDA_DISABLE_PTX_JIT forbids to compile kernels: unset it",
        Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION | Code::CUDA_ERROR_NO_BINARY_FOR_GPU => return Some(needs()),
        Code::CUDA_ERROR_ECC_UNCORRECTABLE | Code::CUDA_ERROR_CONTAINED => {
            "the GPU's memory is failing: `nvidia-smi -q -d ECC,PAGE_RETIREMENT` counts the errors; reset it or reboot"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

/// What `what` and `error` say together.
pub fn fault(what: &str, error: DriverError) -> Fault {
    let is_broken = error.0 != CUresult::CUDA_ERROR_NO_DEVICE;
    Fault { is_broken, what: format!("{what}: {}", name(error)), hint: hint(error) }
}
