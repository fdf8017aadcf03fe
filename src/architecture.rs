//! What a model consists of: modules in the order they run, their parameters,
//! shapes and names, made from a [`ModelConfig`] alone. No tensors.

use std::collections::HashSet;

use safetensors::Dtype;

use crate::checkpoint::{Checkpoint, Tensor};
use crate::error::{Error, Result, first_five, printable};
use crate::model_config::{HEAD, HEAD_WEIGHT, ModelConfig, NormKind};
use crate::module_path::{and_above, contains};
use crate::quant::{MatrixLayout, QuantizeRules, Storage, WeightDtype};

pub use crate::model_config::Role;

/// Whether a parameter is multiplied with or added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Added.
    Bias,
    /// Multiplied with.
    Weight,
}

/// One tensor of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// What its module is for.
    pub role: Role,
    /// Its part in the module.
    pub part: Part,
    /// The path of the module that holds it, for example `model.layers.3.mlp.up_proj`.
    pub module: String,
    /// Rows: output features, or 1 for a vector.
    pub rows: usize,
    /// Columns: input features, or the length of a vector.
    pub cols: usize,
    /// Whether the checkpoint stores it as `[cols, rows]`.
    pub is_transposed: bool,
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
    /// Learned positions, which are added to the embedding.
    Positions,
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
    /// Embedding, learned positions if there are any, blocks, norm, head.
    pub modules: Vec<Module>,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// The module that holds all but the head, for example `model`.
    pub base: &'static str,
    /// The path under which the blocks stand, for example `model.layers`.
    pub blocks: String,
    /// Modules that Hugging Face's maps name and that hold no weights.
    pub weightless: Vec<String>,
    unread: &'static [&'static str],
}

/// The paths of a model's modules, of their parts and of groups of them.
pub struct Paths<'a> {
    /// Of what holds weights.
    weights: HashSet<&'a str>,
    modules: HashSet<&'a str>,
    weightless: &'a [String],
}

impl Paths<'_> {
    /// Whether `path` names a module, a part of one, a group of them, or one that holds no weights.
    pub fn have(&self, path: &str) -> bool {
        self.hold_weights(path)
            || self.modules.contains(path)
            || self.weightless.iter().any(|weightless| contains(weightless, path))
    }

    /// Whether there are weights under `path`.
    pub fn hold_weights(&self, path: &str) -> bool {
        self.weights.contains(path)
    }
}

impl ModuleTree {
    /// The modules of the model that `config` describes.
    pub fn new(config: &ModelConfig) -> Self {
        let family = config.family;
        let in_base = |name: &str| format!("{}.{name}", family.base);
        let module = |path: String, kind, role| Module { parameters: parameters(config, role, &path), path, kind };
        let blocks = in_base(family.blocks);
        let mut modules = vec![module(in_base(family.embedding), ModuleKind::Embedding, Role::Embedding)];
        modules.extend(family.positions.map(|name| module(in_base(name), ModuleKind::Positions, Role::Positions)));
        modules.extend((0..config.num_hidden_layers).map(|index| block(config, &blocks, index)));
        modules.push(module(in_base(family.norm), ModuleKind::Norm, Role::OutputNorm));
        let mut head = module(HEAD.to_owned(), ModuleKind::Head, Role::Head);
        if config.tie_word_embeddings {
            head.parameters.clear();
        }
        modules.push(head);
        Self {
            modules,
            tied: config.tie_word_embeddings,
            base: family.base,
            blocks,
            weightless: family.weightless.iter().map(|name| in_base(name)).collect(),
            unread: family.unread,
        }
    }

    /// The path of the embedding.
    pub fn embedding(&self) -> &str {
        &self.modules[0].path
    }

    /// All parameters, each with its module's position in [`ModuleTree::modules`].
    pub fn parameters(&self) -> impl Iterator<Item = (usize, &Parameter)> {
        self.modules.iter().enumerate().flat_map(|(at, module)| module.parameters.iter().map(move |p| (at, p)))
    }

    /// All paths that name something of the model.
    pub fn paths(&self) -> Paths<'_> {
        let add = |paths: &mut HashSet<_>, path| {
            // Where one is known, so are all above it.
            and_above(path).take_while(|path| paths.insert(*path)).for_each(drop);
        };
        let (mut weights, mut modules) = (HashSet::new(), HashSet::new());
        self.parameters().for_each(|(_, parameter)| add(&mut weights, parameter.module.as_str()));
        self.modules.iter().for_each(|module| add(&mut modules, module.path.as_str()));
        Paths { weights, modules, weightless: &self.weightless }
    }

    /// Holds the catalog of `checkpoint` against the tree and pairs every
    /// parameter with its tensor, in the order of [`ModuleTree::parameters`].
    ///
    /// # Errors
    /// Tensors are missing, of another shape or size, or of a dtype that weights do not have.
    pub fn resolve(&self, checkpoint: &Checkpoint) -> Result<Vec<Weight>> {
        let (mut weights, mut missing, mut mismatched) = (Vec::new(), Vec::new(), Vec::new());
        let rules = QuantizeRules::of_checkpoint(&checkpoint.config)?;
        for (module, parameter) in self.parameters() {
            let wanted = parameter.tensor();
            let Some((name, tensor)) = self.find(checkpoint, parameter) else {
                missing.push(wanted);
                continue;
            };
            let rules = rules.as_ref().filter(|_| parameter.is_quantizable());
            let packed = rules.and_then(|rules| Storage::packed(rules.scheme(&parameter.module)));
            // What is too large to be there has no shape.
            let (shape, data) = match packed {
                Some(storage) => (
                    MatrixLayout::new(storage, parameter.rows, parameter.cols).map(|layout| vec![layout.size().0]),
                    (tensor.dtype == Dtype::U8).then_some(storage),
                ),
                None => (Some(parameter.shape()), WeightDtype::of(tensor.dtype).map(Storage::Plain)),
            };
            if shape.as_ref() != Some(&tensor.shape) {
                let found = printable(&format!("{:?}", tensor.shape));
                mismatched.push(format!("{name} has shape {found}, not {:?}", shape.unwrap_or_default()));
            } else if let Some(data) = data {
                weights.push(Weight { module, parameter: parameter.clone(), tensor: tensor.clone(), data });
            } else {
                let dtypes = if packed.is_some() { "U8" } else { "BF16, F16, F32 or F64" };
                mismatched.push(format!("{name} has dtype {:?}, not {dtypes}", tensor.dtype));
            }
        }
        if !missing.is_empty() {
            let error = refusal(checkpoint, "lacks", &missing, " that its config.json calls for");
            let others = checkpoint.unused_tensors();
            return Err(if others.is_empty() { error } else { error.hint(in_their_place(checkpoint, &others)) });
        }
        if mismatched.is_empty() {
            Ok(weights)
        } else {
            Err(refusal(checkpoint, "contradicts its config.json in", &mismatched, ""))
        }
    }

    /// The tensor that a parameter is read from, and its name.
    fn find<'a>(&self, checkpoint: &'a Checkpoint, parameter: &Parameter) -> Option<(&'a String, &'a Tensor)> {
        let (wanted, find) = (parameter.tensor(), |name: &str| checkpoint.catalog.get_key_value(name));
        // Files that were saved from the base model leave its name out.
        let bare = || wanted.strip_prefix(self.base)?.strip_prefix('.');
        // Of a pair that is one tensor either name may have been kept.
        let tied = || find(HEAD_WEIGHT).filter(|_| self.tied && parameter.role == Role::Embedding);
        find(&wanted).or_else(|| find(bare()?)).or_else(tied)
    }
}

impl Checkpoint {
    /// The names of tensors that the model has no place for, such as heads for other tasks; nothing reads them.
    pub fn unused_tensors(&self) -> Vec<String> {
        let tree = ModuleTree::new(&self.config);
        let used: HashSet<_> = tree.parameters().filter_map(|(_, p)| Some(tree.find(self, p)?.0)).collect();
        // What old files carry beside the weights, and a tied head's copy of the embedding, do not count.
        let is_usual =
            |tensor: &str| tree.unread.iter().any(|end| tensor.ends_with(end)) || (tree.tied && tensor == HEAD_WEIGHT);
        self.catalog.keys().filter(|name| !used.contains(name) && !is_usual(name)).cloned().collect()
    }
}

fn refusal(checkpoint: &Checkpoint, before: &str, found: &[String], behind: &str) -> Error {
    let count = if found.len() == 1 { "1 tensor".to_owned() } else { format!("{} tensors", found.len()) };
    Error::input(format!("`{}` {before} {count}{behind}: {}", checkpoint.name, first_five(found)))
}

/// What a checkpoint has that lacks the model's own tensors.
fn in_their_place(checkpoint: &Checkpoint, others: &[String]) -> String {
    let shared = |a: &str, b: &str| a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    let (Some((first, _)), Some((last, _))) =
        (checkpoint.catalog.first_key_value(), checkpoint.catalog.last_key_value())
    else {
        return String::new();
    };
    // Names are sorted, so what the first and the last begin with all do.
    match first.as_bytes()[..shared(first, last)].iter().rposition(|byte| *byte == b'.') {
        Some(end) if others.len() == checkpoint.catalog.len() => {
            format!("the names of all its tensors begin with `{}`", printable(&first[..=end]))
        }
        _ => format!("it holds others: {}", first_five(others.iter().map(|name| printable(name)))),
    }
}

/// The block at `index` of those under `blocks`.
fn block(config: &ModelConfig, blocks: &str, index: usize) -> Module {
    let path = format!("{blocks}.{index}");
    let has_experts = config.layers[index].has_experts;
    let experts = config.experts.map_or(0, |experts| experts.count);
    let mut all = Vec::new();
    for (role, name) in config.family.block() {
        let mut push = |role, name: &str| all.extend(parameters(config, role, &format!("{path}.{name}")));
        let expert: fn(usize) -> Role = match role {
            Role::ExpertGate(_) => Role::ExpertGate,
            Role::ExpertUp(_) => Role::ExpertUp,
            Role::ExpertDown(_) => Role::ExpertDown,
            Role::Router if !has_experts => continue,
            Role::Gate | Role::Up | Role::Down if has_experts => continue,
            _ => {
                push(role, name);
                continue;
            }
        };
        if has_experts {
            (0..experts).for_each(|at| push(expert(at), &name.replace("{}", &at.to_string())));
        }
    }
    Module { path, kind: ModuleKind::Block(index), parameters: all }
}

/// The parameters of the module at `path`, whose part in the model is `role`.
fn parameters(config: &ModelConfig, role: Role, path: &str) -> Vec<Parameter> {
    let (rows, cols) = shape(config, role);
    let is_norm = role.is_norm();
    let has_bias = match role {
        Role::Query | Role::Key | Role::Value | Role::QueryKeyValue => config.query_key_value_bias,
        Role::Output => config.output_bias,
        Role::Gate | Role::Up | Role::GateUp | Role::Down => config.feed_forward_bias,
        _ => is_norm && config.family.norm_kind == NormKind::Layer,
    };
    let is_transposed =
        config.family.is_transposed && matches!(role, Role::QueryKeyValue | Role::Output | Role::Up | Role::Down);
    let parameter = |part, rows, cols, is_transposed| {
        let module = path.to_owned();
        Parameter { role, part, module, rows, cols, is_transposed }
    };
    let bias = has_bias.then(|| parameter(Part::Bias, 1, if is_norm { cols } else { rows }, false));
    bias.into_iter().chain([parameter(Part::Weight, rows, cols, is_transposed)]).collect()
}

/// Rows and columns of the weight of a role.
fn shape(config: &ModelConfig, role: Role) -> (usize, usize) {
    let hidden = config.hidden_size;
    let (queries, keys) = (config.queries(), config.keys());
    let feed_forward = config.intermediate_size;
    let expert = config.experts.map_or(0, |experts| experts.intermediate_size);
    let is_whole = config.family.norms_whole_projections;
    match role {
        Role::Embedding | Role::Head => (config.vocab_size, hidden),
        Role::Positions => (config.max_position_embeddings, hidden),
        Role::Query => (queries, hidden),
        Role::Key | Role::Value => (keys, hidden),
        Role::QueryKeyValue => (queries + 2 * keys, hidden),
        Role::Output => (hidden, queries),
        Role::Gate | Role::Up => (feed_forward, hidden),
        Role::GateUp => (2 * feed_forward, hidden),
        Role::Down => (hidden, feed_forward),
        Role::Router => (config.experts.map_or(0, |experts| experts.count), hidden),
        Role::ExpertGate(_) | Role::ExpertUp(_) => (expert, hidden),
        Role::ExpertDown(_) => (hidden, expert),
        Role::QueryNorm => (1, if is_whole { queries } else { config.head_dim }),
        Role::KeyNorm => (1, if is_whole { keys } else { config.head_dim }),
        Role::InputNorm
        | Role::AttentionOutputNorm
        | Role::FeedForwardNorm
        | Role::FeedForwardOutputNorm
        | Role::OutputNorm => (1, hidden),
    }
}

/// A parameter and the tensor that it is read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Position of its module in [`ModuleTree::modules`].
    pub module: usize,
    /// The parameter.
    pub parameter: Parameter,
    /// Where its data is.
    pub tensor: Tensor,
    /// How its data is stored there: elements of a dtype, or packed already.
    pub data: Storage,
}

impl Weight {
    /// The dtype of its elements; `None` where it is packed already.
    pub fn dtype(&self) -> Option<WeightDtype> {
        match self.data {
            Storage::Plain(dtype) => Some(dtype),
            Storage::Int8 | Storage::Int4 | Storage::Nl4 => None,
        }
    }

    /// Bytes of a row of its data; see [`Storage::stored_row`].
    pub fn row_bytes(&self) -> usize {
        self.data.stored_row(self.parameter.cols)
    }

    /// Whether its shard has it in f64, which becomes f32 as it is read.
    pub fn is_narrowed(&self) -> bool {
        self.tensor.dtype == Dtype::F64
    }

    /// Bytes of a row in its shard.
    pub fn shard_row_bytes(&self) -> usize {
        self.row_bytes() * if self.is_narrowed() { 2 } else { 1 }
    }

    /// Number of rows of its data.
    pub fn data_rows(&self) -> usize {
        match self.data {
            Storage::Plain(_) => self.parameter.rows,
            // The size was held against a layout's, which is a number of whole rows in memory.
            _ => usize::try_from(self.tensor.size().0).unwrap_or(usize::MAX) / self.row_bytes(),
        }
    }

    /// Whether its rows are columns of what the checkpoint stores.
    pub fn is_transposed(&self) -> bool {
        self.parameter.is_transposed && self.dtype().is_some()
    }
}

impl Parameter {
    /// The tensor's name in the checkpoint.
    pub fn tensor(&self) -> String {
        let part = if self.part == Part::Bias { "bias" } else { "weight" };
        format!("{}.{part}", self.module)
    }

    /// Whether a scheme may pack it: matrices are quantized; norms, biases,
    /// learned positions and the experts' scores are kept.
    pub fn is_quantizable(&self) -> bool {
        !self.is_vector() && !matches!(self.role, Role::Positions | Role::Router)
    }

    /// Its shape in the checkpoint.
    pub fn shape(&self) -> Vec<u64> {
        let (rows, cols) = (self.rows as u64, self.cols as u64);
        match (self.is_vector(), self.is_transposed) {
            (true, _) => vec![cols],
            (false, true) => vec![cols, rows],
            (false, false) => vec![rows, cols],
        }
    }

    /// Whether it is a bias or of a norm.
    pub fn is_vector(&self) -> bool {
        self.part == Part::Bias || self.role.is_norm()
    }
}
