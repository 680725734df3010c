//! What the composed twins share: norms of skew blocks.

use candle_core::{D, DType, Device, Result, Tensor};

/// At least `||Q||^2` of each skew block, `(D, 1, 1)`: its singular values come in pairs.
pub(super) fn squared_norm(q: &Tensor) -> Result<Tensor> {
    let sum = q.detach().sqr()?.flatten_from(1)?.sum_keepdim(D::Minus1)?;
    sum.unsqueeze(2)? * 0.5
}

/// The values in f64. First to the host: Metal has no f64.
pub(crate) fn on_host(x: &Tensor) -> Result<Vec<f64>> {
    let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    x.flatten_all()?.to_vec1()
}
