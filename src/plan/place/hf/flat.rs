//! A model's tree as a list in which every subtree is a range.

use super::{Model, Module, Tensor, join};

/// A module, a parameter or a buffer.
pub struct Node {
    /// Its path; the root's is empty.
    pub path: String,
    /// Bytes of all that it holds, tied parameters left out.
    pub bytes: u64,
    /// One behind the last node that it holds.
    pub end: usize,
    /// What it is.
    pub kind: Kind,
}

/// What a node is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Buffer,
    Module,
    Parameter,
    /// A module that must not be split.
    Whole,
}

impl Node {
    /// Whether it is a module and no tensor.
    pub fn is_module(&self) -> bool {
        matches!(self.kind, Kind::Module | Kind::Whole)
    }

    /// Whether `path` holds this node's path as Transformers tests it: as a
    /// piece of text that ends at a dot, wherever it begins.
    pub fn is_named_in(&self, path: &str) -> bool {
        format!("{path}.").contains(&format!("{}.", self.path))
    }
}

/// All nodes, each before what it holds: parameters, buffers, modules. The root is the first.
pub struct Flat {
    pub nodes: Vec<Node>,
}

impl Flat {
    pub fn new(model: &Model) -> Self {
        let mut flat = Self { nodes: Vec::new() };
        flat.add(model, &model.root, "");
        flat
    }

    fn add(&mut self, model: &Model, module: &Module, path: &str) {
        let at = self.nodes.len();
        let kind = if module.is_whole { Kind::Whole } else { Kind::Module };
        self.nodes.push(Node { path: path.to_owned(), bytes: 0, end: at, kind });
        let parameters = module.parameters.iter().map(|tensor| (tensor, Kind::Parameter));
        for (Tensor { name, bytes }, kind) in parameters.chain(module.buffers.iter().map(|t| (t, Kind::Buffer))) {
            let path = join(path, name);
            let bytes = if model.ties.contains_key(&path) { 0 } else { bytes.0 };
            self.nodes.push(Node { path, bytes, end: self.nodes.len() + 1, kind });
        }
        for (name, child) in &module.children {
            self.add(model, child, &join(path, name));
        }
        self.nodes[at].end = self.nodes.len();
        self.nodes[at].bytes = self.bytes(self.children(at));
    }

    /// What a node holds itself.
    pub fn children(&self, node: usize) -> impl Iterator<Item = usize> {
        let end = self.nodes[node].end;
        let is_inside = move |at: &usize| *at < end;
        std::iter::successors(Some(node + 1).filter(is_inside), move |at| Some(self.nodes[*at].end).filter(is_inside))
    }

    /// The modules that a node holds itself.
    pub fn modules(&self, node: usize) -> impl Iterator<Item = usize> {
        self.children(node).filter(|child| self.nodes[*child].is_module())
    }

    /// What takes a node's place when it is split. Its own buffers are not among
    /// it: Transformers forgets them.
    pub fn parts(&self, node: usize) -> impl Iterator<Item = usize> {
        self.children(node).filter(|child| self.nodes[*child].kind != Kind::Buffer)
    }

    /// Whether a node may be replaced by its parts.
    pub fn is_splittable(&self, node: usize) -> bool {
        self.nodes[node].kind == Kind::Module && self.modules(node).next().is_some()
    }

    fn bytes(&self, nodes: impl Iterator<Item = usize>) -> u64 {
        nodes.fold(0, |sum, node| sum.saturating_add(self.nodes[node].bytes))
    }

    /// Bytes of the whole model.
    pub fn total(&self) -> u64 {
        self.nodes[0].bytes
    }

    /// Bytes of the largest module that must not be split, or of the largest
    /// that modules other than the root hold themselves, whichever are more.
    pub fn largest_unit(&self) -> u64 {
        let whole = self.nodes.iter().filter(|node| node.kind == Kind::Whole).map(|node| node.bytes);
        let own_tensors = |module| self.children(module).filter(|child| !self.nodes[*child].is_module());
        let modules = (1..self.nodes.len()).filter(|at| self.nodes[*at].is_module());
        whole.chain(modules.map(|module| self.bytes(own_tensors(module)))).max().unwrap_or(0)
    }
}
