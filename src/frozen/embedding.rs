//! [`Embedding`]: a frozen table, dense or quantized, of which only the rows in use are read.

use super::QuantizedVarBuilder;
use crate::error::Error;
use crate::ops::{self, Weight};
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use std::sync::Arc;

/// A frozen embedding table.
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
    /// [`Error::Argument`] when the table is not a matrix.
    pub fn quantized(table: Arc<QTensor>) -> crate::Result<Self> {
        match table.shape().dims() {
            [rows, hidden] if rows * hidden > 0 => Ok(Self {
                table: Weight::quantized(table),
            }),
            dims => Err(Error::Argument {
                function: "Embedding::quantized",
                what: "the shape of the table",
                found: format!("{dims:?}"),
                expected: "(vocabulary, hidden), neither empty".into(),
            }),
        }
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

    pub(crate) fn dims(&self) -> &[usize] {
        self.table.dims()
    }

    pub(crate) fn frozen_weight(&self) -> &Weight {
        &self.table
    }

    /// The ids as u32 in one row, or why they cannot be looked up.
    pub(crate) fn check(&self, layer: &str, ids: &Tensor) -> crate::Result<Tensor> {
        if !matches!(ids.dtype(), DType::U8 | DType::U32 | DType::I64) {
            return Err(Error::DType {
                layer: layer.to_string(),
                what: "the tensor of ids",
                found: ids.dtype(),
                expected: "u8, u32 or i64".into(),
            });
        }
        let ids = ids.flatten_all()?;
        if matches!(ids.device(), Device::Cpu) && ids.elem_count() > 0 {
            let largest = ids.to_dtype(DType::I64)?.to_vec1::<i64>()?;
            let rows = 0..self.vocabulary() as i64;
            if let Some(id) = largest.into_iter().find(|id| !rows.contains(id)) {
                return Err(Error::Argument {
                    function: "Embedding::forward",
                    what: "an id",
                    found: format!("{id} in layer `{layer}`"),
                    expected: format!("below {}, the number of rows", rows.end),
                });
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

impl From<candle_nn::Embedding> for Embedding {
    fn from(layer: candle_nn::Embedding) -> Self {
        Self::new(layer.embeddings().clone())
    }
}

impl Module for Embedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let flat = self.check("the embedding", ids)?;
        ops::embedding::rows(&self.table, &flat)?.reshape(self.answer(ids))
    }
}
