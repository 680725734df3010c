//! [`Target`]: a layer of an adapter, and the part of a tensor that is its weight.

use super::names::{NameTable, NamedRows};
use super::part::Part;
use crate::adapter::{Stored, StoredLayer, keys, translated};
use crate::error::Result;
use candle_core::Tensor;
use std::collections::{BTreeSet, HashMap};

/// A layer of an adapter, and the part of a tensor that is its weight.
pub(super) struct Target<'a> {
    pub(super) module: &'a str,
    pub(super) layer: &'a StoredLayer,
    /// The path of the tensor; with a table the name of the layer there.
    pub(super) path: String,
    /// With a table: by which rule it was found, and the rows of the tensor.
    named: Option<(u8, NamedRows)>,
}

impl Target<'_> {
    /// The weight of the layer.
    pub(super) fn take(&self, tensor: &Tensor) -> Result<Tensor> {
        let Some((_, named)) = &self.named else {
            return Ok(tensor.clone());
        };
        let tensor = turned(tensor, named)?;
        let rows: Result<Vec<Tensor>> = named
            .rows
            .iter()
            .map(|r| cut(&tensor, r.start, r.end))
            .collect();
        Ok(Tensor::cat(&rows?, 0)?)
    }

    /// The tensor with another weight of the layer in it. All other rows stay as they are, bit for bit.
    pub(super) fn put(&self, tensor: &Tensor, weight: Tensor) -> Result<Tensor> {
        let Some((_, named)) = &self.named else {
            return Ok(weight);
        };
        let tensor = turned(tensor, named)?;
        let mut places = Vec::new();
        let mut at = 0;
        for range in &named.rows {
            places.push((range.clone(), cut(&weight, at, at + range.len())?));
            at += range.len();
        }
        places.sort_by_key(|(range, _)| range.start);
        let (mut rows, mut at) = (Vec::new(), 0);
        for (range, of_layer) in places {
            if at < range.start {
                rows.push(cut(&tensor, at, range.start)?);
            }
            rows.push(of_layer);
            at = range.end;
        }
        if at < tensor.dim(0)? {
            rows.push(cut(&tensor, at, tensor.dim(0)?)?);
        }
        turned(&Tensor::cat(&rows, 0)?, named)
    }
}

fn cut(tensor: &Tensor, from: usize, to: usize) -> Result<Tensor> {
    Ok(tensor.narrow(0, from, to - from)?.contiguous()?)
}

fn turned(tensor: &Tensor, named: &NamedRows) -> Result<Tensor> {
    Ok(match named.transposed {
        true => tensor.t()?.contiguous()?,
        false => tensor.clone(),
    })
}

/// The modules of an adapter by what their names can mean.
#[derive(Clone, Debug)]
pub(super) struct Index(HashMap<String, BTreeSet<String>>);

impl Index {
    pub(super) fn new(stored: &Stored) -> Self {
        let mut modules: HashMap<String, BTreeSet<String>> = HashMap::new();
        for module in stored.layers.keys() {
            for key in keys(module) {
                modules.entry(key).or_default().insert(module.clone());
            }
        }
        Self(modules)
    }

    /// The module that means a layer of a table, and by which rule; of two the better one.
    fn find(&self, stored: &Stored, named: &NamedRows) -> Result<Option<(u8, &str)>> {
        let names = std::iter::once(&named.module).chain(&named.aliases);
        for (behind, name) in names.enumerate() {
            let modules = keys(name).into_iter().filter_map(|key| self.0.get(&key));
            let modules: BTreeSet<&String> = modules.flatten().collect();
            let ranked = modules
                .into_iter()
                .filter_map(|m| Some((translated(m, name)?, m.as_str())));
            let mut ranked: Vec<(u8, &str)> = ranked.collect();
            ranked.sort();
            match ranked.as_slice() {
                [(first, a), (second, b), ..] if first == second => {
                    return stored.ambiguous([a, b], name, "choose a component, or rename");
                }
                // Behind all rules for the names before it.
                [(rule, module), ..] => return Ok(Some((rule + 5 * behind as u8, module))),
                [] => {}
            }
        }
        Ok(None)
    }
}

impl Part {
    /// The layers of the adapter in a tensor: the one whose path it has, else those that the table names
    /// in it.
    pub(super) fn targets(
        &self,
        tensor: &str,
        shape: &[usize],
        table: Option<&NameTable>,
    ) -> Result<Vec<Target<'_>>> {
        if let Some(path) = tensor.strip_suffix(".weight")
            && let Some((module, layer)) = self.asked.find(&self.stored, path)?
        {
            return Ok(vec![Target {
                module,
                layer,
                path: path.to_string(),
                named: None,
            }]);
        }
        let mut targets = Vec::new();
        let parts = table.map(|table| table.parts(tensor, shape)).transpose()?;
        for named in parts.flatten().into_iter().flatten() {
            let Some((rule, module)) = self.index.find(&self.stored, &named)? else {
                continue;
            };
            let free = self
                .asked
                .is_free(&self.stored, module, rule, &named.module)?;
            if let (true, Some((module, layer))) = (free, self.stored.layers.get_key_value(module))
            {
                targets.push(Target {
                    module,
                    layer,
                    path: named.module.clone(),
                    named: Some((rule, named)),
                });
            }
        }
        Ok(targets)
    }

    /// Notes that a layer has found its weight.
    pub(super) fn enter(&self, target: &Target) -> Result<()> {
        match &target.named {
            None => self.asked.insert(&self.stored, &target.path)?,
            Some((rule, _)) => self.asked.enter(target.module, *rule, &target.path),
        }
        Ok(())
    }
}
