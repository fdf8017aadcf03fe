//! The kernels by name, the files that they are in, and a GPU with them loaded.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread::ScopedJoinHandle;

use cudarc::driver::CudaFunction;

use super::compile::{Compiling, Source};
use super::driver::{Gpu, LinkError, driver_version};
use super::installation::uuid;
use crate::error::{Error, Result};
use crate::machine::NEEDED_CAPABILITY;
use crate::pool::lock;

/// The first compute capability whose tensor cores the kernels use.
pub(super) const TENSOR_CORES: (i32, i32) = (8, 0);
/// The first compute capability that begins a kernel while the one before it ends.
pub(super) const EARLY: (i32, i32) = (9, 0);
/// What makes comments of the instructions for that; common.cuh writes it.
const EARLY_MARK: &str = "//sm_90 ";

struct Module {
    name: &'static str,
    /// The compute capability that its PTX is for; build_ptx.py says the same.
    capability: (i32, i32),
    ptx: &'static str,
    kernels: &'static [Kernel],
}

macro_rules! modules {
    ($($module:ident($capability:expr) $($kernel:ident)*;)*) => {
        /// A kernel, spelled as in its `.cu` file.
        #[expect(non_camel_case_types, reason = "spelled as in CUDA")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Kernel {
            $($($kernel,)*)*
        }

        const MODULES: &[Module] = &[$(Module {
            name: stringify!($module),
            capability: $capability,
            ptx: include_str!(concat!("kernels/", stringify!($module), ".ptx")),
            kernels: &[$(Kernel::$kernel),*],
        }),*];
    };
}

modules! {
    attention(NEEDED_CAPABILITY) attend_1 attend_4 rotate_and_store;
    attention_mma(TENSOR_CORES) attend_many_64 attend_many_128 attend_many_256;
    choose(NEEDED_CAPABILITY) cut draw largest;
    elementwise(NEEDED_CAPABILITY) activate embed gather scatter_add;
    matmul(NEEDED_CAPABILITY)
        few_bf16 few_f16 few_f32 few_int4 few_int8 few_nl4
        many_bf16 many_f16 many_f32 many_int4 many_int8 many_nl4;
    mma_few(TENSOR_CORES) mma_few_int4 mma_few_int8 mma_few_nl4;
    mma_many(TENSOR_CORES)
        mma_many_bf16_64 mma_many_f16_64 mma_many_int4_64 mma_many_int8_64 mma_many_nl4_64
        mma_many_bf16_128 mma_many_f16_128 mma_many_int4_128 mma_many_int8_128 mma_many_nl4_128;
    norm(NEEDED_CAPABILITY) normalize;
    quantize(NEEDED_CAPABILITY) quantize_int4 quantize_int8 quantize_nl4;
}

impl Kernel {
    /// Whether tensor cores do the same: a GPU of `capability` never launches it.
    fn is_replaced(self, capability: (i32, i32)) -> bool {
        use Kernel::{few_int4, few_int8, few_nl4, many_bf16, many_f16, many_int4, many_int8, many_nl4};
        let replaced = [few_int4, few_int8, few_nl4, many_bf16, many_f16, many_int4, many_int8, many_nl4];
        capability >= TENSOR_CORES && replaced.contains(&self)
    }
}

/// The PTX of a file for a GPU of `capability`: with the instructions that it has, and the file's own has not.
fn ptx_for(ptx: &'static str, capability: (i32, i32)) -> Cow<'static, str> {
    if capability < EARLY {
        return ptx.into();
    }
    let target = |line: &str| {
        if line.starts_with(".target ") { ".target sm_90".to_owned() } else { line.replace(EARLY_MARK, "") }
    };
    ptx.lines().map(target).collect::<Vec<_>>().join("\n").into()
}

/// The names of the kernels whose number is wanted.
fn named(is_wanted: impl Fn(usize) -> bool) -> impl Iterator<Item = String> {
    let all = MODULES.iter().flat_map(|module| module.kernels);
    all.filter(move |kernel| is_wanted(**kernel as usize)).map(|kernel| format!("{kernel:?}"))
}

/// A name for what the GPU at `index` computes with: itself, the version of its driver, and a hash of all PTX.
pub fn fingerprint(index: u32) -> Option<String> {
    let driver = driver_version().ok().flatten()?;
    let mut hasher = DefaultHasher::new();
    for module in MODULES {
        module.ptx.hash(&mut hasher);
    }
    Some(format!("{}-{driver}-{:016x}", uuid(index)?, hasher.finish()))
}

impl Gpu {
    /// Opens the GPU at `index` among those that the driver shows, and loads the kernels.
    pub fn open(index: u32) -> Result<Arc<Self>> {
        Self::open_with(index, &Compiling::default())
    }

    /// As [`Gpu::open`]; kernels that nobody has kept are compiled.
    pub fn open_with(index: u32, options: &Compiling) -> Result<Arc<Self>> {
        Self::open_limited(index, (i32::MAX, 0), options)
    }

    /// As [`Gpu::open`], with the kernels that a GPU of `capability` runs where this one has more.
    pub fn open_as(index: u32, capability: (i32, i32)) -> Result<Arc<Self>> {
        Self::open_limited(index, capability, &Compiling::default())
    }

    fn open_limited(index: u32, most: (i32, i32), options: &Compiling) -> Result<Arc<Self>> {
        let mut gpu = Self::without_kernels(index)?;
        let own = gpu.capability;
        gpu.capability = own.min(most);
        let (context, capability) = (&gpu.context, gpu.capability);
        let driver = driver_version().ok().flatten().unwrap_or_default();
        // Without the least that any file needs, the driver says what is wrong.
        let has = capability.max(NEEDED_CAPABILITY);
        let wanted: Vec<_> = MODULES.iter().filter(|module| module.capability <= has).collect();
        let load = |module: &Module| {
            let (name, ptx) = (module.name, &*ptx_for(module.ptx, capability));
            Source { driver, capability: own, name, ptx }.load(context, options)
        };
        // Each file on one processor.
        let loaded: Vec<_> = std::thread::scope(|scope| {
            let begin = |module| std::thread::Builder::new().spawn_scoped(scope, move || load(module));
            let threads: Vec<_> = wanted.iter().map(|module| (*module, begin(*module))).collect();
            let end = |(module, thread): (_, std::io::Result<ScopedJoinHandle<_>>)| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|e| resume_unwind(e)),
                // Without a thread it is done here.
                Err(_) => load(module),
            };
            threads.into_iter().map(end).collect()
        });
        let mut functions = BTreeMap::new();
        for (Module { name, kernels, .. }, module) in wanted.into_iter().zip(loaded) {
            let module = module.map_err(|LinkError { error, log }| {
                let said = if log.is_empty() { log } else { format!(" ({log})") };
                gpu.failure(&format!("cannot load the kernels `{name}`{said}"), error)
            })?;
            let module = module.ok_or_else(Error::interrupted)?;
            for kernel in kernels.iter().filter(|kernel| !kernel.is_replaced(capability)) {
                let function = module.load_function(&format!("{kernel:?}"));
                let function = function.map_err(|e| gpu.failure(&format!("has no kernel `{kernel:?}`"), e))?;
                gpu.load_now(&function).map_err(|e| gpu.failure(&format!("cannot load the kernel `{kernel:?}`"), e))?;
                functions.insert(*kernel as usize, function);
            }
        }
        gpu.functions = functions;
        Ok(Arc::new(gpu))
    }

    /// The names of the kernels that are loaded.
    pub fn kernels(&self) -> impl Iterator<Item = String> {
        named(|kernel| self.functions.contains_key(&kernel))
    }

    /// Does what launches kernels, and names those.
    pub fn traced<T>(&self, launches: impl FnOnce() -> T) -> (T, Vec<String>) {
        *lock(&self.launched) = Some(BTreeSet::new());
        let done = launches();
        let numbers = lock(&self.launched).take().unwrap_or_default();
        (done, named(|kernel| numbers.contains(&kernel)).collect())
    }

    pub(super) fn function(&self, kernel: Kernel) -> &CudaFunction {
        let function = self.functions.get(&(kernel as usize));
        function.unwrap_or_else(|| unreachable!("{} runs no `{kernel:?}`", self.id()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The names of the kernels in a PTX, and the text of each.
    fn entries(ptx: &str) -> impl Iterator<Item = (&str, &str)> {
        ptx.split(".visible .entry ").skip(1).map(|entry| entry.split_once('(').unwrap())
    }

    #[test]
    fn the_kernels_are_those_of_the_ptx() {
        for module in MODULES {
            let named: BTreeSet<_> = module.kernels.iter().map(|kernel| format!("{kernel:?}")).collect();
            let there: BTreeSet<_> = entries(module.ptx).map(|(name, _)| name.to_owned()).collect();
            assert_eq!(named, there, "{}", module.name);
            let (major, minor) = module.capability;
            assert!(module.ptx.contains(&format!("\n.target sm_{major}{minor}\n")), "{}", module.name);
        }
        let files = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/backend/cuda/kernels")).unwrap();
        let files = files.map(|file| file.unwrap().path()).filter(|file| file.extension().is_some_and(|e| e == "cu"));
        let stems: BTreeSet<_> = files.map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
        assert_eq!(stems, MODULES.iter().map(|module| module.name.to_owned()).collect());
    }

    #[test]
    fn every_kernel_waits_for_the_one_before_it_where_it_begins_early() {
        for module in MODULES {
            assert_eq!(ptx_for(module.ptx, (8, 9)), module.ptx, "{}", module.name);
            let early = ptx_for(module.ptx, (10, 0));
            assert_eq!(early.matches("\n.target sm_90\n").count(), 1, "{}", module.name);
            assert_eq!(early.matches(".target").count(), 1, "{}", module.name);
            for (name, text) in entries(&early) {
                for instruction in ["griddepcontrol.wait;", "griddepcontrol.launch_dependents;"] {
                    let count = text.lines().filter(|line| line.trim() == instruction).count();
                    assert_eq!(count, 1, "{instruction} in {name}");
                }
            }
        }
    }
}
