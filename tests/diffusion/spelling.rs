//! How the original writes what diffusers has: one [`Tensor`](candle_core::Tensor) after the other, from
//! the side of the model.

use super::support::tensors::seeded;
use candle_core::{DType, Result, Tensor};
use std::collections::{BTreeMap, HashMap};

pub type Tensors = HashMap<String, Tensor>;

/// What is done to the layers of diffusers, one below the other, to get the tensor of the original.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Plain,
    /// The second half comes first.
    Swapped,
    /// `(in, out)`.
    Turned,
}

/// One tensor of the original, and the layers of diffusers in it: path and shape.
#[derive(Clone, Debug)]
pub struct Spelling {
    pub tensor: String,
    pub layers: Vec<(String, Vec<usize>)>,
    pub how: How,
}

pub fn plain(tensor: impl Into<String>, layer: impl Into<String>, shape: &[usize]) -> Spelling {
    stacked(tensor, &[(layer.into(), shape[0])], &shape[1..])
}

/// Layers with their rows, of one width.
pub fn stacked<S: ToString>(
    tensor: impl Into<String>,
    layers: &[(S, usize)],
    width: &[usize],
) -> Spelling {
    let layer = |(name, rows): &(S, usize)| (name.to_string(), [&[*rows], width].concat());
    Spelling {
        tensor: tensor.into(),
        layers: layers.iter().map(layer).collect(),
        how: How::Plain,
    }
}

impl Spelling {
    pub fn with(mut self, how: How) -> Self {
        self.how = how;
        self
    }

    /// The same with something before both names.
    pub fn behind(mut self, of_original: &str, of_diffusers: &str) -> Self {
        self.tensor = format!("{of_original}{}", self.tensor);
        for (layer, _) in &mut self.layers {
            *layer = format!("{of_diffusers}{layer}");
        }
        self
    }

    pub fn shape(&self) -> Vec<usize> {
        let mut shape = self.layers[0].1.clone();
        shape[0] = self.layers.iter().map(|(_, shape)| shape[0]).sum();
        if self.how == How::Turned {
            shape.reverse();
        }
        shape
    }

    fn convert(&self, parts: Vec<Tensor>) -> Result<Tensor> {
        let whole = Tensor::cat(&parts, 0)?;
        match self.how {
            How::Plain => Ok(whole),
            How::Turned => whole.t()?.contiguous(),
            How::Swapped => {
                let halves = whole.chunk(2, 0)?;
                Tensor::cat(&[&halves[1], &halves[0]], 0)
            }
        }
    }
}

/// A base under the names of diffusers: weights with rows of about unit norm, and a bias for each.
pub fn diffusers(model: &[Spelling]) -> Result<Tensors> {
    let mut tensors = Tensors::new();
    let layers = model.iter().flat_map(|spelling| &spelling.layers);
    for (seed, (path, shape)) in layers.enumerate() {
        let width: usize = shape[1..].iter().product();
        let weight = (seeded(shape.as_slice(), seed as u64) / (width as f64).sqrt())?;
        tensors.insert(format!("{path}.weight"), weight.to_dtype(DType::F32)?);
        let bias = seeded(shape[0], 1000 + seed as u64).to_dtype(DType::F32)?;
        tensors.insert(format!("{path}.bias"), bias);
    }
    Ok(tensors)
}

/// The same base as the original writes it. Nothing may be left over.
pub fn original(model: &[Spelling], tensors: &Tensors) -> Result<Tensors> {
    let (mut left, mut out) = (tensors.clone(), Tensors::new());
    for spelling in model {
        let mut take = |end: &str| -> Vec<Tensor> {
            let names = spelling
                .layers
                .iter()
                .map(|(path, _)| format!("{path}.{end}"));
            names.map(|name| left.remove(&name).unwrap()).collect()
        };
        let (weights, biases) = (take("weight"), take("bias"));
        out.insert(spelling.tensor.clone(), spelling.convert(weights)?);
        let of_bias = match spelling.tensor.strip_suffix("weight") {
            Some(path) => format!("{path}bias"),
            None => format!("{}.bias", spelling.tensor),
        };
        if spelling.how != How::Turned {
            out.insert(of_bias, spelling.convert(biases)?);
        }
    }
    assert!(left.is_empty(), "{:?}", left.keys());
    Ok(out)
}

/// The layers of diffusers by path, with their shapes.
pub fn layers(model: &[Spelling]) -> BTreeMap<String, Vec<usize>> {
    let layers = model.iter().flat_map(|spelling| spelling.layers.clone());
    layers.collect()
}

/// A model behind a prefix, in both spellings.
pub fn behind(model: Vec<Spelling>, of_original: &str, of_diffusers: &str) -> Vec<Spelling> {
    let behind = |spelling: Spelling| spelling.behind(of_original, of_diffusers);
    model.into_iter().map(behind).collect()
}
