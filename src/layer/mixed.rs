//! One batch under several adapters: which rows belong together, and how a layer runs them.

use super::adapted::Adaptable;
use super::mode::{Factors, Pass, Pin};
use crate::error::{Error, Result};
use candle_core::Tensor;
use std::sync::Arc;

/// The adapter of each index of axis 0.
#[derive(Debug)]
pub(crate) struct Rows {
    pins: Vec<Arc<Pin>>,
    /// Places in `pins`; none is the base.
    of: Vec<Option<usize>>,
}

/// Rows under the same factors; none is the base.
#[derive(Debug)]
pub struct Group<'a> {
    pub(crate) rows: Vec<u32>,
    pub(crate) factors: Option<&'a Factors>,
}

impl Rows {
    /// `of` are places in `pins`.
    pub(crate) fn new(pins: Vec<Arc<Pin>>, of: Vec<Option<usize>>) -> Self {
        Self { pins, of }
    }

    /// The rows of `x` by what they run under in the layer `id`.
    pub(super) fn groups(&self, layer: &str, id: u64, x: &Tensor) -> Result<Vec<Group<'_>>> {
        let refuse = |found: String, expected: &str| {
            Err(Error::Rows {
                layer: layer.to_string(),
                found,
                expected: expected.to_string(),
            })
        };
        let rows = x.dims().first().copied().unwrap_or(0);
        if rows != self.of.len() {
            let expected = format!("{}, as the scope names adapters for", self.of.len());
            return refuse(format!("{rows} rows on axis 0"), &expected);
        }
        if x.track_op() {
            return refuse(
                "a graph".into(),
                "an input without one: mixed rows are for inference",
            );
        }
        let mut groups: Vec<(Option<usize>, Group)> = Vec::new();
        for (row, of) in self.of.iter().enumerate() {
            // An adapter without this layer is the base here.
            let factors = of.and_then(|of| Some((of, self.pins[of].layers.get(&id)?)));
            let key = factors.map(|(of, _)| of);
            match groups.iter_mut().find(|(known, _)| *known == key) {
                Some((_, group)) => group.rows.push(row as u32),
                None => {
                    let factors = factors.map(|(_, factors)| factors);
                    let rows = vec![row as u32];
                    groups.push((key, Group { rows, factors }));
                }
            }
        }
        Ok(groups.into_iter().map(|(_, group)| group).collect())
    }
}

/// Runs a layer; what all rows have in common takes the usual way.
pub(super) fn run<F: Adaptable>(
    base: &F,
    path: &str,
    x: &Tensor,
    groups: &[Group],
) -> candle_core::Result<Tensor> {
    match groups {
        [] => base.run(path, x),
        [Group { factors, .. }] => match factors {
            Some(factors) => base.adapted(path, x, Pass::held(factors)),
            None => base.run(path, x),
        },
        _ => base.mixed(path, x, groups),
    }
}

/// `f` of the rows of each group, put back in their order.
pub(super) fn each(
    x: &Tensor,
    groups: &[Group],
    mut f: impl FnMut(&Tensor, Option<&Factors>) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    let mut parts = Vec::with_capacity(groups.len());
    for group in groups {
        parts.push(f(&picked(x, &group.rows)?, group.factors)?);
    }
    let joined = Tensor::cat(&parts, 0)?;
    let mut place = vec![0; x.dims().first().copied().unwrap_or(0)];
    let order = groups.iter().flat_map(|group| &group.rows);
    for (at, row) in (0u32..).zip(order) {
        place[*row as usize] = at;
    }
    picked(&joined, &place)
}

/// Some rows of `x`, without a copy where they are neighbours.
fn picked(x: &Tensor, rows: &[u32]) -> candle_core::Result<Tensor> {
    let first = rows.first().copied().unwrap_or(0);
    let neighbours = rows.iter().zip(first..).all(|(row, next)| *row == next);
    match neighbours {
        true => x.narrow(0, first as usize, rows.len()),
        false => x.index_select(&Tensor::new(rows, x.device())?, 0),
    }
}
