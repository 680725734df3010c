//! [`Base`]: what a frozen layer stands on, and what none can stand on.

use super::FLOATS;
use crate::error::{Error, Result};
use crate::ops::Weight;
use candle_core::{DType, Tensor};

/// What a frozen layer stands on.
pub struct Base<'a> {
    /// One row for each output.
    pub(crate) weight: &'a Weight,
    /// The shape of those rows in the layer.
    pub(crate) shape: &'a [usize],
    /// The axes that the shape has to have.
    pub(crate) rank: usize,
    pub(crate) bias: Option<&'a Tensor>,
}

/// A layer without an adapter.
pub trait Frozen {
    fn as_base(&self) -> Base<'_>;

    /// Refuses a weight, a bias or settings that the layer cannot run with. Constructors take them
    /// all, as candle's do; a kernel would add a bias of another length to a part of its outputs.
    fn check_base(&self, layer: &str) -> Result<()> {
        self.as_base().check(layer)
    }

    /// The layer's answer; `layer` is its name in errors.
    fn run(&self, layer: &str, x: &Tensor) -> candle_core::Result<Tensor>;
}

impl Base<'_> {
    /// The whole weight in the shape of the layer: shared when dense, expanded when quantized.
    pub(crate) fn tensor(&self) -> candle_core::Result<Tensor> {
        let rows = self.weight.tensor()?;
        match rows.dims() == self.shape {
            true => Ok(rows),
            false => rows.reshape(self.shape),
        }
    }

    /// Elements of weight and bias.
    pub(crate) fn elements(&self) -> usize {
        self.shape.iter().product::<usize>() + self.bias.map_or(0, Tensor::elem_count)
    }

    pub(super) fn check(&self, layer: &str) -> Result<()> {
        let Self {
            shape, rank, bias, ..
        } = *self;
        if shape.len() != rank || shape.contains(&0) {
            let expected = format!("{rank} axes, none of them empty");
            return Err(Error::shape(layer, "the weight", shape, expected));
        }
        let float = |what, dtype| match FLOATS.contains(&dtype) {
            true => Ok(()),
            false => Err(Error::dtype(layer, what, dtype, "f32, f64, f16 or bf16")),
        };
        float("the weight", self.weight.dtype())?;
        let Some(bias) = bias else {
            return Ok(());
        };
        if bias.dims() != [shape[0]] {
            let expected = format!("[{}], one for each output", shape[0]);
            return Err(Error::shape(layer, "the bias", bias.dims(), expected));
        }
        float("the bias", bias.dtype())
    }

    /// The dtypes of an input that the weight can be multiplied with.
    pub(crate) fn input_dtypes(&self) -> &'static [DType] {
        match (self.weight.qtensor(), self.weight.dtype()) {
            (Some(_), _) => &[DType::F32, DType::F16, DType::BF16],
            (None, DType::F16) => &[DType::F16, DType::F32],
            (None, DType::BF16) => &[DType::BF16, DType::F32],
            (None, DType::F64) => &[DType::F64],
            (None, _) => &[DType::F32],
        }
    }

    /// Refuses an input of a dtype that the weight cannot be multiplied with.
    pub(crate) fn check_dtype(&self, layer: &str, x: &Tensor) -> Result<()> {
        let dtypes = self.input_dtypes();
        if dtypes.contains(&x.dtype()) {
            return Ok(());
        }
        let expected = match dtypes {
            [one] => format!("{one:?}, the dtype of the weight"),
            some => format!("one of {some:?}, which its weight can be multiplied with"),
        };
        Err(Error::dtype(layer, "the input", x.dtype(), expected))
    }
}
