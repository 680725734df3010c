//! [`Embedding`]: a frozen table, dense or quantized, of which only the rows in use are read.

use super::QuantizedVarBuilder;
use super::base::{Base, Frozen};
use crate::error::Error;
use crate::ops::{self, Weight};
use candle_core::quantized::QTensor;
use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use std::sync::Arc;

/// A frozen embedding table, `y = E[id]`, of which only the rows in use are read.
///
/// # Shapes
///
/// The table is `(vocabulary, hidden)`; ids of any shape `(..)` and of dtype u8, u32 or i64 give
/// `(.., hidden)`, in the dtype of a dense table and in f32 from a quantized one.
///
/// # Examples
///
/// ```
/// use candle_core::quantized::{GgmlDType, QTensor};
/// use candle_core::{Device, Tensor};
/// use candle_doft::frozen::Embedding;
/// use candle_nn::Module;
/// use std::sync::Arc;
///
/// let table = Tensor::ones((10, 32), candle_core::DType::F32, &Device::Cpu)?;
/// let table = Arc::new(QTensor::quantize(&table, GgmlDType::Q8_0)?);
/// let rows = Embedding::quantized(table)?.forward(&Tensor::new(&[[1u32, 9]], &Device::Cpu)?)?;
/// assert_eq!(rows.dims(), [1, 2, 32]);
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Embedding {
    table: Weight,
}

/// A frozen embedding, its table from `vb`, as [`candle_nn::embedding()`] names it.
///
/// # Errors
///
/// When `vb` lacks `weight` `(in_size, out_size)`.
pub fn embedding(in_size: usize, out_size: usize, vb: VarBuilder) -> Result<Embedding> {
    Ok(Embedding::new(vb.get((in_size, out_size), "weight")?))
}

/// A frozen embedding over quantized rows, its table from `vb`.
///
/// # Errors
///
/// When `vb` lacks `weight` `(in_size, out_size)`.
pub fn quantized_embedding(
    in_size: usize,
    out_size: usize,
    vb: QuantizedVarBuilder,
) -> Result<Embedding> {
    Ok(Embedding::quantized(
        vb.get((in_size, out_size), "weight")?,
    )?)
}

impl Embedding {
    /// Freezes a table `(vocabulary, hidden)`.
    pub fn new(table: Tensor) -> Self {
        Self {
            table: Weight::dense(&table),
        }
    }

    /// A table of quantized rows, which are shared and stay quantized.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] when the table is not a matrix.
    pub fn quantized(table: Arc<QTensor>) -> crate::Result<Self> {
        let layer = Self {
            table: Weight::quantized(table),
        };
        layer.check_base(UNNAMED)?;
        Ok(layer)
    }

    /// The table, `(vocabulary, hidden)`: shared when dense, expanded when quantized.
    ///
    /// # Errors
    ///
    /// Those of expanding a quantized table.
    pub fn embeddings(&self) -> Result<Tensor> {
        self.table.tensor()
    }

    /// The quantized table, if it is one.
    pub fn qtensor(&self) -> Option<&Arc<QTensor>> {
        self.table.qtensor()
    }

    /// Width of a row.
    pub fn hidden_size(&self) -> usize {
        self.table.in_dim()
    }

    /// Number of rows.
    pub fn vocabulary(&self) -> usize {
        self.table.out_dim()
    }

    /// Dtype of the answer.
    pub fn dtype(&self) -> DType {
        self.table.dtype()
    }

    /// The same table as the weight of a head, for models that tie the two.
    pub fn as_linear(&self) -> super::Linear {
        super::Linear::over(self.table.clone())
    }

    /// The ids as u32 in one row, or why they cannot be looked up.
    pub(crate) fn check(&self, layer: &str, ids: &Tensor) -> crate::Result<Tensor> {
        self.check_base(layer)?;
        if !matches!(ids.dtype(), DType::U8 | DType::U32 | DType::I64) {
            let expected = "u8, u32 or i64";
            return Err(Error::dtype(
                layer,
                "the tensor of ids",
                ids.dtype(),
                expected,
            ));
        }
        let ids = ids.flatten_all()?;
        // Elsewhere the values are not at hand.
        if ids.device().is_cpu() {
            let rows = 0..self.vocabulary() as i64;
            let wanted = ids.to_dtype(DType::I64)?.to_vec1::<i64>()?;
            if let Some(id) = wanted.into_iter().find(|id| !rows.contains(id)) {
                return Err(Error::argument(
                    "Embedding::forward",
                    "an id",
                    format!("{id} in layer `{layer}`"),
                    format!("below {}, the number of rows", rows.end),
                ));
            }
        }
        Ok(ids.to_dtype(DType::U32)?.contiguous()?)
    }

    /// The shape of the answer for ids of shape `ids`.
    pub(crate) fn answer(&self, ids: &Tensor) -> Vec<usize> {
        let mut shape = ids.dims().to_vec();
        shape.push(self.hidden_size());
        shape
    }
}

/// What errors call a layer that stands alone.
const UNNAMED: &str = "the embedding";

impl Frozen for Embedding {
    fn as_base(&self) -> Base<'_> {
        Base {
            weight: &self.table,
            shape: self.table.dims(),
            rank: 2,
            bias: None,
        }
    }

    fn run(&self, layer: &str, ids: &Tensor) -> Result<Tensor> {
        let flat = self.check(layer, ids)?;
        ops::embedding::rows(&self.table, &flat)?.reshape(self.answer(ids))
    }
}

impl From<candle_nn::Embedding> for Embedding {
    fn from(layer: candle_nn::Embedding) -> Self {
        Self::new(layer.embeddings().clone())
    }
}

impl Module for Embedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.run(UNNAMED, ids)
    }
}
