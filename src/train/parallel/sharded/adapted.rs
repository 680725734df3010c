//! [`Part`]: the adapted part of a layer that one rank holds.

use super::check_parts;
use super::exchange::{Exchange, Link};
use super::sums::entered;
use crate::config::{BlockLayout, DoftConfig, LayerKind};
use crate::error::{Error, Result};
use crate::frozen::{Frozen, Linear};
use crate::layer::check_finite;
use crate::params::{Params, names, row_norms_of};
use crate::rotation;
use crate::train::parallel::{agree, gather, same};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

/// Which side of the weight is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Split {
    Outputs,
    Inputs,
}

#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) path: String,
    pub(super) split: Split,
    pub(super) linear: Linear,
    pub(super) config: DoftConfig,
    pub(super) layout: BlockLayout,
    pub(super) params: Params,
    pub(super) link: Link,
}

impl Part {
    pub(super) fn new(
        function: &'static str,
        split: Split,
        linear: Linear,
        config: &DoftConfig,
        group: &Exchange,
        vb: VarBuilder,
    ) -> Result<Self> {
        let path = vb.prefix();
        check_parts(group, &path, &linear)?;
        let link = group.link();
        let local = || -> Result<_> {
            let config = supported(function, config.for_layer(&path)?)?;
            let layout = part_layout(function, split, &linear, &config, link.size, &path)?;
            let norms = row_norms_of(linear.as_base().weight)?;
            check_finite(&path, &norms)?;
            Ok((config, layout, norms))
        };
        let (config, layout, norms) = agree(group, local())?;
        let norms = match split {
            Split::Outputs => norms,
            Split::Inputs => agree(group, whole_norms(group, &norms))?,
        };
        same(
            group,
            &format!("the configuration of `{path}`"),
            &format!("{config:?}"),
        )?;
        let magnitude = config.magnitude_of(LayerKind::Linear);
        let params = Params::new(&layout, magnitude, norms, names::ROTATION, vb);
        Ok(Self {
            params: agree(group, params)?,
            path,
            split,
            linear,
            config,
            layout,
            link,
        })
    }

    /// Whether all ranks have the same `theta`, to which each adds a part of the gradient.
    pub(super) fn has_whole_rotation(&self) -> bool {
        self.split == Split::Outputs || self.layout.shared
    }

    /// `R` of this part, in the graph.
    pub(super) fn rotation(&self) -> Result<Tensor> {
        let theta = self.params.rotation();
        match self.has_whole_rotation() {
            true => rotation::rotation(&entered(self.link, theta)?, &self.layout),
            false => rotation::rotation(theta, &self.layout),
        }
    }

    pub(super) fn effective_weight(&self) -> Result<Tensor> {
        let r = rotation::rotation(self.params.rotation(), &self.layout)?.detach();
        let ratio = self.params.ratio()?.map(|ratio| ratio.detach());
        let weight = self.linear.weight()?;
        rotation::effective_weight(LayerKind::Linear, &weight, &r, ratio.as_ref())
    }
}

/// Dropout would need masks over the blocks of all ranks, and low-rank matrices travel otherwise.
fn supported(function: &'static str, config: DoftConfig) -> Result<DoftConfig> {
    if config.low_rank.is_some() {
        let found = "low-rank matrices";
        return Err(Error::argument(
            function,
            "the adapter",
            found,
            "a rotation",
        ));
    }
    if config.dropout > 0. {
        let found = config.dropout.to_string();
        return Err(Error::argument(function, "the dropout", found, "0"));
    }
    Ok(config)
}

/// The blocks of this rank, of the size that they have in the whole layer.
fn part_layout(
    function: &'static str,
    split: Split,
    linear: &Linear,
    config: &DoftConfig,
    ranks: usize,
    path: &str,
) -> Result<BlockLayout> {
    let width = linear.in_dim();
    if split == Split::Outputs {
        return config.layout(path, width);
    }
    let whole = config.layout(path, width * ranks)?;
    let b = whole.block_size;
    if !width.is_multiple_of(b) {
        let found = format!("{width} of `{path}`, which cuts a block");
        let expected = format!("a multiple of the block size {b}");
        return Err(Error::argument(
            function,
            "the input width of a rank",
            found,
            expected,
        ));
    }
    Ok(BlockLayout {
        width,
        blocks: width / b,
        ..whole
    })
}

/// Row norms of the whole weight: `sqrt(sum over ranks of squares)`, which cannot overflow on the way.
fn whole_norms(group: &Exchange, part: &Tensor) -> Result<Tensor> {
    let (dtype, device) = (part.dtype(), part.device());
    let part: Vec<f64> = part
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .to_vec1()?;
    let send: Vec<u8> = part.iter().flat_map(|norm| norm.to_le_bytes()).collect();
    let mut norms = vec![0f64; part.len()];
    for row in gather(group, &send)? {
        for (norm, bytes) in norms.iter_mut().zip(row.chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            *norm = norm.hypot(f64::from_le_bytes(word));
        }
    }
    let norms = Tensor::new(norms, &Device::Cpu)?.to_dtype(dtype)?;
    Ok(norms.to_device(device)?)
}
