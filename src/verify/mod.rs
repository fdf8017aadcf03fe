//! Whether GPUs compute what they should: every kernel as it will run against plain scalar Rust, copies from GPU to
//! GPU by a pattern, small models against the CPU, and planned bytes against those that are gone.
//!
//! A case has its shapes from its caller: a few small ones here, large tables of them in the tests.

mod attention;
mod cases;
mod model;
mod numbers;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Serialize, Serializer};

use crate::backend::Choice;
use crate::backend::cuda::{self, Gpu, Installation};
use crate::device::{DeviceError, DeviceId};
use crate::error::{Error, Result};
use crate::fs;
use crate::loader::{LoadEvent, LoadOptions, MeasuredDevice, open_gpus};
use crate::model_config::{Activation, NormKind};
use crate::quant::{KvDtype, Storage, WeightDtype};

pub use {attention::*, cases::*, numbers::*};

/// What was held against its reference, and what is wrong.
#[derive(Debug, Serialize)]
pub struct Verification {
    /// The GPUs that can be used, or should be.
    pub gpus: Vec<VerifiedGpu>,
    /// Copies from one GPU to another, each in both directions.
    pub hops: Vec<VerifiedHop>,
    /// Wall time.
    pub seconds: f64,
}

/// What was held against its reference on a GPU.
#[derive(Debug, Serialize)]
pub struct VerifiedGpu {
    /// The GPU.
    pub id: DeviceId,
    /// The kernels that ran in checks.
    pub kernels: BTreeSet<String>,
    /// Those of its kernels that ran in none.
    pub untried: Vec<String>,
    /// Planned and measured bytes of models whose logits are those of the CPU.
    pub models: Vec<MeasuredDevice>,
    /// What is wrong.
    #[serde(serialize_with = "texts")]
    pub wrong: Vec<Error>,
    /// Wall time.
    pub seconds: f64,
    /// The kernels that it is about: what else they spoil is not said again.
    #[serde(skip)]
    blamed: BTreeSet<String>,
}

/// A copy from GPU to GPU.
#[derive(Debug, Serialize)]
pub struct VerifiedHop {
    /// Where the bytes were.
    pub from: DeviceId,
    /// Where they went.
    pub to: DeviceId,
    /// What is wrong.
    #[serde(serialize_with = "texts")]
    pub wrong: Vec<Error>,
}

fn texts<S: Serializer>(errors: &[Error], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(errors.iter().map(ToString::to_string))
}

impl Verification {
    /// All that is wrong.
    pub fn wrong(&self) -> impl Iterator<Item = &Error> {
        self.gpus.iter().flat_map(|gpu| &gpu.wrong).chain(self.hops.iter().flat_map(|hop| &hop.wrong))
    }

    /// # Errors
    /// The first of what is wrong.
    pub fn into_result(self) -> Result<()> {
        let more = self.wrong().count().saturating_sub(1);
        let (gpus, hops) = (self.gpus.into_iter(), self.hops.into_iter());
        let first = gpus.flat_map(|gpu| gpu.wrong).chain(hops.flat_map(|hop| hop.wrong)).next();
        let Some(first) = first else { return Ok(()) };
        Err(if more > 0 { first.hint(format!("{more} more are wrong")) } else { first })
    }
}

impl VerifiedGpu {
    fn new(id: DeviceId) -> Self {
        Self {
            id,
            kernels: BTreeSet::new(),
            untried: Vec::new(),
            models: Vec::new(),
            wrong: Vec::new(),
            seconds: 0.0,
            blamed: BTreeSet::new(),
        }
    }

    /// Runs a check; what it launches is to blame where it gives something else.
    ///
    /// # Errors
    /// The GPU does not do what it is told.
    fn check(&mut self, gpu: &Gpu, check: impl FnOnce() -> Result<()>) -> Result<()> {
        let (outcome, launched) = gpu.traced(check);
        let named = launched.iter().map(|kernel| format!("`{kernel}`")).collect::<Vec<_>>().join(", ");
        self.kernels.extend(launched.iter().cloned());
        let Err(error) = outcome else { return Ok(()) };
        if error.cause::<Mismatch>().is_some() {
            if launched.iter().any(|kernel| self.blamed.contains(kernel)) {
                return Ok(());
            }
            let what = format!("gives something else than the reference with {named}: {error}");
            self.wrong.push(Error::device(DeviceError::Failed(self.id, what)));
            self.blamed.extend(launched);
            return Ok(());
        }
        // Behind a kernel that failed nothing works, and only what it leaves tells.
        let failed = DeviceError::Failed(self.id, format!("fails in a check of {named}: {error}"));
        Err(error.hints().iter().cloned().fold(Error::new(error.kind(), failed), Error::hint))
    }

    /// Every kernel, each by shapes that are small and, where it can be, alone before it is one of several.
    fn check_kernels(&mut self, gpu: &Arc<Gpu>) -> Result<()> {
        use Activation::{Gelu, GeluTanh, QuickGelu, Relu, Silu};
        for kind in [NormKind::Rms, NormKind::RmsPlusOne, NormKind::Layer] {
            self.check(gpu, || norm(gpu, kind, (5, 300)))?;
        }
        for storage in STORAGES {
            self.check(gpu, || embedding(gpu, storage, 40))?;
            for shape in [(20, 72, 1), (33, 100, 8), (300, 1100, 2), (70, 72, 66), (gpu.wide_rows(66), 40, 66)] {
                self.check(gpu, || product(gpu, storage, shape))?;
            }
        }
        for storage in STORAGES {
            for shape in [(40, 100, 1), (300, 600, 3), (40, 72, 12)] {
                self.check(gpu, || gated(gpu, storage, shape))?;
            }
        }
        for storage in [Storage::Int8, Storage::Int4, Storage::Nl4] {
            for dtype in [WeightDtype::Bf16, WeightDtype::F16, WeightDtype::F32] {
                self.check(gpu, || quantized(gpu, storage, (2, 100), dtype, &random(500, 1)))?;
            }
        }
        for function in [Silu, GeluTanh, Gelu, QuickGelu, Relu] {
            self.check(gpu, || activation(gpu, function, 600))?;
        }
        self.check(gpu, || gathered(gpu, 300))?;
        self.check(gpu, || scattered(gpu, 300))?;
        let apart = || vec![(64, 2), (-1, 0), (300, 0), (63, 1)];
        for (heads, kv_heads, head_dim, places, window, softcap) in [
            (2, 2, 40, run(300, 1, 1), 0, 0.0),
            (2, 2, 40, apart(), 0, 0.0),
            (4, 1, 16, run(150, 2, 1), 0, 30.0),
            (4, 1, 64, run(300, 1, 1), 100, 0.0),
            (4, 1, 64, apart(), 100, 0.0),
            (4, 2, 64, run(20, 12, 1), 0, 0.0),
            (4, 1, 128, run(70, 20, 1), 30, 0.0),
            (2, 1, 256, run(60, 9, 1), 0, 0.0),
        ] {
            let (shape, room) = case([heads, kv_heads, head_dim], &places, window, softcap);
            for dtype in KvDtype::ALL {
                self.check(gpu, || stored(gpu, &shape, &places, (head_dim / 2, 1.0), room, dtype))?;
                self.check(gpu, || attended(gpu, &shape, &places, room, dtype))?;
            }
        }
        let drawn = Choice { temperature: 0.8, ..Choice::GREEDY };
        let bound = Choice { top_k: 40, top_p: 0.9, min_p: 0.01, penalty: 1.3, ..drawn };
        for way in [Choice::GREEDY, drawn, bound] {
            self.check(gpu, || choice(gpu, &way, 2048))?;
        }
        self.untried = gpu.kernels().filter(|kernel| !self.kernels.contains(kernel)).collect();
        Ok(())
    }

    /// Opens the GPU as a load does, and tries its kernels.
    fn of_kernels(
        id: DeviceId,
        options: &LoadOptions,
        on_event: &mut dyn FnMut(LoadEvent),
    ) -> (Self, Option<Arc<Gpu>>) {
        let (start, mut verified) = (Instant::now(), Self::new(id));
        let opened = open_gpus(&[id], options, on_event).and_then(|gpus| {
            gpus.iter().try_for_each(|gpu| verified.check_kernels(gpu))?;
            Ok(gpus)
        });
        let gpu = match opened {
            Ok(gpus) => gpus.into_iter().next(),
            Err(error) => {
                verified.wrong.push(error);
                None
            }
        };
        verified.seconds = start.elapsed().as_secs_f64();
        (verified, gpu)
    }

    /// Keeps that nothing is wrong, or forgets it.
    fn keep(&self, directory: Option<&Path>) {
        let Some(file) = mark(directory, self.id) else { return };
        // What cannot be kept is verified again.
        let _ = if self.wrong.is_empty() {
            let kernels = self.kernels.iter().map(String::as_str).collect::<Vec<_>>().join("\n");
            let made = file.parent().map_or(Ok(()), std::fs::create_dir_all);
            made.map(|()| fs::write_atomic(&file, kernels.as_bytes(), true)).map(drop)
        } else {
            std::fs::remove_file(&file)
        };
    }
}

/// The file that says that a GPU was verified with this driver and these kernels.
fn mark(directory: Option<&Path>, id: DeviceId) -> Option<PathBuf> {
    let DeviceId::Cuda(index) = id else { return None };
    Some(directory?.join(cuda::fingerprint(index)?))
}

/// Holds all that models need of each GPU of this machine against references. Files are made in
/// [`LoadOptions::offload_directory`]; that nothing is wrong is kept in `kept`. Tells when kernels are compiled.
///
/// # Errors
/// There is no GPU, the driver fails, or the caller stops it. What is wrong with a GPU is in the report.
pub fn verify(options: &LoadOptions, kept: Option<&Path>, on_event: &mut dyn FnMut(LoadEvent)) -> Result<Verification> {
    let start = Instant::now();
    let broken = |fault: &crate::machine::Fault| Error::device(fault.to_string());
    let installation = Installation::find().map_err(|fault| broken(&fault))?;
    let found = installation.iter().flat_map(|found| &found.gpus);
    let (mut gpus, mut open) = (Vec::new(), Vec::new());
    for gpu in found.filter(|gpu| gpu.fault.as_ref().is_none_or(|fault| fault.is_broken)) {
        options.cancel.check()?;
        let id = gpu.device.id;
        if let Some(fault) = &gpu.fault {
            let wrong = vec![Error::device(DeviceError::Failed(id, format!("is not used: {fault}")))];
            gpus.push(VerifiedGpu { wrong, ..VerifiedGpu::new(id) });
            continue;
        }
        let (verified, gpu) = VerifiedGpu::of_kernels(id, options, on_event);
        open.extend(gpu);
        gpus.push(verified);
    }
    if gpus.is_empty() {
        return Err(Error::device("there is no GPU to verify"));
    }
    let hops = hops(&open);
    drop(open);
    for gpu in &mut gpus {
        options.cancel.check()?;
        let start = Instant::now();
        if gpu.wrong.is_empty() {
            match model::models(gpu.id, options) {
                Ok(models) => gpu.models = models,
                Err(error) => {
                    let what = format!("does not run small models as the CPU does: {error}");
                    gpu.wrong.push(Error::device(DeviceError::Failed(gpu.id, what)));
                }
            }
        }
        gpu.seconds += start.elapsed().as_secs_f64();
        gpu.keep(kept);
    }
    options.cancel.check()?;
    Ok(Verification { gpus, hops, seconds: start.elapsed().as_secs_f64() })
}

/// Copies between all pairs of GPUs, both ways.
fn hops(gpus: &[Arc<Gpu>]) -> Vec<VerifiedHop> {
    let pairs = gpus.iter().flat_map(|from| gpus.iter().map(move |to| (from, to)));
    let hops = pairs.filter(|(from, to)| from.id() != to.id()).map(|(from, to)| {
        let wrong = hop(from, to).err().map(|error| {
            let what = format!("does not get what {} has: {error}", from.id());
            Error::device(DeviceError::Failed(to.id(), what))
        });
        VerifiedHop { from: from.id(), to: to.id(), wrong: wrong.into_iter().collect() }
    });
    hops.collect()
}

/// Tries the kernels of those of the GPUs of which `kept` does not say that it was done, with this driver and these
/// kernels; gives those that were tried.
///
/// # Errors
/// One of them is wrong, or a GPU fails.
pub fn verify_once(
    gpus: impl IntoIterator<Item = DeviceId>,
    options: &LoadOptions,
    kept: Option<&Path>,
    on_event: &mut dyn FnMut(LoadEvent),
) -> Result<Vec<VerifiedGpu>> {
    let is_new = |id: &DeviceId| id.is_gpu() && mark(kept, *id).is_none_or(|file| !file.exists());
    let mut all = Vec::new();
    for id in gpus.into_iter().filter(is_new) {
        options.cancel.check()?;
        let (mut verified, _) = VerifiedGpu::of_kernels(id, options, on_event);
        if let Some(error) = verified.wrong.drain(..).next() {
            let is_wrong = !verified.blamed.is_empty();
            return Err(if is_wrong {
                error.hint("not the model is at fault, but kernels, driver or GPU")
            } else {
                error
            });
        }
        verified.keep(kept);
        all.push(verified);
    }
    Ok(all)
}
