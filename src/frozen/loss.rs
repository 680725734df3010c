//! Cross entropy that keeps its logits and nothing of their size beside, and over a head whose logits
//! never exist together.

use super::{FLOATS, Frozen, Linear, check_float};
use crate::error::Error;
use crate::ops;
use candle_core::{DType, Result, Tensor};

/// The mean cross entropy of logits, as [`candle_nn::loss::cross_entropy`].
///
/// ```text
/// loss = mean_t (ln sum_j exp(z_tj) - z_t,target),   dz = (softmax(z) - onehot) / T
/// ```
///
/// Kept for the backward pass are the logits and two numbers for each row.
///
/// # Shapes
///
/// `logits` is `(T, V)`, `targets` is `(T)` of u8, u32 or i64; the answer is a scalar.
///
/// # Errors
///
/// When the shapes do not fit, there are no rows, or a target is not below `V`.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::frozen::cross_entropy;
///
/// let logits = Tensor::new(&[[0f32, 0.], [0., 0.]], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &Tensor::new(&[0u32, 1], &Device::Cpu)?)?;
/// assert!((loss.to_scalar::<f32>()? - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    check_float("cross_entropy", logits, FLOATS)?;
    let &[rows, classes] = logits.dims() else {
        let found = format!("{:?}", logits.dims());
        let refused = Error::argument("cross_entropy", "the shape of the logits", found, "(T, V)");
        return Err(refused.into());
    };
    let targets = checked("cross_entropy", targets, rows, classes)?;
    ops::loss::cross_entropy(logits, targets)
}

/// The mean cross entropy of `hidden . W^T + bias`, where `W` is a frozen head, dense or quantized.
///
/// ```text
/// z = hidden . W^T + bias,   dhidden = dz . W,   dz = (softmax(z) - onehot) / T
/// ```
///
/// Logits exist for 128 rows at a time, each is computed once: where `hidden` needs a gradient, it is
/// made on the way forward, and kept in f32 or wider. With a vocabulary of 49,152 and 512 tokens that is
/// 25 MB instead of the logits' 100 and as much again for each step of a plain loss.
///
/// # Shapes
///
/// `hidden` is `(.., H)`, `targets` has its leading axes, in u8, u32 or i64; the answer is a scalar in
/// the dtype of `hidden`.
///
/// # Errors
///
/// When the shapes do not fit, there are no rows, or a target is not below the number of classes.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_doft::frozen::{Linear, linear_cross_entropy};
///
/// let head = Linear::new(Tensor::zeros((10, 4), DType::F32, &Device::Cpu)?, None);
/// let hidden = Var::ones((2, 3, 4), DType::F32, &Device::Cpu)?;
/// let targets = Tensor::zeros((2, 3), DType::U32, &Device::Cpu)?;
/// let loss = linear_cross_entropy(&hidden, &head, &targets)?;
/// assert!((loss.to_scalar::<f32>()? - 10f32.ln()).abs() < 1e-6);
/// assert!(loss.backward()?.get(&hidden).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear_cross_entropy(hidden: &Tensor, head: &Linear, targets: &Tensor) -> Result<Tensor> {
    const NAME: &str = "linear_cross_entropy";
    head.check_base("the head")?;
    let base = head.as_base();
    check_float(NAME, hidden, base.input_dtypes())?;
    let width = head.in_dim();
    if hidden.rank() < 2 || hidden.dims().last() != Some(&width) {
        Err(Error::argument(
            NAME,
            "the shape of `hidden`",
            format!("{:?}", hidden.dims()),
            format!("(.., {width}) of rank 2 or more"),
        ))?;
    }
    let rows = hidden.elem_count() / width;
    let targets = checked(NAME, targets, rows, head.out_dim())?;
    let hidden = hidden.reshape((rows, width))?;
    ops::loss::linear_cross_entropy(&hidden, base.weight, base.bias, targets)
}

/// The targets as u32, or why they cannot be.
fn checked(
    function: &'static str,
    targets: &Tensor,
    rows: usize,
    classes: usize,
) -> crate::Result<Vec<u32>> {
    let refuse = |what, found: String, expected: String| {
        Err(Error::argument(function, what, found, expected))
    };
    if targets.elem_count() != rows || rows == 0 {
        let found = format!("{:?}", targets.dims());
        let expected = format!("one for each of {rows} rows, and at least one row");
        return refuse("the shape of the targets", found, expected);
    }
    if !matches!(targets.dtype(), DType::U8 | DType::U32 | DType::I64) {
        let found = format!("{:?}", targets.dtype());
        return refuse("the dtype of the targets", found, "u8, u32 or i64".into());
    }
    let values = targets
        .flatten_all()?
        .to_dtype(DType::I64)?
        .to_vec1::<i64>()?;
    match values.iter().find(|id| !(0..classes as i64).contains(id)) {
        Some(id) => {
            let expected = format!("below {classes}, the classes");
            refuse("a target", id.to_string(), expected)
        }
        None => Ok(values.into_iter().map(|id| id as u32).collect()),
    }
}
