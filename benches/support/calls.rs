//! The two calls of a layer's op alone, forward and backward, on buffers that are warm.
//!
//! The op can be reached through candle's graph only. So the pass has no loss: [`Upstream`] answers a
//! number that costs nothing and hands a ready gradient back. What candle itself then does for each
//! pass (zeros, and a sum into them, for the gradients of y and of x) is the same without any op, is
//! timed beside it with [`Ready`] in the op's place, and taken off.

use super::{Layers, Run, Step, forward};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, Var};
use std::hint::black_box;

/// The gradient of whatever it is applied to.
struct Upstream(Tensor);

impl CustomOp1 for Upstream {
    fn name(&self) -> &'static str {
        "upstream"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// A whole step whose gradient comes from outside, as it does in the middle of a model.
pub fn pass(step: &Step) -> Result<()> {
    let Layers::Modules(layers) = &step.layers else {
        return step.run();
    };
    let y = forward(layers, &step.x)?;
    black_box(y.apply_op1(Upstream(step.upstream.clone()))?.backward()?);
    Ok(())
}

/// An op that does nothing: its y and its dx are there already.
struct Ready {
    y: Vec<f32>,
    shape: Shape,
    dx: Tensor,
}

impl CustomOp1 for Ready {
    fn name(&self) -> &'static str {
        "ready"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.y.clone()), self.shape.clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.dx.clone()))
    }
}

/// The pass through the op of a step, and what of it is candle's bookkeeping. The gradients of the
/// adapter's parameters, and of the map to R, stay in the first: a layer has no other way to its op.
pub fn calls(step: Step) -> Result<[Run; 2]> {
    let Layers::Modules(layers) = step.layers else {
        candle_core::bail!("`{}` is no op of a graph", step.method)
    };
    let (x, upstream) = (step.x, step.upstream);
    let y = forward(&layers, &x)?;
    let expected = gradient(&(&y * &upstream)?.sum_all()?, &x)?;
    let back = |y: &Tensor, dy: &Tensor| y.apply_op1(Upstream(dy.clone()));
    let dx = gradient(&back(&y, &upstream)?, &x)?;
    let off = (dx - &expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(off < 1e-4, "{}: dx is off by {off}", step.method);

    let like = Var::from_tensor(&x)?;
    let ready = Ready {
        y: y.flatten_all()?.to_vec1()?,
        shape: y.shape().clone(),
        dx: expected,
    };
    // Made once: the pass below has no forward that could be taken off too much.
    let ready = like.apply_op1(ready)?;
    let dy = upstream.clone();
    Ok([
        Box::new(move || {
            black_box(back(&forward(&layers, &x)?, &upstream)?.backward()?);
            Ok(())
        }),
        Box::new(move || {
            black_box(back(&ready, &dy)?.backward()?);
            Ok(())
        }),
    ])
}

fn gradient(y: &Tensor, x: &Var) -> Result<Tensor> {
    match y.backward()?.remove(x) {
        Some(dx) => Ok(dx),
        None => candle_core::bail!("no gradient of x"),
    }
}
