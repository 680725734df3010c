//! [`Group`]: the tensors of one layer by role, each read with its checks.

use super::keys::Roles;
use super::tensors::{Marker, Tensors, not_finite, refused};
use crate::adapter::StoredLayer;
use crate::error::{Result, shown};
use candle_core::{DType, Tensor};

/// The tensors of one layer, by role.
pub(super) struct Group<'a> {
    pub(super) tensors: &'a Tensors<'a>,
    /// The layer, as the file names it.
    pub(super) module: &'a str,
    pub(super) roles: &'a Roles,
}

impl Group<'_> {
    pub(super) fn has(&self, role: &str) -> bool {
        self.roles.contains_key(role)
    }

    /// The key of a role that it has to have.
    pub(super) fn key(&self, role: &str) -> Result<&str> {
        match self.roles.get(role) {
            Some(key) => Ok(key),
            None => self.refuse(format!("it has no `{role}`")),
        }
    }

    pub(super) fn marker(&self, role: &str) -> Result<Option<Marker>> {
        let key = self.roles.get(role);
        key.map(|key| self.tensors.marker(key)).transpose()
    }

    /// The packed rows of a role and their block size.
    pub(super) fn packed(&self, role: &str) -> Result<(Tensor, usize)> {
        let key = self.key(role)?;
        let tensor = self.tensors.read(key)?;
        let b = match tensor.dims() {
            &[rows, columns] if rows > 0 => block_size(columns),
            _ => None,
        };
        match b {
            Some(b) => Ok((tensor, b)),
            None => {
                let found = format!("shape {:?}", tensor.dims());
                let expected = "at least one row and b(b-1)/2 columns for a block size b";
                self.tensors.wrong(key, found, expected)
            }
        }
    }

    /// A magnitude or norms, `(out)`: stored as one float for each output, in one of the shapes that
    /// the tools write.
    pub(super) fn outputs(&self, role: &str) -> Result<Tensor> {
        let key = self.key(role)?;
        let tensor = self.tensors.read(key)?;
        let one = |dims: &[usize]| dims.iter().all(|d| *d == 1);
        let fits = match tensor.dims() {
            [out] => *out > 0,
            [1, out, 1, 1] => *out > 0,
            [out, rest @ ..] => *out > 0 && one(rest),
            [] => false,
        };
        match fits {
            true => Ok(tensor.flatten_all()?),
            false => {
                let found = format!("shape {:?}", tensor.dims());
                let expected = "one element for each output, (out) or (out, 1 ..)";
                self.tensors.wrong(key, found, expected)
            }
        }
    }

    /// The layer, if its norms are norms and its factors are finite where weights are computed.
    pub(super) fn checked(&self, layer: StoredLayer) -> Result<StoredLayer> {
        if let (Some(norms), Some(value)) = (&layer.norms, &layer.value) {
            let least = norms.min(0)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            if least < 0. {
                return self.refuse(format!("its `initial_norm` holds {least}"));
            }
            let (norms, value) = (norms.elem_count(), value.elem_count());
            if norms != value {
                return self.refuse(format!(
                    "its `initial_norm` has {norms} elements, its `dora_scale` {value}"
                ));
            }
        }
        if let Some(factor) = layer.ratio(None, DType::F32)?
            && let Some((index, found)) = not_finite(&factor)?
        {
            return self.refuse(format!("its factor is {found} at index {index}"));
        }
        Ok(layer)
    }

    pub(super) fn refuse<T>(&self, reason: impl AsRef<str>) -> Result<T> {
        let (module, reason) = (shown(self.module), reason.as_ref());
        refused(self.tensors.file(), format!("layer `{module}`: {reason}"))
    }
}

/// `b` from `n = b (b - 1) / 2`, where it is whole.
fn block_size(columns: usize) -> Option<usize> {
    let root = (1. + 8. * columns as f64).sqrt();
    let b = ((1. + root) / 2.).round() as usize;
    (b.checked_mul(b.checked_sub(1)?)? == columns.checked_mul(2)?).then_some(b)
}
