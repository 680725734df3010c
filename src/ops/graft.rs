//! Values that were computed outside the graph enter it with a backward pass of their own, on any device.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, Layout, MetalStorage, Result, Shape, Storage,
    Tensor,
};
use std::sync::{Mutex, PoisonError};

/// A backward pass: of `x`, the answer and its gradient; returns the gradients of `x` and of `others`.
pub(crate) type Back =
    dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> + Send + Sync;

/// `answer`, which was computed from `x` and `others`, in the graph behind them.
pub(crate) fn grafted(
    x: &Tensor,
    others: &Tensor,
    answer: Tensor,
    back: Box<Back>,
) -> Result<Tensor> {
    let answer = Mutex::new(Some(answer));
    x.apply_op2(others, Graft { answer, back })
}

/// A scalar whose backward pass gives `y` the gradient `dy`.
pub(crate) fn upstream(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    y.apply_op1(Upstream(dy.clone()))
}

struct Graft {
    /// Until the forward pass has taken it, so that the graph keeps one copy.
    answer: Mutex<Option<Tensor>>,
    back: Box<Back>,
}

impl Graft {
    fn answer(&self) -> Result<Tensor> {
        // A panic elsewhere leaves the answer whole, so a poisoned lock is still good.
        let mut answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        match answer.take() {
            Some(answer) => Ok(answer),
            None => refused("an answer enters the graph once"),
        }
    }
}

/// An error without the backtrace that `bail!` may add.
fn refused<T>(why: &str) -> Result<T> {
    Err(candle_core::Error::Msg(format!("recomputed: {why}")))
}

/// The values of a tensor as a storage of its own.
fn copied<S>(storage: &S, layout: &Layout) -> Result<(S, Shape)>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let shape = layout.shape();
    let mut copy = storage.device().zeros_impl(shape, storage.dtype())?;
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok((copy, shape.clone()))
}

impl CustomOp2 for Graft {
    fn name(&self) -> &'static str {
        "recomputed"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let answer = self.answer()?;
        let (storage, layout) = answer.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => copied(storage, layout),
            _ => refused("the input is on CPU, the answer is not"),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let answer = self.answer()?;
        let (storage, layout) = answer.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => copied(storage, layout),
            _ => refused("the input is on CUDA, the answer is not"),
        }
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let answer = self.answer()?;
        let (storage, layout) = answer.storage_and_layout();
        match &*storage {
            Storage::Metal(storage) => copied(storage, layout),
            _ => refused("the input is on Metal, the answer is not"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        (self.back)(x, y, dy)
    }
}

struct Upstream(Tensor);

fn scalar<S>(storage: &S) -> Result<(S, Shape)>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let shape = Shape::from(());
    let zero = storage.device().zeros_impl(&shape, storage.dtype())?;
    Ok((zero, shape))
}

impl CustomOp1 for Upstream {
    fn name(&self) -> &'static str {
        "upstream"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        scalar(storage)
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        scalar(storage)
    }

    fn metal_fwd(&self, storage: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        scalar(storage)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
