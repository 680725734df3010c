//! [`Tree`]: sums whose brackets depend on the number of items alone.

/// A sum over items `0..count` in order, whose tree halves ranges from the top; of an odd range the first
/// half is the longer. Halves of a power-of-two number of ranks are subtrees, so each makes its own. Holds
/// `log2(count) + 1` items at most.
pub(super) struct Tree<T> {
    count: usize,
    next: usize,
    sums: Vec<T>,
}

impl<T> Tree<T> {
    pub(super) fn new(count: usize) -> Self {
        Self {
            count,
            next: 0,
            sums: Vec::new(),
        }
    }

    /// Adds the next item; `add` puts the right one to the left one.
    pub(super) fn push<E>(
        &mut self,
        mut item: T,
        mut add: impl FnMut(T, T) -> Result<T, E>,
    ) -> Result<(), E> {
        for _ in 0..closed_by(self.next, self.count) {
            if let Some(left) = self.sums.pop() {
                item = add(left, item)?;
            }
        }
        self.sums.push(item);
        self.next += 1;
        Ok(())
    }

    /// The sum, when every item was added; none of no items.
    pub(super) fn sum(mut self) -> Option<T> {
        self.sums.pop()
    }
}

/// How many sums item `index` of `count` completes: the right turns at the end of the way down to it.
fn closed_by(index: usize, count: usize) -> usize {
    let (mut start, mut length, mut turns) = (0, count, 0);
    while length > 1 {
        let left = length.div_ceil(2);
        match index < start + left {
            true => (length, turns) = (left, 0),
            false => (start, length, turns) = (start + left, length - left, turns + 1),
        }
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::Tree;
    use std::convert::Infallible;

    fn brackets(items: std::ops::Range<usize>) -> String {
        let mut tree = Tree::new(items.len());
        for item in items {
            let add = |a, b| Ok::<_, Infallible>(format!("({a} {b})"));
            tree.push(item.to_string(), add).unwrap();
        }
        tree.sum().unwrap_or_default()
    }

    #[test]
    fn ranges_are_halved_from_the_top() {
        assert_eq!(brackets(0..0), "");
        assert_eq!(brackets(0..1), "0");
        assert_eq!(brackets(0..3), "((0 1) 2)");
        assert_eq!(brackets(0..4), "((0 1) (2 3))");
        assert_eq!(brackets(0..6), "(((0 1) 2) ((3 4) 5))");
        assert_eq!(brackets(0..7), "(((0 1) (2 3)) ((4 5) 6))");
    }

    #[test]
    fn every_power_of_two_that_divides_the_items_makes_subtrees() {
        for count in 1..=64usize {
            for ranks in [1, 2, 4, 8, 16, 32, 64] {
                if count % ranks != 0 {
                    continue;
                }
                let part = count / ranks;
                let mut over_ranks = Tree::new(ranks);
                for rank in 0..ranks {
                    let add = |a, b| Ok::<_, Infallible>(format!("({a} {b})"));
                    let part = brackets(rank * part..(rank + 1) * part);
                    over_ranks.push(part, add).unwrap();
                }
                let sum = over_ranks.sum().unwrap();
                assert_eq!(sum, brackets(0..count), "{count} over {ranks}");
            }
        }
    }
}
