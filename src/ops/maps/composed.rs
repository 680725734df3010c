//! What the composed twins share: norms of skew blocks, and how much of them is read.

use candle_core::{D, DType, Device, Result, Tensor};

/// At least `||Q||^2` of each skew block, `(D, 1, 1)`: its singular values come in pairs.
pub(super) fn squared_norm(q: &Tensor) -> Result<Tensor> {
    let sum = q.detach().sqr()?.flatten_from(1)?.sum_keepdim(D::Minus1)?;
    sum.unsqueeze(2)? * 0.5
}

/// The largest norm of a skew block whose map is made without a look at it. Blocks above are NaN, not wrong.
pub(super) const LARGEST: f64 = 1000.;

/// How often a composed map repeats its step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Steps {
    /// As often as the values need, which are read. On CPU that costs nothing.
    Read,
    /// As often as a norm of [`LARGEST`] needs: a GPU would have to wait for the host.
    Fixed,
}

impl Steps {
    pub(super) fn on(device: &Device) -> Self {
        match device.is_cpu() {
            true => Self::Read,
            false => Self::Fixed,
        }
    }
}

/// `x`, one number a block, with NaN where the squared norm `g` is above that of [`LARGEST`].
pub(super) fn refused_above(x: &Tensor, g: &Tensor) -> Result<Tensor> {
    let nan = (x.zeros_like()? + f64::NAN)?;
    g.le(LARGEST * LARGEST)?.where_cond(x, &nan)
}

/// The values in f64. First to the host: Metal has no f64.
pub(crate) fn on_host(x: &Tensor) -> Result<Vec<f64>> {
    let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    x.flatten_all()?.to_vec1()
}
