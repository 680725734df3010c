//! [`recomputed`]: a part of a model whose activations are made again in the backward pass.

use crate::error::Error;
use crate::layer::{Log, recorded, replayed};
use crate::ops::graft;
use candle_core::{DType, Device, Result, Tensor, Var};
use std::collections::HashSet;

const NAME: &str = "recomputed";

/// Runs `block(x)` and keeps `x` and its output alone. The backward pass runs the block again to have its
/// activations: a second forward pass, paid for the memory of one block instead of all.
///
/// Gradients are those of `block(x)` without it: to `x`, and to every trainable tensor that the block uses, of any
/// number of adapters and layers of your own. The graph of the first run says which they are. Their values are
/// copied once per call, beside the output.
///
/// The second run is like the first: dropout of adapted layers draws the same masks, each layer runs under the adapter
/// and [`Mode`](crate::Mode) that it ran under, whatever scope or thread the backward pass is in, and blocks may be
/// nested. Layers that the block runs in threads that it starts are not seen: with dropout the backward pass returns an
/// error.
///
/// Without a graph, as in [`Mode::Eval`](crate::Mode::Eval) over a plain input, this is `block(x)`.
///
/// # Shapes
///
/// Those of the block.
///
/// # Errors
///
/// Those of the block; in the backward pass also [`Error::Argument`]:
///
/// * if the second run differs from the first: it ran other layers, used other trainable tensors, or returned another
///   output, as with random numbers of its own or an optimizer step in between;
/// * if no gradient reaches `x`, or one of the trainable tensors: some operation of the block cuts the graph.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::{Adapter, DoftConfig, train::recomputed};
/// use candle_nn::{Module, VarBuilder};
///
/// # let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
/// let builder = Adapter::builder(DoftConfig::default().with_dropout(0.1), &Device::Cpu)?;
/// let up = builder.linear(32, 64, vb.pp("up"))?;
/// let down = builder.linear(64, 32, vb.pp("down"))?;
/// let adapter = builder.finish()?;
///
/// let x = Tensor::ones((2, 32), DType::F32, &Device::Cpu)?;
/// // Clones of layers share their parameters; the block is kept for the backward pass.
/// let y = recomputed(&x, move |x| x + down.forward(&up.forward(x)?.tanh()?)?)?;
/// let grads = y.sqr()?.mean_all()?.backward()?;
/// assert!(adapter.check_gradients(&grads)?.missing.is_empty());
/// # Ok::<(), candle_doft::Error>(())
/// ```
///
/// # References
///
/// "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
pub fn recomputed<F>(x: &Tensor, block: F) -> Result<Tensor>
where
    F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    let (output, log) = recorded(|| block(&x.detach()));
    let output = output?;
    let used = variables(&output);
    let output = output.detach();
    if used.is_empty() && !x.track_op() {
        return Ok(output);
    }
    let others = joined(&used, x)?;
    let again = Again { block, log, used };
    let back = move |x: &Tensor, output: &Tensor, dy: &Tensor| again.gradients(x, output, dy);
    graft::grafted(x, &others, output, Box::new(back))
}

/// The trainable tensors that a value depends on, in an order that the graph sets.
fn variables(of: &Tensor) -> Vec<Tensor> {
    let nodes = of.sorted_nodes().into_iter();
    nodes.filter(|node| node.is_variable()).cloned().collect()
}

/// A dtype that holds the values of all exactly.
fn common_dtype(used: &[Tensor]) -> DType {
    let mut dtypes = used.iter().map(Tensor::dtype);
    let first = dtypes.next().unwrap_or(DType::F32);
    dtypes.fold(first, |common, dtype| match (common, dtype) {
        (common, dtype) if common == dtype => common,
        (DType::F64, _) | (_, DType::F64) => DType::F64,
        _ => DType::F32,
    })
}

/// All values in one row, beside `x`: the argument by which gradients go back to them.
fn joined(used: &[Tensor], x: &Tensor) -> Result<Tensor> {
    if used.is_empty() {
        return Tensor::zeros(1, DType::F32, x.device());
    }
    let dtype = common_dtype(used);
    let rows: Result<Vec<Tensor>> = used.iter().map(|one| row(one, dtype, x)).collect();
    Tensor::cat(&rows?, 0)
}

fn row(one: &Tensor, dtype: DType, x: &Tensor) -> Result<Tensor> {
    one.flatten_all()?.to_dtype(dtype)?.to_device(x.device())
}

fn differs<T>(what: &'static str, found: String, expected: &str) -> Result<T> {
    Err(Error::argument(NAME, what, found, expected).into())
}

/// The block, and what it takes to run it like the first time.
struct Again<F> {
    block: F,
    log: Log,
    used: Vec<Tensor>,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Again<F> {
    /// The gradients of `x`, where it has a graph, and of the trainable tensors in one row.
    fn gradients(
        &self,
        x: &Tensor,
        output: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let detached = x.detach();
        let input = match x.track_op() {
            true => Some(Var::from_tensor(&detached)?),
            false => None,
        };
        let x = input.as_ref().map_or(&detached, Var::as_tensor);
        let (y, same) = replayed(&self.log, || (self.block)(x));
        let y = y?;
        self.check(x, &y, output, same)?;
        let grads = graft::upstream(&y, dy)?.backward()?;
        let dx = match &input {
            None => None,
            Some(input) => match grads.get(input) {
                Some(dx) => Some(dx.clone()),
                None => {
                    let found = "without a gradient".to_string();
                    return differs("the input of the block", found, UNCUT);
                }
            },
        };
        if self.used.is_empty() {
            return Ok((dx, None));
        }
        let dtype = common_dtype(&self.used);
        let mut rows = Vec::with_capacity(self.used.len());
        for one in &self.used {
            let Some(grad) = grads.get(one) else {
                let found = format!("one of shape {:?} without a gradient", one.dims());
                return differs("a trainable tensor of the block", found, UNCUT);
            };
            rows.push(row(grad, dtype, x)?);
        }
        Ok((dx, Some(Tensor::cat(&rows, 0)?)))
    }

    /// Returns an error if the second run was not like the first.
    fn check(&self, x: &Tensor, y: &Tensor, output: &Tensor, same: bool) -> Result<()> {
        let first: HashSet<_> = self.used.iter().map(Tensor::id).collect();
        let again = variables(y).into_iter().map(|one| one.id());
        let again: HashSet<_> = again.filter(|id| *id != x.id()).collect();
        if !same || again != first {
            let found = match same {
                true => format!("with {} trainable tensors", again.len()),
                false => "of other layers, or in another order".to_string(),
            };
            let expected = format!(
                "the {} and the layers of the first run: a block may depend on its input alone",
                first.len()
            );
            return differs("the second run of the block", found, &expected);
        }
        let described = |of: &Tensor| format!("{:?} of {:?}", of.dims(), of.dtype());
        if y.dims() != output.dims() || y.dtype() != output.dtype() {
            return differs(
                "the second output of the block",
                described(y),
                &described(output),
            );
        }
        let (off, largest) = (largest(&(y.detach() - output.detach())?)?, largest(output)?);
        // Rounding may differ where sums are made in no fixed order; what was drawn anew is further off.
        if off > rounding(y.dtype()) * largest {
            let found = format!("off by {off:.1e} where the largest value is {largest:.1e}");
            let expected = "the first: no random numbers but the dropout of adapted layers, no step of an \
                            optimizer in between";
            return differs("the second output of the block", found, expected);
        }
        Ok(())
    }
}

const UNCUT: &str = "one: some operation of the block cuts the graph; use those of `frozen`, or detach outside of the block";

/// Half the digits of a dtype.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON.sqrt(),
        DType::F16 => 2f64.powi(-5),
        DType::BF16 => 2f64.powi(-4),
        _ => f64::from(f32::EPSILON).sqrt(),
    }
}

/// The largest absolute value; 0 of nothing.
fn largest(of: &Tensor) -> Result<f64> {
    if of.elem_count() == 0 {
        return Ok(0.);
    }
    let largest = of.detach().abs()?.flatten_all()?.max(0)?;
    // Metal has no f64.
    let largest = largest.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    largest.to_scalar()
}
