//! One choice for each of many items, so that they cost the least within a size.

/// What an item takes and costs under one choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// What it takes.
    pub size: u64,
    /// What it costs; finite.
    pub cost: f64,
}

/// Steps that the room for more than the smallest choices is divided into.
const STEPS: u64 = 8192;

/// The best choices within every size up to a capacity, in [`Frontier::steps`] steps.
pub struct Frontier {
    /// For each item its choices as steps above the smallest one, a table from the steps that the
    /// items so far may take to the choice of this one.
    items: Vec<(Vec<usize>, Vec<u8>)>,
    steps: usize,
}

impl Frontier {
    /// Finds them by dynamic programming. Sizes are counted in steps, rounded up: never above the
    /// capacity, and exact where what is above the smallest choices is at most [`STEPS`].
    /// `None` where the smallest choices are above the capacity. Every item has at most 256 choices.
    pub fn new(items: &[Vec<Choice>], capacity: u64) -> Option<Self> {
        let least = |item: &[Choice]| item.iter().map(|choice| choice.size).min().unwrap_or(0);
        let mut room = capacity;
        for item in items {
            room = room.checked_sub(least(item))?;
        }
        let step = room.div_ceil(STEPS).max(1);
        let in_steps = |size: u64| usize::try_from(size.div_ceil(step)).unwrap_or(usize::MAX);
        let steps = usize::try_from(room / step).unwrap_or(0);
        let mut costs = vec![0.0; steps + 1];
        let tables = items.iter().map(|item| {
            let taken: Vec<usize> = item.iter().map(|choice| in_steps(choice.size - least(item))).collect();
            let (mut cheapest, mut table) = (vec![f64::INFINITY; steps + 1], vec![0; steps + 1]);
            for ((at, choice), taken) in (0..=u8::MAX).zip(item).zip(&taken) {
                let ends = cheapest.iter_mut().zip(&mut table).skip(*taken);
                for (before, (cheapest, chosen)) in costs.iter().zip(ends) {
                    let cost = before + choice.cost;
                    if cost < *cheapest {
                        (*cheapest, *chosen) = (cost, at);
                    }
                }
            }
            costs = cheapest;
            (taken, table)
        });
        Some(Self { items: tables.collect(), steps })
    }

    /// The number of steps that the capacity has.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The choice of every item of those that cost the least within `steps`.
    pub fn choices(&self, steps: usize) -> Vec<usize> {
        let mut left = steps.min(self.steps);
        let mut choices: Vec<usize> = self
            .items
            .iter()
            .rev()
            .map(|(taken, table)| {
                let choice = usize::from(table[left]);
                left -= taken[choice];
                choice
            })
            .collect();
        choices.reverse();
        choices
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn total(items: &[Vec<Choice>], choices: &[usize]) -> (u64, f64) {
        let chosen = items.iter().zip(choices).map(|(item, choice)| item[*choice]);
        chosen.fold((0, 0.0), |(size, cost), choice| (size + choice.size, cost + choice.cost))
    }

    /// The least cost within `capacity` over all combinations.
    fn brute_force(items: &[Vec<Choice>], capacity: u64) -> Option<f64> {
        let Some((first, rest)) = items.split_first() else { return Some(0.0) };
        let fitting = first.iter().filter(|choice| choice.size <= capacity);
        fitting
            .filter_map(|choice| Some(choice.cost + brute_force(rest, capacity - choice.size)?))
            .min_by(f64::total_cmp)
    }

    fn items(largest: u64) -> impl Strategy<Value = Vec<Vec<Choice>>> {
        let choice = (1..=largest, 0.0..1.0).prop_map(|(size, cost)| Choice { size, cost });
        prop::collection::vec(prop::collection::vec(choice, 1..4), 0..7)
    }

    proptest! {
        #[test]
        fn small_cases_are_exact(items in items(20), capacity in 0u64..120) {
            match (Frontier::new(&items, capacity), brute_force(&items, capacity)) {
                (Some(frontier), Some(wanted)) => {
                    let (size, cost) = total(&items, &frontier.choices(frontier.steps()));
                    prop_assert!(size <= capacity && (cost - wanted).abs() < 1e-9, "{size} {cost} {wanted}");
                }
                (None, None) => {}
                (found, wanted) => prop_assert!(false, "{} {wanted:?}", found.is_some()),
            }
        }

        #[test]
        fn large_cases_are_within_every_size_and_near(items in items(1 << 40), part in 0u64..1000) {
            let all: u64 = items.iter().flatten().map(|choice| choice.size).sum();
            let capacity = all / 1000 * part;
            let Some(frontier) = Frontier::new(&items, capacity) else { return Ok(()) };
            let (size, cost) = total(&items, &frontier.choices(frontier.steps()));
            prop_assert!(size <= capacity);
            // Rounding up loses less than a step an item.
            let lost = (items.len() as u64 + 1) * (capacity / STEPS + 1);
            if let Some(wanted) = capacity.checked_sub(lost).and_then(|less| brute_force(&items, less)) {
                prop_assert!(cost <= wanted + 1e-9, "{cost} {wanted}");
            }
            let costs: Vec<f64> = (0..=frontier.steps()).step_by(97).map(|at| total(&items, &frontier.choices(at)).1).collect();
            prop_assert!(costs.is_sorted_by(|a, b| a >= b || (a - b).abs() < 1e-9));
        }
    }
}
