//! One item of each of many classes, so that they cost the least within a size.

/// What an item takes and costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item {
    /// What it takes.
    pub size: u64,
    /// What it costs; finite.
    pub cost: f64,
}

/// Steps that the room for more than the smallest items is divided into.
const STEPS: u64 = 8192;

/// The best choices within every size up to a capacity, in [`Frontier::steps`] steps.
pub struct Frontier {
    /// For each class its items as steps above the smallest one, a table from the steps that the
    /// classes so far may take to the item of this one.
    classes: Vec<(Vec<usize>, Vec<u8>)>,
    /// The number of steps that the capacity has.
    pub steps: usize,
}

impl Frontier {
    /// Finds them by dynamic programming. Sizes are counted in steps, rounded up: never above the
    /// capacity, and exact where what is above the smallest items is at most [`STEPS`].
    /// `None` where the smallest items are above the capacity. Every class has at most 256 items.
    pub fn new(classes: &[Vec<Item>], capacity: u64) -> Option<Self> {
        let least = |class: &[Item]| class.iter().map(|item| item.size).min().unwrap_or(0);
        let mut room = capacity;
        for class in classes {
            room = room.checked_sub(least(class))?;
        }
        let step = room.div_ceil(STEPS).max(1);
        let in_steps = |size: u64| usize::try_from(size.div_ceil(step)).unwrap_or(usize::MAX);
        let steps = usize::try_from(room / step).unwrap_or(0);
        let mut costs = vec![0.0; steps + 1];
        let tables = classes.iter().map(|class| {
            let taken: Vec<usize> = class.iter().map(|item| in_steps(item.size - least(class))).collect();
            let (mut cheapest, mut table) = (vec![f64::INFINITY; steps + 1], vec![0; steps + 1]);
            for ((at, item), taken) in (0..=u8::MAX).zip(class).zip(&taken) {
                let ends = cheapest.iter_mut().zip(&mut table).skip(*taken);
                for (before, (cheapest, chosen)) in costs.iter().zip(ends) {
                    let cost = before + item.cost;
                    if cost < *cheapest {
                        (*cheapest, *chosen) = (cost, at);
                    }
                }
            }
            costs = cheapest;
            (taken, table)
        });
        Some(Self { classes: tables.collect(), steps })
    }

    /// The position of the item of every class, of those that cost the least within `steps`.
    pub fn choices(&self, steps: usize) -> Vec<usize> {
        let mut left = steps.min(self.steps);
        let mut choices = vec![0; self.classes.len()];
        for (choice, (taken, table)) in choices.iter_mut().zip(&self.classes).rev() {
            *choice = usize::from(table[left]);
            left -= taken[*choice];
        }
        choices
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn total(classes: &[Vec<Item>], choices: &[usize]) -> (u64, f64) {
        let chosen = classes.iter().zip(choices).map(|(class, choice)| class[*choice]);
        chosen.fold((0, 0.0), |(size, cost), item| (size + item.size, cost + item.cost))
    }

    /// The least cost within `capacity` over all combinations.
    fn brute_force(classes: &[Vec<Item>], capacity: u64) -> Option<f64> {
        let Some((first, rest)) = classes.split_first() else { return Some(0.0) };
        let fitting = first.iter().filter(|item| item.size <= capacity);
        fitting.filter_map(|item| Some(item.cost + brute_force(rest, capacity - item.size)?)).min_by(f64::total_cmp)
    }

    fn classes(largest: u64) -> impl Strategy<Value = Vec<Vec<Item>>> {
        let item = (1..=largest, 0.0..1.0).prop_map(|(size, cost)| Item { size, cost });
        prop::collection::vec(prop::collection::vec(item, 1..4), 0..7)
    }

    proptest! {
        #[test]
        fn small_cases_are_exact(classes in classes(20), capacity in 0u64..120) {
            match (Frontier::new(&classes, capacity), brute_force(&classes, capacity)) {
                (Some(frontier), Some(wanted)) => {
                    let (size, cost) = total(&classes, &frontier.choices(frontier.steps));
                    prop_assert!(size <= capacity && (cost - wanted).abs() < 1e-9, "{size} {cost} {wanted}");
                }
                (None, None) => {}
                (found, wanted) => prop_assert!(false, "{} {wanted:?}", found.is_some()),
            }
        }

        #[test]
        fn large_cases_are_within_every_size_and_near(classes in classes(1 << 40), part in 0u64..1000) {
            let all: u64 = classes.iter().flatten().map(|item| item.size).sum();
            let capacity = all / 1000 * part;
            let Some(frontier) = Frontier::new(&classes, capacity) else { return Ok(()) };
            let (size, cost) = total(&classes, &frontier.choices(frontier.steps));
            prop_assert!(size <= capacity);
            // Rounding up loses less than a step a class.
            let lost = (classes.len() as u64 + 1) * (capacity / STEPS + 1);
            if let Some(wanted) = capacity.checked_sub(lost).and_then(|less| brute_force(&classes, less)) {
                prop_assert!(cost <= wanted + 1e-9, "{cost} {wanted}");
            }
            let costs: Vec<f64> = (0..=frontier.steps).step_by(97).map(|at| total(&classes, &frontier.choices(at)).1).collect();
            prop_assert!(costs.is_sorted_by(|a, b| a >= b || (a - b).abs() < 1e-9));
        }
    }
}
