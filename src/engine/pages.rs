//! Who has which pages of the room for keys and values, and which beginnings are kept in them.

use std::collections::{BTreeMap, HashMap};

use crate::footprint::{Extent, PAGE};

/// The pages that sequences share. A page that is full may be kept under the tokens in it and all before them: a
/// sequence that begins alike has it too, and so has one to come, until the page is needed.
pub struct Pages {
    free: Vec<u32>,
    all: Vec<Page>,
    /// Kept pages by what is in them.
    kept: HashMap<Beginning, u32>,
    /// Kept pages that no sequence has, by when the last one gave them back.
    idle: BTreeMap<u64, u32>,
    clock: u64,
    is_keeping: bool,
}

#[derive(Clone, Default)]
struct Page {
    holders: usize,
    /// Where it is kept, and the number that it has there, which no other page ever had.
    kept: Option<(Beginning, u64)>,
    /// Its place among those that are idle.
    idle_since: u64,
}

/// The tokens of a page, and the number of the page before it; 0 where there is none.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Beginning {
    before: u64,
    tokens: Box<[u32]>,
}

/// The pages of a sequence.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// One for each [`PAGE`] tokens.
    pub pages: Vec<u32>,
    /// How many of them are kept, or are like pages that are.
    kept: usize,
    /// The number of the last of those.
    number: u64,
}

impl Pages {
    /// So many, which keep beginnings if that is wanted.
    pub fn new(count: usize, is_keeping: bool) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "a plan holds no more than 2^32 pages")]
        let free = (0..count as u32).rev().collect();
        Self {
            free,
            all: vec![Page::default(); count],
            kept: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            is_keeping,
        }
    }

    /// All that there are.
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// Those that a sequence can get.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Those that are kept though no sequence has them.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// The pages of the longest beginning of `tokens` that is kept, but not of all of them: what comes behind the last
    /// is yet to be computed.
    pub fn find(&mut self, tokens: &[u32]) -> Held {
        let mut held = Held::default();
        for tokens in tokens[..tokens.len().saturating_sub(1)].chunks_exact(PAGE) {
            let beginning = Beginning { before: held.number, tokens: tokens.into() };
            let Some(&page) = self.kept.get(&beginning) else { break };
            let entry = &mut self.all[page as usize];
            let Some((_, number)) = entry.kept else { break };
            if entry.holders == 0 {
                self.idle.remove(&entry.idle_since);
            }
            entry.holders += 1;
            held.pages.push(page);
            (held.kept, held.number) = (held.pages.len(), number);
        }
        held
    }

    /// Gives a sequence pages for so many tokens in all. Whether there were enough; if not, it has got none.
    pub fn grow(&mut self, held: &mut Held, tokens: usize) -> bool {
        let missing = Extent::pages_of(tokens).saturating_sub(held.pages.len());
        if missing > self.available() {
            return false;
        }
        for _ in 0..missing {
            let Some(page) = self.free.pop().or_else(|| self.give_up()) else { return false };
            self.all[page as usize].holders = 1;
            held.pages.push(page);
        }
        true
    }

    /// The page that has been idle for the longest, which is kept no more.
    fn give_up(&mut self) -> Option<u32> {
        let (_, page) = self.idle.pop_first()?;
        if let Some((beginning, _)) = self.all[page as usize].kept.take() {
            self.kept.remove(&beginning);
        }
        Some(page)
    }

    /// Keeps the pages that are full of the first so many of a sequence's `tokens`, all of them computed.
    pub fn keep(&mut self, held: &mut Held, tokens: &[u32]) {
        if !self.is_keeping {
            return;
        }
        for tokens in tokens.chunks_exact(PAGE).skip(held.kept) {
            let page = held.pages[held.kept];
            let beginning = Beginning { before: held.number, tokens: tokens.into() };
            let known = self.kept.get(&beginning).and_then(|page| self.all[*page as usize].kept.as_ref());
            held.number = if let Some((_, number)) = known {
                *number
            } else {
                self.clock += 1;
                self.kept.insert(beginning.clone(), page);
                self.all[page as usize].kept = Some((beginning, self.clock));
                self.clock
            };
            held.kept += 1;
        }
    }

    /// Takes the pages of a sequence back.
    pub fn release(&mut self, held: &mut Held) {
        let Held { pages, .. } = std::mem::take(held);
        // The last ones are given up first: what is behind them would be of no use.
        for page in pages.into_iter().rev() {
            let entry = &mut self.all[page as usize];
            entry.holders -= 1;
            if entry.holders > 0 {
                continue;
            }
            if entry.kept.is_some() {
                self.clock += 1;
                entry.idle_since = self.clock;
                self.idle.insert(self.clock, page);
            } else {
                self.free.push(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(count: usize, seed: u32) -> Vec<u32> {
        (0..count as u32).map(|at| at * 7 + seed).collect()
    }

    /// Runs a sequence: its pages, all of whose tokens are computed.
    fn run(pages: &mut Pages, tokens: &[u32]) -> Held {
        let mut held = pages.find(tokens);
        assert!(pages.grow(&mut held, tokens.len()));
        pages.keep(&mut held, tokens);
        held
    }

    #[test]
    fn a_common_beginning_is_had_once() {
        let mut pages = Pages::new(8, true);
        let (a, b) = (tokens(3 * PAGE + 5, 0), [tokens(2 * PAGE, 0), tokens(PAGE + 9, 1)].concat());
        let (mut of_a, mut of_b) = (run(&mut pages, &a), run(&mut pages, &b));
        assert_eq!((of_a.pages.len(), of_b.pages.len()), (4, 4));
        assert_eq!(of_a.pages[..2], of_b.pages[..2]);
        assert!(of_a.pages[2..].iter().all(|page| !of_b.pages.contains(page)));
        assert_eq!(pages.available(), 2);
        pages.release(&mut of_a);
        assert_eq!((pages.available(), pages.idle()), (4, 1));
        pages.release(&mut of_b);
        assert_eq!((pages.available(), pages.idle()), (8, 4));
        // It is found again, until the room is needed.
        assert_eq!(pages.find(&a).pages.len(), 3);
    }

    #[test]
    fn the_last_token_is_always_computed() {
        let mut pages = Pages::new(4, true);
        let all = tokens(2 * PAGE, 0);
        let mut held = run(&mut pages, &all);
        pages.release(&mut held);
        assert_eq!(pages.find(&all).pages.len(), 1);
    }

    #[test]
    fn what_is_kept_makes_room() {
        let mut pages = Pages::new(4, true);
        let a = tokens(3 * PAGE + 1, 0);
        let mut held = run(&mut pages, &a);
        pages.release(&mut held);
        assert_eq!((pages.available(), pages.idle()), (4, 3));
        let mut other = run(&mut pages, &tokens(2 * PAGE, 5));
        // The last page of the beginning has gone first.
        assert_eq!(pages.find(&a).pages.len(), 2);
        assert!(!pages.grow(&mut other, 4 * PAGE), "two of them are had again");
        assert_eq!(other.pages.len(), 2);
    }

    #[test]
    fn a_page_is_not_found_behind_another_beginning() {
        let mut pages = Pages::new(8, true);
        let (a, b) = ([tokens(PAGE, 0), tokens(PAGE, 9)].concat(), [tokens(PAGE, 1), tokens(PAGE + 1, 9)].concat());
        let mut held = run(&mut pages, &a);
        pages.release(&mut held);
        assert!(pages.find(&b).pages.is_empty());
    }

    #[test]
    fn nothing_is_kept_where_that_is_not_wanted() {
        let mut pages = Pages::new(4, false);
        let mut held = run(&mut pages, &tokens(2 * PAGE + 1, 0));
        pages.release(&mut held);
        assert_eq!((pages.available(), pages.idle()), (4, 0));
        assert!(pages.find(&tokens(2 * PAGE + 1, 0)).pages.is_empty());
    }

    proptest! {
        #[test]
        fn no_page_is_lost_or_had_by_two_that_differ(
            steps in prop::collection::vec((0usize..6, 0u32..3, 1usize..5 * PAGE), 1..60),
        ) {
            let mut pages = Pages::new(9, true);
            let mut sequences: Vec<(Held, Vec<u32>)> = Vec::new();
            for (what, seed, count) in steps {
                if what < 4 {
                    // Beginnings are shared, ends are not.
                    let mut all = tokens(count, 0);
                    let own = count / 2;
                    all[own..].iter_mut().for_each(|token| *token += seed);
                    let mut held = pages.find(&all);
                    if pages.grow(&mut held, all.len()) {
                        pages.keep(&mut held, &all);
                        sequences.push((held, all));
                    } else {
                        pages.release(&mut held);
                    }
                } else if !sequences.is_empty() {
                    let (mut held, _) = sequences.swap_remove(seed as usize % sequences.len());
                    pages.release(&mut held);
                }
                let mut had: HashMap<u32, &[u32]> = HashMap::new();
                for (held, all) in &sequences {
                    prop_assert_eq!(held.pages.len(), Extent::pages_of(all.len()));
                    for (at, page) in held.pages.iter().enumerate() {
                        let before = &all[..all.len().min((at + 1) * PAGE)];
                        prop_assert_eq!(*had.entry(*page).or_insert(before), before);
                    }
                }
                prop_assert_eq!(pages.available() + had.len(), pages.count());
            }
            for (mut held, _) in sequences {
                pages.release(&mut held);
            }
            prop_assert_eq!(pages.available(), pages.count());
        }
    }
}
