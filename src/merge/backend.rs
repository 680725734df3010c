//! The source of a merged `VarBuilder`.

use super::Merge;
use crate::adapter::locked;
use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

pub(super) struct Merged<'a> {
    merge: Merge,
    // `SimpleBackend` asks for `Sync`, which a `VarBuilder` is not in general.
    base: Mutex<VarBuilder<'a>>,
    names: Arc<Names>,
    unnamed: Arc<Names>,
}

/// The names that a model asked for; also those of them that the table of names lacks.
pub(super) type Names = Mutex<BTreeSet<String>>;

impl<'a> Merged<'a> {
    pub(super) fn new(
        merge: Merge,
        base: VarBuilder<'a>,
        (names, unnamed): (Arc<Names>, Arc<Names>),
    ) -> Self {
        Self {
            merge,
            base: Mutex::new(base),
            names,
            unnamed,
        }
    }

    fn base(&self) -> VarBuilder<'a> {
        locked(&self.base).clone()
    }

    fn note(&self, name: &str) {
        let path = name.strip_suffix(".weight").unwrap_or(name);
        locked(&self.names).insert(path.to_string());
    }

    /// The merged tensor of a name, from what the base returns in the dtype that was asked for.
    fn merged(&self, name: &str, base: Tensor) -> Result<Tensor> {
        if base.rank() >= 2 && self.merge.is_unnamed(name, base.dims())? {
            locked(&self.unnamed).insert(name.to_string());
        }
        // An f64 weight that was asked for stays one.
        Ok(self.merge.tensor(name, &base, false)?.unwrap_or(base))
    }

    /// The tensor of an adapter that the base has none of.
    fn added(&self, name: &str) -> Option<&Tensor> {
        match self.base().contains_tensor(name) {
            true => None,
            false => self.merge.extra(name).map(|(_, extra)| extra),
        }
    }
}

fn replaced(
    name: &str,
    extra: &Tensor,
    expected: &Shape,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    if extra.shape() != expected {
        return Err(Error::UnexpectedShape {
            msg: format!("the extra tensor `{name}` of the adapter"),
            expected: expected.clone(),
            got: extra.shape().clone(),
        });
    }
    extra.to_dtype(dtype)?.to_device(device)
}

impl SimpleBackend for Merged<'_> {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        _: &Device,
    ) -> Result<Tensor> {
        self.note(name);
        self.merge.mark_extra(name);
        let base = self.base();
        match self.added(name) {
            Some(extra) => replaced(name, extra, &shape, dtype, base.device()),
            None => self.merged(name, base.get_with_hints_dtype(shape, name, init, dtype)?),
        }
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> Result<Tensor> {
        self.note(name);
        self.merge.mark_extra(name);
        let base = self.base();
        match self.added(name) {
            Some(extra) => replaced(name, extra, extra.shape(), dtype, base.device()),
            None => self.merged(name, base.get_unchecked_dtype(name, dtype)?),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.base().contains_tensor(name) || self.merge.extra(name).is_some()
    }
}
