//! What a model consists of: modules in the order they run, their parameters,
//! shapes and names, made from a [`ModelConfig`] alone. No tensors.

use std::collections::HashSet;

use crate::checkpoint::{Checkpoint, Tensor};
use crate::error::{Error, Result, first_five, printable};
use crate::model_config::ModelConfig;
use crate::quant::WeightDtype;

/// What a parameter is to its module; a backend asks for parameters by this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Role {
    /// `mlp.down_proj`.
    Down,
    /// The embedding's rows.
    Embedding,
    /// `mlp.gate_proj`.
    Gate,
    /// The output head's rows.
    Head,
    /// The norm before attention.
    InputNorm,
    /// The norm behind the last block.
    OutputNorm,
    /// The norm before the feed-forward layer.
    PostAttentionNorm,
    /// `self_attn.k_proj`.
    Key,
    /// `self_attn.o_proj`.
    Output,
    /// `self_attn.q_proj`.
    Query,
    /// `mlp.up_proj`.
    Up,
    /// `self_attn.v_proj`.
    Value,
}

/// One tensor of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its part in the module.
    pub role: Role,
    /// The path of the module that holds it, for example `model.layers.3.mlp.up_proj`.
    pub module: String,
    /// Rows: output features, or 1 for a vector.
    pub rows: usize,
    /// Columns: input features, or the length of a vector.
    pub cols: usize,
}

/// What a module is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// A decoder layer, by its index.
    Block(usize),
    /// The embedding.
    Embedding,
    /// The output head; without parameters where it is the embedding.
    Head,
    /// The norm behind the last block.
    Norm,
}

/// A part of the model that is placed whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its path, for example `model.layers.3`.
    pub path: String,
    /// What it is.
    pub kind: ModuleKind,
    /// Its tensors.
    pub parameters: Vec<Parameter>,
}

impl Module {
    /// Whether it is a decoder layer.
    pub fn is_block(&self) -> bool {
        matches!(self.kind, ModuleKind::Block(_))
    }
}

/// A model as its modules, in the order they run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleTree {
    /// Embedding, blocks, norm, head.
    pub modules: Vec<Module>,
    /// Whether the head is the embedding.
    pub tied: bool,
}

/// Modules that Hugging Face's maps name and that hold no weights.
pub const WEIGHTLESS: &[&str] = &["model.rotary_emb"];

/// The path under which the blocks stand.
pub const BLOCKS: &str = "model.layers";

impl ModuleTree {
    /// The modules of the model that `config` describes.
    pub fn new(config: &ModelConfig) -> Self {
        let hidden = config.hidden_size;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let feed_forward = config.intermediate_size;
        let block_parameters = [
            (Role::InputNorm, "input_layernorm", 1, hidden),
            (Role::Query, "self_attn.q_proj", queries, hidden),
            (Role::Key, "self_attn.k_proj", keys, hidden),
            (Role::Value, "self_attn.v_proj", keys, hidden),
            (Role::Output, "self_attn.o_proj", hidden, queries),
            (Role::PostAttentionNorm, "post_attention_layernorm", 1, hidden),
            (Role::Gate, "mlp.gate_proj", feed_forward, hidden),
            (Role::Up, "mlp.up_proj", feed_forward, hidden),
            (Role::Down, "mlp.down_proj", hidden, feed_forward),
        ];
        let single = |path: &str, kind, role, rows| Module {
            path: path.to_owned(),
            kind,
            parameters: vec![Parameter { role, module: path.to_owned(), rows, cols: hidden }],
        };
        let mut modules = vec![single("model.embed_tokens", ModuleKind::Embedding, Role::Embedding, config.vocab_size)];
        modules.extend((0..config.num_hidden_layers).map(|index| {
            let path = format!("{BLOCKS}.{index}");
            let parameters = block_parameters
                .iter()
                .map(|(role, name, rows, cols)| Parameter {
                    role: *role,
                    module: format!("{path}.{name}"),
                    rows: *rows,
                    cols: *cols,
                })
                .collect();
            Module { path, kind: ModuleKind::Block(index), parameters }
        }));
        modules.push(single("model.norm", ModuleKind::Norm, Role::OutputNorm, 1));
        let mut head = single("lm_head", ModuleKind::Head, Role::Head, config.vocab_size);
        if config.tie_word_embeddings {
            head.parameters.clear();
        }
        modules.push(head);
        Self { modules, tied: config.tie_word_embeddings }
    }

    /// All parameters, each with its module's position in [`ModuleTree::modules`].
    pub fn parameters(&self) -> impl Iterator<Item = (usize, &Parameter)> {
        self.modules.iter().enumerate().flat_map(|(at, module)| module.parameters.iter().map(move |p| (at, p)))
    }

    /// Whether `path` names a module, a part of one, a group of them, or one that holds no weights.
    pub fn names(&self, path: &str) -> bool {
        use crate::module_path::contains;
        WEIGHTLESS.iter().any(|weightless| contains(weightless, path))
            || self.modules.iter().any(|module| contains(path, &module.path))
            || self.parameters().any(|(_, parameter)| contains(path, &parameter.module))
    }

    /// Holds the catalog of `checkpoint` against the tree and pairs every
    /// parameter with its tensor, in the order of [`ModuleTree::parameters`].
    ///
    /// # Errors
    /// Tensors are missing, of another shape, of a dtype that weights do not
    /// have, or there that the model has no place for.
    pub fn resolve<'a>(&'a self, checkpoint: &'a Checkpoint) -> Result<Vec<Weight<'a>>> {
        let (mut weights, mut missing, mut mismatched) = (Vec::new(), Vec::new(), Vec::new());
        let mut used = HashSet::new();
        for (module, parameter) in self.parameters() {
            let name = parameter.tensor();
            let Some(tensor) = checkpoint.catalog.get(&name) else {
                missing.push(name);
                continue;
            };
            if tensor.shape != parameter.shape() {
                let shape = printable(&format!("{:?}", tensor.shape));
                mismatched.push(format!("{name} has shape {shape}, not {:?}", parameter.shape()));
            } else if let Some(dtype) = WeightDtype::of(tensor.dtype) {
                weights.push(Weight { module, parameter, tensor, dtype });
            } else {
                mismatched.push(format!("{name} has dtype {:?}, not BF16, F16 or F32", tensor.dtype));
            }
            used.insert(name);
        }
        if !missing.is_empty() {
            return Err(Error::input(format!(
                "`{}` lacks {} that its config.json calls for: {}",
                checkpoint.name,
                tensors(missing.len()),
                first_five(&missing)
            )));
        }
        if !mismatched.is_empty() {
            return Err(Error::input(format!(
                "`{}` contradicts its config.json in {}: {}",
                checkpoint.name,
                tensors(mismatched.len()),
                first_five(&mismatched)
            )));
        }
        let placeless: Vec<_> =
            checkpoint.catalog.keys().filter(|name| !used.contains(*name) && !self.is_redundant(name)).collect();
        if !placeless.is_empty() {
            return Err(Error::input(format!(
                "`{}` holds {} that the model has no place for, so its config.json is not the whole truth: {}",
                checkpoint.name,
                tensors(placeless.len()),
                first_five(placeless.into_iter().map(|name| printable(name)))
            )));
        }
        Ok(weights)
    }

    /// Whether a tensor may stand in a checkpoint though nothing reads it: the
    /// frequencies that old files carry, or a tied head's copy of the embedding.
    fn is_redundant(&self, tensor: &str) -> bool {
        tensor.ends_with(".rotary_emb.inv_freq") || (self.tied && tensor == "lm_head.weight")
    }
}

fn tensors(count: usize) -> String {
    if count == 1 { "1 tensor".to_owned() } else { format!("{count} tensors") }
}

/// A parameter and the tensor that it is read from.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// Position of its module in [`ModuleTree::modules`].
    pub module: usize,
    /// The parameter.
    pub parameter: &'a Parameter,
    /// Where its data is.
    pub tensor: &'a Tensor,
    /// The dtype of its data.
    pub dtype: WeightDtype,
}

impl Parameter {
    /// The tensor's name in the checkpoint.
    pub fn tensor(&self) -> String {
        format!("{}.weight", self.module)
    }

    /// Whether a scheme may pack it: matrices are quantized, norms are kept.
    pub fn is_quantizable(&self) -> bool {
        !matches!(self.role, Role::InputNorm | Role::PostAttentionNorm | Role::OutputNorm)
    }

    fn shape(&self) -> Vec<u64> {
        if self.is_quantizable() { vec![self.rows as u64, self.cols as u64] } else { vec![self.cols as u64] }
    }
}
