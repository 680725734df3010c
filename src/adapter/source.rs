//! [`Source`]: what is left of a [`Stored`] while a model is built from it; and the way back, from a
//! model to a [`Stored`].

use super::asked::Asked;
use super::fingerprint::fingerprint;
use super::stored::{NORMS_DIFFER, OTHER_BASE, Stored, StoredLayer, StoredLowRank, Warning};
use super::{Adapter, AdapterBuilder, locked};
use crate::config::{DoftConfig, LayerKind, Magnitude};
use crate::error::{Error, Result};
use crate::frozen::Base;
use crate::layer::{Adaptation, Form, check_finite};
use crate::params::row_norms_of;
use candle_core::{DType, Device, Tensor, Var};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Mutex;

/// What is left of a [`Stored`] while a model is built from it.
#[derive(Debug)]
pub(super) struct Source {
    stored: Stored,
    asked: Asked,
    warnings: Mutex<Vec<Warning>>,
}

impl Source {
    /// Whether a module means that path.
    pub(super) fn holds(&self, path: &str) -> Result<bool> {
        Ok(self.asked.find(&self.stored, path)?.is_some())
    }

    /// What a layer is made with: its configuration and its norms `n0`, the file's where it has some.
    /// Checks that the tensors of the file fit the weight, before any layer is made.
    pub(super) fn setting(
        &self,
        path: &str,
        kind: LayerKind,
        base: &Base,
    ) -> Result<(DoftConfig, Option<Tensor>)> {
        let Some((module, layer)) = self.asked.find(&self.stored, path)? else {
            return Ok((self.stored.config.clone(), None));
        };
        if let Some(stored) = layer.kind
            && stored != kind
        {
            let reason = format!("`{path}` is a {kind:?} layer, in the file it is a {stored:?}");
            return Err(Error::file(&self.stored.file, reason));
        }
        layer.check_shape(&self.stored.file, module, path, base.shape)?;
        let norms = row_norms_of(base.weight)?;
        self.compare_base(path, layer, &norms)?;
        check_finite(path, &norms)?;
        let mut config = layer.settings(&self.stored.config, base.weight.in_dim());
        // The rules of a file decide nothing but this: all else stands with the layer.
        config.dropout = self.stored.config.for_layer(module)?.dropout;
        config.validate()?;
        let norms = match &layer.norms {
            Some(stored) => stored.to_dtype(norms.dtype())?.to_device(norms.device())?,
            None => norms,
        };
        Ok((config, Some(norms)))
    }

    fn compare_base(&self, path: &str, layer: &StoredLayer, norms: &Tensor) -> Result<()> {
        if layer.norms_differ(norms)? {
            locked(&self.warnings).push(Warning::new(path, NORMS_DIFFER));
        }
        if self.stored.allow_changed_base && layer.is_other_base(norms)? {
            locked(&self.warnings).push(Warning::new(path, OTHER_BASE));
        }
        layer.check_base(&self.stored, path, norms, self.stored.allow_changed_base)
    }

    /// Gives a layer the parameters of the file.
    pub(super) fn fill(&self, layer: &Adaptation) -> Result<()> {
        let Some((_, stored)) = self.asked.find(&self.stored, layer.path())? else {
            return Ok(());
        };
        let set = |parameter: &Tensor, value: &Tensor| -> Result<()> {
            let value = value
                .to_device(parameter.device())?
                .to_dtype(parameter.dtype())?;
            let value = value.reshape(parameter.shape())?;
            Ok(Var::from_tensor(parameter)?.set(&value)?)
        };
        match (layer.form(), &stored.low_rank) {
            (Form::Rotation { params, .. }, _) => {
                if stored.rotates() {
                    set(params.rotation(), &stored.theta(layer.kind())?)?;
                }
                if let (Some(parameter), Some(value)) =
                    (params.magnitude_parameter(), &stored.value)
                {
                    set(parameter, value)?;
                }
            }
            (Form::LowRank(params), Some(stored)) => {
                set(params.a(), &stored.a)?;
                set(params.b(), &stored.b)?;
                if let (Some(parameter), Some(value)) = (params.magnitude(), &stored.magnitude) {
                    set(parameter, value)?;
                }
            }
            (Form::LowRank(_), None) => {}
        }
        self.asked.claim(&self.stored, layer.path())
    }

    /// The value of an extra tensor in a dtype, once it is asked for.
    pub(super) fn extra(&self, name: &str, dtype: DType) -> Result<Option<Tensor>> {
        let Some(stored) = self.stored.extras.get(name) else {
            return Ok(None);
        };
        let value = stored.to_dtype(dtype)?;
        // What the file holds is finite.
        let host = value
            .to_dtype(DType::F64)?
            .flatten_all()?
            .to_vec1::<f64>()?;
        if let Some(index) = host.iter().position(|v| !v.is_finite()) {
            return Err(Error::FileTensor {
                file: self.stored.file.clone(),
                tensor: name.to_string(),
                found: format!(
                    "a value at index {index} that is {} in {dtype:?}",
                    host[index]
                ),
                expected: "finite numbers".to_string(),
                fix: "ask for the tensor in a wider dtype",
            });
        }
        self.asked.insert_extra(name);
        Ok(Some(value))
    }

    /// Names of the extra tensors of the file.
    pub(super) fn extras(&self) -> impl Iterator<Item = &String> {
        self.stored.extras.keys()
    }

    pub(super) fn has_extra(&self, name: &str) -> bool {
        self.stored.extras.contains_key(name)
    }

    pub(super) fn warnings(&self) -> Vec<Warning> {
        let mut warnings = self.stored.warnings.clone();
        warnings.extend(locked(&self.warnings).iter().cloned());
        let unused = self.asked.unused(&self.stored);
        if let (true, Some(first)) = (self.stored.allow_partial, unused.first()) {
            let message = match unused.len() {
                1 => "it matches no layer".to_string(),
                count => format!("{count} modules match no layer, this one first"),
            };
            warnings.push(Warning::new(first, message));
        }
        warnings
    }

    /// What a file of the layers that were built so far leaves out.
    fn left_out(&self) -> Option<Warning> {
        let unused = self.asked.unused(&self.stored);
        let (first, more) = unused.split_first()?;
        let more = match more.len() {
            0 => String::new(),
            count => format!(", as {count} more"),
        };
        let message = format!("left out, for it matches no layer or tensor of the model{more}");
        Some(Warning::new(first, message))
    }

    /// Refuses a model that left a part of the file unused.
    pub(super) fn check_used<'a>(&self, paths: impl Iterator<Item = &'a str>) -> Result<()> {
        let unused = self.asked.unused(&self.stored);
        let partial = self.stored.allow_partial && !self.asked.is_empty();
        match unused.is_empty() || partial {
            true => Ok(()),
            false => Err(self.stored.unused(&unused, paths)),
        }
    }
}

impl AdapterBuilder {
    /// A builder whose layers take settings and parameters from a file.
    pub(crate) fn from_stored(stored: Stored, device: &Device) -> Result<Self> {
        stored.config.validate()?;
        let config = stored.config.clone();
        let source = Source {
            stored,
            asked: Asked::default(),
            warnings: Mutex::default(),
        };
        Ok(Self::new(config, device, Some(source)))
    }

    /// What is worth knowing about the loaded file. Empty for a fresh adapter.
    pub fn warnings(&self) -> Vec<Warning> {
        self.source().map_or_else(Vec::new, Source::warnings)
    }
}

impl Adapter {
    /// Everything that a file has to hold, and a warning where that is less than the file that it was
    /// loaded from has.
    pub(crate) fn to_stored(&self, file: PathBuf) -> Result<Stored> {
        let mut layers = BTreeMap::new();
        for layer in self.adapted() {
            layers.insert(layer.path().to_string(), stored_layer(layer)?);
        }
        let source = self.inner.source.as_ref();
        let left_out = source.and_then(|source| source.left_out());
        Ok(Stored {
            file,
            config: self.inner.config.clone(),
            layers,
            extras: self.stored_extras()?,
            unannounced: BTreeSet::new(),
            warnings: left_out.into_iter().collect(),
            allow_partial: false,
            allow_changed_base: false,
        })
    }

    /// The values of the extra tensors that were made or asked for.
    fn stored_extras(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut extras = BTreeMap::new();
        for (name, var) in &self.inner.extras {
            let value = var.as_tensor().detach().to_device(&Device::Cpu)?;
            extras.insert(name.clone(), value);
        }
        Ok(extras)
    }

    /// What is worth knowing about the file that the adapter was loaded from, and about how it fits
    /// the model. Empty for an adapter that was not loaded.
    pub fn warnings(&self) -> Vec<Warning> {
        let source = self.inner.source.as_ref();
        source.map_or_else(Vec::new, |source| source.warnings())
    }
}

fn stored_layer(layer: &Adaptation) -> Result<StoredLayer> {
    let cpu = |tensor: &Tensor| tensor.detach().to_device(&Device::Cpu);
    let (layout, params) = match layer.form() {
        Form::Rotation { layout, params, .. } => (layout, params),
        Form::LowRank(params) => {
            let stored = StoredLowRank {
                spec: params.spec(),
                a: cpu(params.a())?,
                b: cpu(params.b())?,
                magnitude: params.magnitude().map(cpu).transpose()?,
                transposed: false,
            };
            let base = fingerprint(&cpu(params.norms())?)?;
            let shape = Some(layer.shape().to_vec());
            let stored = stored.layer(Some(layer.kind()))?;
            return Ok(StoredLayer {
                shape,
                base,
                ..stored
            });
        }
    };
    let theta = cpu(params.rotation())?;
    let packed = match layer.kind().is_kernel() {
        true => theta.neg()?,
        false => theta,
    };
    let norms = cpu(params.norms())?;
    Ok(StoredLayer {
        kind: Some(layer.kind()),
        shape: Some(layer.shape().to_vec()),
        block_size: layout.block_size,
        shared: Some(layout.shared),
        map: layout.map,
        scaled: layout.scaled,
        max_norm: layout.max_norm,
        magnitude: params.kind(),
        packed,
        kernel_factor: -1.,
        value: params.magnitude_parameter().map(cpu).transpose()?,
        base: fingerprint(&norms)?,
        norms: (params.kind() == Magnitude::Absolute).then_some(norms),
        low_rank: None,
    })
}
