//! [`Weight`]: a frozen matrix that never enters a graph.

use candle_core::{DType, Tensor};

/// The frozen weight `(out, in)` of a product, captured inside an op. It shares its storage with the
/// tensor it was made from.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    dense: Tensor,
}

impl Weight {
    /// Freezes a matrix. One of another rank is refused when it is used.
    pub(crate) fn dense(weight: &Tensor) -> Self {
        Self {
            dense: weight.detach(),
        }
    }

    pub(crate) fn tensor(&self) -> &Tensor {
        &self.dense
    }

    pub(crate) fn out_dim(&self) -> usize {
        self.dense.dims().first().copied().unwrap_or(0)
    }

    pub(crate) fn in_dim(&self) -> usize {
        self.dense.dims().last().copied().unwrap_or(0)
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dense.dtype()
    }
}
