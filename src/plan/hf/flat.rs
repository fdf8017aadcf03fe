//! A model's tree as a list in which every subtree is a range.

use std::ops::Range;

use super::{Model, Module, Tensor, join};

/// A module, a parameter or a buffer.
pub struct Node {
    /// Its path; the root's is empty.
    pub path: String,
    /// Bytes of all that it holds, tied parameters left out.
    pub bytes: u64,
    /// One behind the last node that it holds.
    pub end: usize,
    /// Whether it is a module and no tensor.
    pub is_module: bool,
    /// Whether it must not be split.
    pub is_whole: bool,
    /// Its own parameters.
    pub parameters: Range<usize>,
    /// Its own buffers.
    pub buffers: Range<usize>,
    /// Its children.
    pub children: Vec<usize>,
}

impl Node {
    /// Whether it may be replaced by its parts.
    pub fn is_splittable(&self) -> bool {
        !self.children.is_empty() && !self.is_whole
    }

    /// What takes its place when it is split. Its own buffers are not among
    /// it: Transformers forgets them.
    pub fn parts(&self) -> impl DoubleEndedIterator<Item = usize> {
        self.parameters.clone().chain(self.children.iter().copied())
    }

    /// Whether `path` holds this node's path as Transformers tests it: as a
    /// piece of text that ends at a dot, wherever it begins.
    pub fn is_named_in(&self, path: &str) -> bool {
        format!("{path}.").contains(&format!("{}.", self.path))
    }
}

/// All nodes, each before what it holds; the root is the first.
pub struct Flat {
    pub nodes: Vec<Node>,
}

impl Flat {
    pub fn new(model: &Model) -> Self {
        let mut flat = Self { nodes: Vec::new() };
        flat.add(model, &model.root, String::new());
        flat
    }

    fn add(&mut self, model: &Model, module: &Module, path: String) -> usize {
        let at = self.nodes.len();
        let paths: Vec<String> = module.children.iter().map(|(name, _)| join(&path, name)).collect();
        let mut tensors = Vec::new();
        for Tensor { name, bytes } in module.parameters.iter().chain(&module.buffers) {
            let path = join(&path, name);
            tensors.push((if model.ties.contains_key(&path) { 0 } else { bytes.0 }, path));
        }
        let parameters = at + 1..at + 1 + module.parameters.len();
        let buffers = parameters.end..parameters.end + module.buffers.len();
        self.nodes.push(Node {
            path,
            bytes: 0,
            end: 0,
            is_module: true,
            is_whole: module.is_whole,
            parameters,
            buffers,
            children: Vec::new(),
        });
        for (bytes, path) in tensors {
            let tensor = self.nodes.len();
            self.nodes.push(Node {
                path,
                bytes,
                end: tensor + 1,
                is_module: false,
                is_whole: false,
                parameters: 0..0,
                buffers: 0..0,
                children: Vec::new(),
            });
        }
        let mut bytes = self.own_bytes(at);
        for ((_, child), path) in module.children.iter().zip(paths) {
            let child = self.add(model, child, path);
            bytes = bytes.saturating_add(self.nodes[child].bytes);
            self.nodes[at].children.push(child);
        }
        (self.nodes[at].bytes, self.nodes[at].end) = (bytes, self.nodes.len());
        at
    }

    /// Bytes of a module's own parameters and buffers.
    fn own_bytes(&self, module: usize) -> u64 {
        let node = &self.nodes[module];
        let tensors = &self.nodes[node.parameters.start..node.buffers.end];
        tensors.iter().fold(0, |sum, tensor| sum.saturating_add(tensor.bytes))
    }

    /// Bytes of the whole model.
    pub fn total(&self) -> u64 {
        self.nodes[0].bytes
    }

    /// Bytes of the largest module that must not be split, or of the largest
    /// that modules other than the root hold themselves, whichever are more.
    pub fn largest_unit(&self) -> u64 {
        let whole = self.nodes.iter().filter(|node| node.is_whole).map(|node| node.bytes);
        let leaves = (1..self.nodes.len()).filter(|at| self.nodes[*at].is_module);
        whole.chain(leaves.map(|at| self.own_bytes(at))).max().unwrap_or(0)
    }

    /// The node of a path.
    pub fn find(&self, path: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.path == path)
    }
}
