//! Fixtures as people's tools leave them: other files, other tensors, another configuration.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use evenkeel::checkpoint::Checkpoint;
use evenkeel::generate::GenerateOptions;
use evenkeel::loader::Model;
use evenkeel::plan::{Plan, PlanOptions};
use evenkeel::quant::{KvDtype, WeightDtype};
use evenkeel::{Note, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::TempDir;

use super::{fixture, load_plan, roomy};

/// A tensor of f32.
#[derive(Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

pub type Tensors = BTreeMap<String, Tensor>;

/// A copy of a fixture.
pub struct Bent(TempDir);

impl Bent {
    pub fn of(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for entry in fixture(name).read_dir().unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
        }
        Self(directory)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn write(&self, file: &str, text: impl AsRef<[u8]>) {
        std::fs::write(self.path().join(file), text).unwrap();
    }

    pub fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.path().join(file)).unwrap()
    }

    fn weights(&self) -> Vec<PathBuf> {
        let files = self.path().read_dir().unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")).collect()
    }

    /// All tensors, as f32.
    pub fn tensors(&self) -> Tensors {
        let mut all = Tensors::new();
        for file in self.weights() {
            let bytes = std::fs::read(file).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let mut values = vec![0.0; view.shape().iter().product()];
                WeightDtype::of(view.dtype()).unwrap().decode(view.data(), &mut values);
                all.insert(name.to_owned(), Tensor { shape: view.shape().to_vec(), values });
            }
        }
        all
    }

    /// Takes all weights away, and the index.
    pub fn without_weights(&self) {
        self.weights().into_iter().for_each(|file| std::fs::remove_file(file).unwrap());
        let _ = std::fs::remove_file(self.path().join("model.safetensors.index.json"));
    }

    /// Puts tensors into a file.
    pub fn save_into(&self, file: &str, tensors: &Tensors) {
        let bytes = |tensor: &Tensor| tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.save_as(file, Dtype::F32, tensors, bytes);
    }

    pub fn save_as(&self, file: &str, dtype: Dtype, tensors: &Tensors, bytes: impl Fn(&Tensor) -> Vec<u8>) {
        let bytes: Vec<_> = tensors.values().map(bytes).collect();
        let view = |tensor: &Tensor, bytes| TensorView::new(dtype, tensor.shape.clone(), bytes).unwrap();
        let all: BTreeMap<_, _> =
            tensors.iter().zip(&bytes).map(|((name, tensor), bytes)| (name.clone(), view(tensor, bytes))).collect();
        safetensors::serialize_to_file(all, None, &self.path().join(file)).unwrap();
    }

    /// The tensors as `change` leaves them, in one file.
    pub fn change_tensors(&self, change: impl Fn(&mut Tensors)) {
        let mut tensors = self.tensors();
        change(&mut tensors);
        self.without_weights();
        self.save_into("model.safetensors", &tensors);
    }

    /// Sets keys of config.json.
    pub fn configure(&self, keys: &Value) {
        let mut config: Value = serde_json::from_str(&self.read("config.json")).unwrap();
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        self.write("config.json", config.to_string());
    }

    pub fn open(&self) -> Result<Checkpoint> {
        Checkpoint::open(self.path())
    }

    /// What is said of it.
    pub fn notes(&self) -> Vec<String> {
        let checkpoint = self.open().unwrap();
        let unused = checkpoint.unused_tensors();
        let unused = (!unused.is_empty()).then_some(Note::Unused(unused));
        checkpoint.notes.iter().chain(&unused).map(ToString::to_string).collect()
    }

    /// Loads it, with a KV cache of f32.
    pub fn load(&self, context: Option<usize>) -> Model {
        let options = PlanOptions { kv_cache: Some(KvDtype::F32), context, ..PlanOptions::default() };
        load_plan(&Plan::new(&self.open().unwrap(), &roomy(), options).unwrap()).unwrap()
    }

    /// The tokens behind a prompt.
    pub fn greedy(&self, prompt: &[u32], count: usize, context: Option<usize>) -> Vec<u32> {
        greedy(&mut self.load(context), prompt, count)
    }
}

/// The tokens behind a prompt.
pub fn greedy(model: &mut Model, prompt: &[u32], count: usize) -> Vec<u32> {
    let options = GenerateOptions { max_new_tokens: Some(count), ignore_eos: true, ..GenerateOptions::default() };
    model.generate_from(prompt, options).unwrap().filter_map(|piece| piece.unwrap().token).collect()
}
