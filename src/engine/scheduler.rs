//! Which tokens of which sequences the next step runs.
//!
//! Sequences are taken up in the order in which they came. Those that are on their way go on with a token each, and
//! what is left of a step goes to prompts. Where pages run out, the youngest gives its own back and begins again once
//! there is room: so the oldest always comes to its end.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::pages::Pages;
use super::sequence::Sequence;
use crate::footprint::{Extent, PAGE};
use crate::model_config::ModelConfig;

/// What part of a step prompts may take beside sequences that go on, so that these do not wait long.
const BESIDE: usize = 4;

/// The sequences that there are.
pub struct Scheduler {
    config: Arc<ModelConfig>,
    pub(super) pages: Pages,
    free_slots: Vec<usize>,
    /// Those that are computed, the oldest first.
    pub(super) running: Vec<Sequence>,
    /// Those that have no place yet, the oldest first.
    pub(super) waiting: VecDeque<Sequence>,
    ids: u64,
    pub(super) preemptions: u64,
}

/// Tokens of a sequence that a step runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// The sequence's place among those that run.
    pub at: usize,
    /// Its tokens.
    pub tokens: Range<usize>,
    /// What [`Run::length`](crate::backend::Run) is.
    pub length: usize,
}

impl Scheduler {
    /// For the sequences of a plan.
    pub fn new(config: Arc<ModelConfig>, extent: Extent) -> Self {
        // What a ring held of a beginning is gone, and what was rotated for another length is of no use.
        let has_rings = config.layers.iter().any(|layer| layer.window.is_some_and(|window| window < extent.context));
        let is_keeping = !has_rings && config.ropes.iter().all(|rope| rope.shortest_alike(extent.context) == 0);
        Self {
            pages: Pages::new(extent.pages, is_keeping),
            free_slots: (0..extent.sequences).rev().collect(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            ids: 0,
            preemptions: 0,
            config,
        }
    }

    /// Takes a sequence, and gives it its number.
    pub fn add(&mut self, sequence: Sequence) -> u64 {
        self.ids += 1;
        self.waiting.push_back(Sequence { id: self.ids, ..sequence });
        self.ids
    }

    /// Forgets a sequence; what it had is there for others.
    pub fn remove(&mut self, id: u64) {
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            let mut sequence = self.running.remove(at);
            self.release(&mut sequence);
        }
        self.waiting.retain(|sequence| sequence.id != id);
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.waiting.clear();
        for mut sequence in std::mem::take(&mut self.running) {
            self.release(&mut sequence);
        }
    }

    fn release(&mut self, sequence: &mut Sequence) {
        self.free_slots.push(sequence.slot);
        self.pages.release(&mut sequence.held);
        (sequence.position, sequence.is_begun) = (0, false);
    }

    /// Gives back what the youngest has, which waits again as the first.
    fn preempt_youngest(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        self.release(&mut sequence);
        self.preemptions += 1;
        self.waiting.push_front(sequence);
    }

    /// The tokens of the next step, at most `most` of them, of each sequence that can go on.
    pub fn schedule(&mut self, most: usize) -> Vec<Scheduled> {
        let mut scheduled = Vec::new();
        let mut left = most;
        for is_prompt in [false, true] {
            if is_prompt && left < most {
                left = left.min(most.div_ceil(BESIDE));
            }
            let mut at = 0;
            while at < self.running.len() && left > 0 {
                if self.is_at_prompt(at) == is_prompt {
                    let next = self.next_of(at, left);
                    // The place of the sequence itself is lost where it is the youngest.
                    while at < self.running.len() && !self.grow(at, next.tokens.end) {
                        self.preempt_youngest();
                    }
                    if at < self.running.len() {
                        left -= next.tokens.len();
                        scheduled.push(next);
                    }
                }
                at += 1;
            }
        }
        // Whom it was taken from has nothing to run.
        let there = self.running.len();
        scheduled.retain(|next: &Scheduled| next.at < there);
        while left > 0 && self.admit() {
            let next = self.next_of(self.running.len() - 1, left);
            left -= next.tokens.len();
            scheduled.push(next);
        }
        scheduled
    }

    /// Gives each running sequence room for the token behind the one that is being chosen for it, if all of them
    /// will want that and it is computed as any other.
    pub fn grow_ahead(&mut self, context: usize) -> bool {
        let Self { config, running, pages, .. } = self;
        let goes_on = |sequence: &Sequence| {
            let next = sequence.tokens.len();
            let is_wanted = sequence.position == next && next < context && next + 1 < sequence.most;
            is_wanted && !sequence.is_for_host() && !restarts(config, sequence, next + 1)
        };
        running.iter().all(goes_on)
            && running.iter_mut().all(|sequence| pages.grow(&mut sequence.held, sequence.position + 1))
    }

    fn grow(&mut self, at: usize, tokens: usize) -> bool {
        self.pages.grow(&mut self.running[at].held, tokens)
    }

    /// Whether more than one token of a sequence is to be run.
    fn is_at_prompt(&mut self, at: usize) -> bool {
        let sequence = &mut self.running[at];
        let length = sequence.tokens.len();
        if restarts(&self.config, sequence, length) {
            (sequence.position, sequence.prompt) = (0, length);
        }
        length - sequence.position > 1
    }

    /// What can be run at once of a sequence, of `left` tokens at most: tokens that are rotated alike.
    fn next_of(&self, at: usize, left: usize) -> Scheduled {
        let sequence = &self.running[at];
        let first = sequence.position;
        let length = sequence.length_at(first);
        let end = sequence.tokens.len().min(first + left);
        let alike = |position: &usize| {
            let other = sequence.length_at(*position);
            self.config.ropes.iter().all(|rope| rope.shortest_alike(other) == rope.shortest_alike(length))
        };
        let end = (first..end).find(|position| !alike(position)).unwrap_or(end);
        Scheduled { at, tokens: first..end, length }
    }

    /// Gives the sequence that waits for the longest a place, and pages for all of its tokens, if there are such.
    fn admit(&mut self) -> bool {
        let Some(sequence) = self.waiting.front() else { return false };
        let Some(slot) = self.free_slots.last().copied() else { return false };
        let mut held = self.pages.find(&sequence.tokens);
        let (kept, all) = (held.pages.len(), Extent::pages_of(sequence.tokens.len()));
        // Those who are on their way will need another page each.
        let is_room = all - kept + self.running.len() <= self.pages.available();
        if !is_room || !self.pages.grow(&mut held, sequence.tokens.len()) {
            self.pages.release(&mut held);
            return false;
        }
        self.free_slots.pop();
        if let Some(mut sequence) = self.waiting.pop_front() {
            sequence.slot = slot;
            sequence.position = kept * PAGE;
            sequence.kept = sequence.position;
            sequence.held = held;
            self.running.push(sequence);
        }
        true
    }
}

/// Whether a sequence begins again before its next token: what was computed of it is for shorter ones.
fn restarts(config: &ModelConfig, sequence: &Sequence, length: usize) -> bool {
    let Some(border) = config.restart_beyond() else { return false };
    sequence.position > 0 && sequence.length_at(sequence.position - 1) <= border && length > border
}
