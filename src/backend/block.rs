//! A model's parts as backends compute them: typed, and found once. `P` is a matrix or a vector where the
//! backend has it.

use std::ops::Range;

use crate::architecture::{Part, Role};
use crate::error::{Error, Result};
use crate::model_config::{Experts, Layer, ModelConfig};
use crate::quant::MatrixLayout;

/// A weight and its bias, or some of their rows.
#[derive(Clone, Debug)]
pub struct Linear<P> {
    /// The matrix; of a norm, the vector.
    pub weight: P,
    /// A vector.
    pub bias: Option<P>,
    /// The rows that are meant.
    pub rows: Range<usize>,
}

impl<P: AsRef<MatrixLayout>> Linear<P> {
    /// All rows of `weight`; `bias` is a plain vector.
    pub fn new(weight: P, bias: Option<P>) -> Self {
        let rows = 0..weight.as_ref().rows;
        Self { weight, bias, rows }
    }

    /// Some rows, counted from the first that is meant now.
    ///
    /// # Panics
    /// There are not as many.
    #[must_use]
    pub fn slice(&self, rows: Range<usize>) -> Self
    where
        P: Clone,
    {
        assert!(rows.end <= self.rows.len(), "rows that the matrix has not");
        let rows = self.rows.start + rows.start..self.rows.start + rows.end;
        Self { rows, ..self.clone() }
    }

    /// Length of a row; of a vector, its length.
    pub fn cols(&self) -> usize {
        self.weight.as_ref().cols
    }
}

/// A decoder layer.
#[derive(Clone, Debug)]
pub struct Block<P> {
    /// What is special to it.
    pub layer: Layer,
    /// Before attention.
    pub input_norm: Option<Linear<P>>,
    /// What mixes tokens.
    pub attention: Attention<P>,
    /// Of what attention gives.
    pub attention_output_norm: Option<Linear<P>>,
    /// Before the feed-forward layer.
    pub feed_forward_norm: Option<Linear<P>>,
    /// What mixes a token's own elements.
    pub feed_forward: FeedForward<P>,
    /// Of what the feed-forward layer gives.
    pub feed_forward_output_norm: Option<Linear<P>>,
}

/// Attention's projections and norms.
#[derive(Clone, Debug)]
pub struct Attention<P> {
    /// Queries, keys and values, which may be rows of one matrix.
    pub query_key_value: [Linear<P>; 3],
    /// Of queries, as wide as a head or as all of them.
    pub query_norm: Option<Linear<P>>,
    /// Of keys.
    pub key_norm: Option<Linear<P>>,
    /// Back to the hidden state.
    pub output: Linear<P>,
}

/// A feed-forward layer.
#[derive(Clone, Debug)]
pub enum FeedForward<P> {
    /// All tokens go through the same.
    Dense(Dense<P>),
    /// Each token goes through some of many.
    Experts {
        /// How many there are, and which a token goes through.
        routing: Experts,
        /// Their scores.
        router: Linear<P>,
        /// The experts.
        experts: Vec<Dense<P>>,
    },
}

/// `down(activation(gate(x)) · up(x))`, or without a gate `down(activation(up(x)))`.
#[derive(Clone, Debug)]
pub struct Dense<P> {
    /// The matrix whose product goes through the activation.
    pub gate: Option<Linear<P>>,
    /// The matrix whose product is gated, or goes through the activation itself.
    pub up: Linear<P>,
    /// Back to the hidden state.
    pub down: Linear<P>,
}

/// The modules of a run on one device, some of which it has.
#[derive(Clone, Debug)]
pub struct Modules<P> {
    /// The embedding.
    pub embedding: Option<Linear<P>>,
    /// Learned positions.
    pub positions: Option<Linear<P>>,
    /// Decoder layers in the order they run.
    pub blocks: Vec<Block<P>>,
    /// The norm behind the last block.
    pub norm: Option<Linear<P>>,
    /// The output head.
    pub head: Option<Linear<P>>,
}

/// Finds the parameters of a module by what they are for.
pub struct Finder<F>(pub F);

impl<P: AsRef<MatrixLayout> + Clone, F: FnMut(Role, Part) -> Option<P>> Finder<F> {
    /// The weight and the bias of a role, if there are such.
    pub fn find(&mut self, role: Role) -> Option<Linear<P>> {
        let weight = (self.0)(role, Part::Weight)?;
        Some(Linear::new(weight, (self.0)(role, Part::Bias)))
    }

    /// As [`Finder::find`] of one that every model has.
    fn need(&mut self, role: Role) -> Result<Linear<P>> {
        self.find(role).ok_or_else(|| Error::input(format!("a block has no weights as its {role:?}")))
    }

    /// The block at `index` of a model.
    ///
    /// # Errors
    /// It lacks what every block has.
    pub fn block(&mut self, config: &ModelConfig, index: usize) -> Result<Block<P>> {
        let layer = config.layers[index];
        Ok(Block {
            layer,
            input_norm: self.find(Role::InputNorm),
            attention: self.attention(config)?,
            attention_output_norm: self.find(Role::AttentionOutputNorm),
            feed_forward_norm: self.find(Role::FeedForwardNorm),
            feed_forward: match config.experts.filter(|_| layer.has_experts) {
                Some(routing) => FeedForward::Experts {
                    routing,
                    router: self.need(Role::Router)?,
                    experts: (0..routing.count).map(|at| self.expert(at)).collect::<Result<_>>()?,
                },
                None => FeedForward::Dense(self.dense(config)?),
            },
            feed_forward_output_norm: self.find(Role::FeedForwardOutputNorm),
        })
    }

    fn attention(&mut self, config: &ModelConfig) -> Result<Attention<P>> {
        let (queries, keys) = (config.queries(), config.keys());
        let query_key_value = match self.find(Role::QueryKeyValue) {
            Some(fused) => {
                [0..queries, queries..queries + keys, queries + keys..queries + 2 * keys].map(|rows| fused.slice(rows))
            }
            None => [self.need(Role::Query)?, self.need(Role::Key)?, self.need(Role::Value)?],
        };
        Ok(Attention {
            query_key_value,
            query_norm: self.find(Role::QueryNorm),
            key_norm: self.find(Role::KeyNorm),
            output: self.need(Role::Output)?,
        })
    }

    fn dense(&mut self, config: &ModelConfig) -> Result<Dense<P>> {
        let width = config.intermediate_size;
        let (gate, up) = match self.find(Role::GateUp) {
            Some(fused) => (Some(fused.slice(0..width)), fused.slice(width..2 * width)),
            None => (self.find(Role::Gate), self.need(Role::Up)?),
        };
        Ok(Dense { gate, up, down: self.need(Role::Down)? })
    }

    fn expert(&mut self, at: usize) -> Result<Dense<P>> {
        Ok(Dense {
            gate: Some(self.need(Role::ExpertGate(at))?),
            up: self.need(Role::ExpertUp(at))?,
            down: self.need(Role::ExpertDown(at))?,
        })
    }
}
