//! The two calls of a layer's op alone, forward and backward, on buffers that are warm.
//!
//! The op can be reached through candle's graph only, whose own work (zeros for the gradients of y and
//! x, and sums into them) takes a tenth of a step. So the forward call is timed as it is, and the
//! backward one between two clocks in the graph: one that candle comes by right before the op, one on x.
//! What is left between them beside the op is the sum into dx and, for a layer has no other way to its
//! op, the map to R; [`bookkeeping`] and [`map`] time the same ones alone, to be taken off.

use super::{Layer, Layers, Step, Timed, forward, seeded};
use crate::support::methods::Tuned;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, Var,
};
use std::hint::black_box;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A loss that costs nothing: 0 for whatever y, whose gradient is given. Candle goes back through its
/// second argument before it does through y.
struct Given(Tensor);

impl CustomOp2 for Given {
    fn name(&self) -> &'static str {
        "given"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.]), Shape::from(())))
    }

    fn bwd(
        &self,
        _: &Tensor,
        second: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(self.0.clone()), Some(second.detach())))
    }
}

/// Notes when the backward pass comes by, and ends it there.
#[derive(Clone, Default)]
struct Clock(Arc<Mutex<Option<Instant>>>);

impl Clock {
    fn take(&self) -> Result<Instant> {
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match noted.take() {
            Some(instant) => Ok(instant),
            None => candle_core::bail!("the backward pass did not come by"),
        }
    }
}

impl CustomOp1 for Clock {
    fn name(&self) -> &'static str {
        "clock"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        // Made once for a whole comparison, of a contiguous tensor.
        Ok((x.clone(), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *noted = Some(Instant::now());
        Ok(None)
    }
}

/// A whole step whose gradient comes from outside, as it does in the middle of a model.
pub fn pass(step: &Step) -> Result<()> {
    let Layers::Modules(layers) = &step.layers else {
        return step.run();
    };
    let nothing = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    let y = forward(layers, &step.x)?;
    let loss = y.apply_op2(&nothing, Given(step.upstream.clone()))?;
    black_box(loss.backward()?);
    Ok(())
}

/// The seconds that the op of a step takes, and with it what [`bookkeeping`] and [`map`] take.
pub fn calls(step: Step) -> Result<Timed> {
    let Layers::Modules(layers) = step.layers else {
        candle_core::bail!("`{}` is no op of a graph", step.method)
    };
    let (before, after) = (Clock::default(), Clock::default());
    let nothing = Var::zeros((), DType::F32, &Device::Cpu)?.apply_op1(before.clone())?;
    let x = step.x.apply_op1(after.clone())?;
    Ok(Box::new(move || {
        let start = Instant::now();
        let y = forward(&layers, &x)?;
        let ahead = start.elapsed();
        let loss = y.apply_op2(&nothing, Given(step.upstream.clone()))?;
        let start = Instant::now();
        black_box(loss.backward()?);
        let (from, to) = (before.take()?, after.take()?);
        let back = to.duration_since(from);
        // Where candle went back another way, the op would lie before the first clock.
        assert!(from.duration_since(start) < back, "the clocks miss the op");
        Ok((ahead + back).as_secs_f64())
    }))
}

/// The seconds that candle takes to sum dx into zeros, right behind the product that makes it.
pub fn bookkeeping(products: Step) -> Result<Timed> {
    let Layers::Products(weights) = products.layers else {
        candle_core::bail!("`{}` is more than its products", products.method)
    };
    Ok(Box::new(move || {
        let mut dx = products.upstream.clone();
        for weight in weights.iter().rev() {
            dx = dx.matmul(weight)?;
        }
        let start = Instant::now();
        let sum = products.x.zeros_like()?.add(&dx)?;
        let seconds = start.elapsed().as_secs_f64();
        black_box(sum);
        Ok(seconds)
    }))
}

/// The seconds that the map from parameters to R takes, and the way back.
pub fn map(step: Step) -> Result<Timed> {
    let layer = match step.layers {
        Layers::Modules(mut layers) => layers.pop(),
        Layers::Products(_) => None,
    };
    let Some(Layer::Crate(Tuned::Adapted(layer))) = layer else {
        candle_core::bail!("`{}` has no rotation", step.method)
    };
    let dr = seeded(layer.rotation()?.shape().clone(), 5)?;
    let nothing = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    Ok(Box::new(move || {
        let start = Instant::now();
        let r = layer.rotation()?;
        let ahead = start.elapsed();
        let loss = r.apply_op2(&nothing, Given(dr.clone()))?;
        let start = Instant::now();
        black_box(loss.backward()?);
        Ok((ahead + start.elapsed()).as_secs_f64())
    }))
}
