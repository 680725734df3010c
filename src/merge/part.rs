//! [`Part`]: one adapter of a merge, and what it makes of a weight.

use super::header::Shapes;
use super::target::Index;
use super::{Strength, StrengthMode};
use crate::adapter::{
    Asked, NORMS_DIFFER, OTHER_BASE, Stored, StoredLayer, StoredLowRank, TRANSLATED, Warning,
    locked, translated,
};
use crate::config::{LayerKind, Pattern, Strengths};
use crate::error::{Error, Result, shown};
use crate::params::{low_rank_rows, row_norms};
use crate::rotation;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeSet;
use std::sync::Mutex;

/// One adapter, and which of its modules were asked for.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) stored: Stored,
    pub(super) strength: Strength,
    /// Strengths of single layers.
    rules: Vec<(Pattern, f64)>,
    pub(super) asked: Asked,
    pub(super) index: Index,
    /// What came up when it met its weights.
    met: Mutex<BTreeSet<Warning>>,
}

impl Part {
    pub(super) fn new(stored: Stored, strength: Strength, rules: Vec<(Pattern, f64)>) -> Self {
        Self {
            index: Index::new(&stored),
            stored,
            strength,
            rules,
            asked: Asked::default(),
            met: Mutex::default(),
        }
    }

    /// The same adapter, of which nothing was asked for.
    pub(super) fn fresh(&self) -> Self {
        Self::new(self.stored.clone(), self.strength, self.rules.clone())
    }

    pub(super) fn warn(&self, path: &str, message: &str) {
        locked(&self.met).insert(Warning::new(path, message));
    }

    /// What is worth knowing about its file, its weights, and what went unused.
    pub(super) fn warnings(&self) -> Vec<Warning> {
        let mut warnings = self.stored.warnings.clone();
        warnings.extend(locked(&self.met).iter().cloned());
        if self.stored.allow_partial && !self.asked.is_empty() {
            let unused = self.asked.unused(&self.stored).into_iter();
            let message = "it matches no weight and was not merged";
            warnings.extend(unused.map(|name| Warning::new(name, message)));
        }
        warnings
    }

    /// Refuses when a module or an extra tensor was asked for by no weight.
    pub(super) fn check_used<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<()> {
        self.check_patterns()?;
        let mut unused = self.asked.unused(&self.stored);
        if self.strength.value == 0. {
            unused.retain(|name| self.stored.layers.contains_key(*name));
        }
        match unused.is_empty() || self.stored.allow_partial && !self.asked.is_empty() {
            true => Ok(()),
            false => Err(self.stored.unused(&unused, names)),
        }
    }

    /// Refuses a strength of layers of which none was asked for.
    pub(super) fn check_patterns(&self) -> Result<()> {
        let paths = self.asked.paths(&self.stored);
        self.strengths()
            .check_patterns(paths.iter().map(String::as_str))
    }

    /// The strength of a layer by its path in the model.
    pub(super) fn strength_of(&self, path: &str) -> Result<Strength> {
        let value = self.strengths().of(path)?;
        Ok(Strength {
            value,
            ..self.strength
        })
    }

    fn strengths(&self) -> Strengths {
        let strengths = Strengths::from(self.strength.value);
        let rules = self.rules.iter().cloned();
        rules.fold(strengths, |all, (pattern, value)| {
            all.with_rule(pattern, value)
        })
    }

    /// Refuses an extra tensor of a layer that a table names, as its bias: the checkpoint calls it otherwise,
    /// and it would be added beside what it should replace.
    pub(super) fn check_extras(&self, base: &Shapes, layers: &[String]) -> Result<()> {
        if self.strength.value == 0. || !self.is_translated() {
            return Ok(());
        }
        let extras = self.stored.extras.keys();
        for name in extras.filter(|name| !base.contains_key(*name)) {
            let (module, _) = name.rsplit_once('.').unwrap_or((name, ""));
            if layers
                .iter()
                .any(|layer| translated(module, layer).is_some())
            {
                let name = shown(name);
                return self.refuse(&format!(
                    "the checkpoint has `{name}` under another name, and extra tensors are not translated; \
                     merge into a base with the names of the adapter"
                ));
            }
        }
        Ok(())
    }

    /// Whether a layer of it was found by a table of names.
    pub(super) fn is_translated(&self) -> bool {
        self.asked.any_behind(TRANSLATED)
    }

    /// The tensor that replaces the whole tensor of that name.
    pub(super) fn extra(&self, name: &str) -> Option<&Tensor> {
        if self.strength.value == 0. {
            return None;
        }
        self.stored.extras.get(name)
    }

    /// Counts an extra tensor that there is as asked for.
    pub(super) fn mark_extra(&self, name: &str) {
        if self.extra(name).is_none() {
            return;
        }
        self.asked.insert_extra(name);
        if self.strength.value != 1. {
            self.warn(
                name,
                "an extra tensor is there in full, whatever the strength",
            );
        }
    }

    /// Takes over what another use of the same adapter met.
    pub(super) fn take_over(&self, other: &Self) {
        let met = locked(&other.met).clone();
        *locked(&self.met) = met;
        self.asked.copy_from(&other.asked);
    }

    /// Checks that a layer fits its weight, and that the weight is the one that it was trained on.
    pub(super) fn check(
        &self,
        module: &str,
        layer: &StoredLayer,
        path: &str,
        weight: &Tensor,
        norms: &Tensor,
        allow_changed_base: bool,
    ) -> Result<()> {
        let kind = self.kind(layer, path, weight)?;
        check_finite(path, norms)?;
        layer.check_shape(&self.stored.file, module, path, weight.dims())?;
        let patch: usize = weight.dims().iter().skip(2).product();
        if kind.is_kernel() && layer.kernel_factor == 1. && patch > 1 {
            self.warn(
                path,
                "PEFT's own forward of such a kernel differs from its merged weight",
            );
        }
        if layer.norms_differ(norms)? {
            self.warn(path, NORMS_DIFFER);
        }
        let allowed = allow_changed_base || self.stored.allow_changed_base;
        if allowed && layer.is_other_base(norms)? {
            self.warn(path, OTHER_BASE);
        }
        layer.check_base(&self.stored, path, norms, allowed)
    }

    fn kind(&self, layer: &StoredLayer, path: &str, weight: &Tensor) -> Result<LayerKind> {
        let rank = weight.rank();
        match (layer.kind, LayerKind::of_rank(rank)) {
            (Some(stored), _) if stored.rank() == rank => Ok(stored),
            (None, Some(kind)) => Ok(kind),
            (Some(stored), Some(kind)) => self.refuse(&format!(
                "`{path}` is a {kind:?} layer, trained was a {stored:?} layer"
            )),
            (_, None) => self.refuse(&format!("`{path}` has {rank} axes, expected 2 to 4")),
        }
    }

    /// The weight with the layer in it, at the strength of this part. Rounds to the dtype of `weight`, a
    /// linear strength more than once.
    pub(super) fn merge(
        &self,
        path: &str,
        layer: &StoredLayer,
        weight: &Tensor,
        norms: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Strength { value: s, mode } = self.strength_of(path)?;
        if s == 0. {
            return Ok(weight.clone());
        }
        let kind = self.kind(layer, path, weight)?;
        if let Some(low_rank) = &layer.low_rank {
            let merged = low_rank_weight(kind, low_rank, weight, s)?;
            self.check_range(path, &merged)?;
            return Ok(merged);
        }
        let geodesic = mode == StrengthMode::Geodesic;
        let wide = if weight.dtype() == DType::F64 {
            DType::F64
        } else {
            DType::F32
        };
        let power = if geodesic { s } else { 1. };
        let ratio = layer.ratio(norms, wide)?;
        let ratio = match ratio {
            Some(ratio) if power != 1. => Some(ratio.powf(power)?),
            ratio => ratio,
        };
        let ratio = ratio
            .map(|ratio| ratio.to_device(weight.device()))
            .transpose()?;
        let mut merged = match layer.layout(weight.dims())? {
            None => scaled(weight, ratio.as_ref(), wide)?,
            Some(layout) => {
                let theta = layer.theta(kind)?.to_dtype(wide)?;
                let r = match geodesic {
                    true => rotation::geodesic(&theta, &layout, s)?.to_dtype(wide)?,
                    false => rotation::rotation(&theta, &layout)?,
                };
                let r = r.to_device(weight.device())?;
                rotation::effective_weight(kind, weight, &r, ratio.as_ref())?
            }
        };
        if !geodesic && s != 1. {
            let (from, to) = (weight.to_dtype(wide)?, merged.to_dtype(wide)?);
            merged = (&from + ((to - &from)? * s)?)?.to_dtype(weight.dtype())?;
        }
        self.check_range(path, &merged)?;
        Ok(merged)
    }

    /// Returns an error for a merged weight that is not finite.
    pub(super) fn check_range(&self, path: &str, merged: &Tensor) -> Result<()> {
        // On the host, for Metal has no f64.
        let sizes = merged.to_device(&Device::Cpu)?.abs()?;
        let sum: f64 = sizes.to_dtype(DType::F64)?.sum_all()?.to_scalar()?;
        match sum.is_finite() {
            true => Ok(()),
            false => self.refuse(&format!("the merged `{path}` is not finite")),
        }
    }

    fn refuse<T>(&self, reason: &str) -> Result<T> {
        Err(Error::file(&self.stored.file, reason))
    }
}

/// Returns an error for a base with a row whose norm is infinite: a magnitude relative to it would be 0.
fn check_finite(path: &str, norms: &Tensor) -> Result<()> {
    let norms = norms.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let norms: Vec<f64> = norms.to_vec1()?;
    // A NaN shows in the merged weight.
    match norms.iter().position(|norm| norm.is_infinite()) {
        None => Ok(()),
        Some(row) => Err(Error::BaseNotFinite {
            layer: path.to_string(),
            row,
            found: norms[row],
        }),
    }
}

fn scaled(weight: &Tensor, ratio: Option<&Tensor>, wide: DType) -> Result<Tensor> {
    let Some(ratio) = ratio else {
        return Ok(weight.clone());
    };
    let mut shape = vec![1; weight.rank()];
    shape[0] = weight.dim(0)?;
    let product = weight
        .to_dtype(wide)?
        .broadcast_mul(&ratio.reshape(shape)?)?;
    Ok(product.to_dtype(weight.dtype())?)
}

/// `W + s (W_eff - W)` of LoRA or DoRA, computed in f32 or wider and rounded once.
fn low_rank_weight(
    kind: LayerKind,
    low_rank: &StoredLowRank,
    weight: &Tensor,
    s: f64,
) -> Result<Tensor> {
    let dtype = match weight.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let on = |t: &Tensor| t.to_dtype(dtype)?.to_device(weight.device());
    let turned = low_rank.turned(weight.dims()).is_some();
    let base = if turned { weight.t()? } else { weight.clone() };
    let base = base.to_dtype(dtype)?;
    let (a, b) = (on(&low_rank.a)?, on(&low_rank.b)?);
    let delta = low_rank_rows(kind, &a, &b, low_rank.spec.scale())?;
    let delta = delta.reshape(base.shape())?;
    let merged = match &low_rank.magnitude {
        None => (&base + (delta * s)?)?,
        Some(magnitude) => {
            let moved = (&base + delta)?;
            let norms = row_norms(&moved)?.to_dtype(dtype)?;
            // A row of zeros stays one.
            let norms = (&norms + norms.eq(0.)?.to_dtype(dtype)?)?;
            let ratio = on(magnitude)?.div(&norms)?.unsqueeze(1)?;
            let merged = moved.broadcast_mul(&ratio)?;
            match s == 1. {
                true => merged,
                false => (&base + ((merged - &base)? * s)?)?,
            }
        }
    };
    let merged = if turned { merged.t()? } else { merged };
    Ok(merged.to_dtype(weight.dtype())?.contiguous()?)
}
