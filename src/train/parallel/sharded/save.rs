//! [`save`]: the parts of all ranks as one adapter file.

use super::adapted::{Part, Split};
use super::exchange::{Exchange, Link};
use super::{DoftColumnParallel, DoftRowParallel};
use crate::adapter::{Stored, StoredLayer, fingerprint};
use crate::config::{DoftConfig, LayerKind, Magnitude};
use crate::error::{Error, Result};
use crate::file::write_stored;
use crate::params::names;
use crate::train::parallel::agree::rank;
use crate::train::parallel::{agree, gather, lead};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// An adapted layer of which each rank holds a part: [`DoftColumnParallel`] or [`DoftRowParallel`]. Sealed.
pub trait Sharded: sealed::Parted {}

impl Sharded for DoftColumnParallel {}
impl Sharded for DoftRowParallel {}

mod sealed {
    use super::Part;

    pub trait Parted {
        #[allow(private_interfaces, reason = "nobody outside names the trait")]
        fn part(&self) -> &Part;
    }
}

#[allow(private_interfaces, reason = "nobody outside names the trait")]
impl sealed::Parted for DoftColumnParallel {
    fn part(&self) -> &Part {
        &self.0
    }
}

#[allow(private_interfaces, reason = "nobody outside names the trait")]
impl sealed::Parted for DoftRowParallel {
    fn part(&self) -> &Part {
        &self.0
    }
}

/// Gathers the parts of all ranks and writes one adapter file on rank 0, as [`Adapter::save`](crate::Adapter::save)
/// would for the whole layers: [`Adapter::load`](crate::Adapter::load) reads it in one process. Called by all
/// ranks, with the same layers in the same order.
///
/// # Errors
///
/// [`Error::NoLayers`] without layers; [`Error::Argument`] for a layer of another group or two of one path;
/// [`Error::Rank`] if copies that should be equal have drifted apart, with the tensor; [`Error::Io`]. All ranks have
/// one, and a file that was there before stays.
pub fn save(group: &Exchange, path: impl AsRef<Path>, layers: &[&dyn Sharded]) -> Result<()> {
    let path = path.as_ref();
    let mut stored = BTreeMap::new();
    agree(group, check(group.link(), layers))?;
    for layer in layers {
        let part = layer.part();
        stored.insert(part.path.clone(), agree(group, whole(group, part))?);
    }
    // Each layer has its own settings in the file, so rules would say nothing more.
    let config = DoftConfig {
        rules: Vec::new(),
        ..layers[0].part().config.clone()
    };
    lead(group, || {
        let stored = Stored {
            file: path.to_path_buf(),
            config,
            layers: stored,
            extras: BTreeMap::new(),
            unannounced: Default::default(),
            warnings: Vec::new(),
            allow_partial: false,
            allow_changed_base: false,
        };
        write_stored(&stored, path).map(drop)
    })
}

fn check(link: Link, layers: &[&dyn Sharded]) -> Result<()> {
    let refuse = |what, found: String, expected| {
        Err(Error::argument("parallel::save", what, found, expected))
    };
    if layers.is_empty() {
        return Err(Error::NoLayers);
    }
    for (i, layer) in layers.iter().enumerate() {
        let part = layer.part();
        if !part.link.is(link) {
            let found = format!("another one at `{}`", part.path);
            return refuse("the group of a layer", found, "the one given");
        }
        if layers[..i]
            .iter()
            .any(|other| other.part().path == part.path)
        {
            let found = format!("`{}` twice", part.path);
            return refuse("the path of a layer", found, "one for each layer");
        }
    }
    Ok(())
}

/// The whole layer.
fn whole(group: &Exchange, part: &Part) -> Result<StoredLayer> {
    let Part {
        layout,
        params,
        split,
        linear,
        ..
    } = part;
    let tensor = |name: &str, value: &Tensor, replicated: bool| {
        gathered(group, &format!("{}.{name}", part.path), value, replicated)
    };
    let outputs_whole = *split == Split::Inputs;
    let packed = tensor(
        names::ROTATION,
        params.rotation(),
        part.has_whole_rotation(),
    )?;
    let norms = tensor("n0", params.norms(), outputs_whole)?;
    let name = names::magnitude(params.kind()).unwrap_or_default();
    let value = params.magnitude_parameter();
    let value = value.map(|value| tensor(name, value, outputs_whole));
    let (mut out, mut width) = (linear.out_dim(), linear.in_dim());
    match split {
        Split::Outputs => out *= part.link.size,
        Split::Inputs => width *= part.link.size,
    }
    Ok(StoredLayer {
        kind: Some(LayerKind::Linear),
        shape: Some(vec![out, width]),
        block_size: layout.block_size,
        shared: Some(layout.shared),
        map: layout.map,
        scaled: layout.scaled,
        max_norm: layout.max_norm,
        magnitude: params.kind(),
        packed,
        kernel_factor: -1.,
        value: value.transpose()?,
        base: fingerprint(&norms)?,
        norms: (params.kind() == Magnitude::Absolute).then_some(norms),
        low_rank: None,
    })
}

/// The parts of all ranks one after the other; or the one value that all have.
fn gathered(group: &Exchange, name: &str, part: &Tensor, replicated: bool) -> Result<Tensor> {
    // f32 goes through f64 without loss.
    let host = part.detach().to_device(&Device::Cpu)?;
    let values: Vec<f64> = host.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    let send: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let rows = gather(group, &send)?;
    if replicated {
        return match rows.iter().position(|row| *row != rows[0]) {
            None => Ok(host),
            Some(other) => {
                let reason = format!(
                    "its `{name}` is not that of rank 0: copies have drifted apart; train on the same \
                     input on all ranks, and step by the same rule"
                );
                Err(rank(other, reason))
            }
        };
    }
    let part = |row: &Vec<u8>| {
        let values = row.chunks_exact(8).map(|bytes| {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            f64::from_le_bytes(word)
        });
        Tensor::from_vec(values.collect::<Vec<_>>(), host.shape(), &Device::Cpu)
    };
    let parts = rows
        .iter()
        .map(part)
        .collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?.to_dtype(host.dtype())?)
}
