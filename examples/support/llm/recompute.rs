//! A part of a model whose activations are made again in the backward pass instead of kept.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Storage, Tensor, Var, bail};
use std::sync::{Arc, Mutex};

/// A function of one tensor that can be run again.
pub type Part = Arc<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// `part(x)`, of which x and the answer are kept and nothing between. `vars` are the trainable tensors
/// that the part uses; it has to give the same answer twice, so it may hold no dropout.
///
/// candle's autograd knows no such thing. The answer enters the graph through an op of two inputs, x and
/// all of `vars` in one row; its backward pass runs the part again on a variable of x's values, runs a
/// backward pass of its own, and hands back both gradients.
pub fn recomputed(x: &Tensor, vars: &[Var], part: Part) -> Result<Tensor> {
    let y = part(&x.detach())?.detach();
    let flat: Vec<Tensor> = vars
        .iter()
        .map(|var| var.flatten_all())
        .collect::<Result<_>>()?;
    let flat = match flat.is_empty() {
        true => Tensor::zeros(1, x.dtype(), x.device())?,
        false => Tensor::cat(&flat, 0)?,
    };
    let op = Recomputed {
        part,
        vars: vars.to_vec(),
        answer: Mutex::new(Some(y)),
    };
    x.apply_op2(&flat, op)
}

struct Recomputed {
    part: Part,
    vars: Vec<Var>,
    /// The answer, until the forward pass has taken it.
    answer: Mutex<Option<Tensor>>,
}

impl CustomOp2 for Recomputed {
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
        let answer = self.answer.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(answer) = answer else {
            bail!("a recomputed part was run twice");
        };
        let answer = answer.contiguous()?;
        let (storage, layout) = answer.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => {
                use candle_core::backend::BackendStorage;
                Ok((
                    storage.to_dtype(layout, answer.dtype())?,
                    layout.shape().clone(),
                ))
            }
            _ => bail!("activations are recomputed on CPU only"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        flat: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let x = Var::from_tensor(&x.detach())?;
        let y = (self.part)(&x)?;
        let grads = (y * dy)?.sum_all()?.backward()?;
        let Some(dx) = grads.get(&x) else {
            bail!("no gradient passes through a recomputed part");
        };
        let mut flat_grads = Vec::with_capacity(self.vars.len());
        for var in &self.vars {
            match grads.get(var) {
                Some(grad) => flat_grads.push(grad.flatten_all()?),
                None => bail!("a trainable tensor of a recomputed part gets no gradient"),
            }
        }
        let dflat = match flat_grads.is_empty() {
            true => flat.zeros_like()?,
            false => Tensor::cat(&flat_grads, 0)?,
        };
        Ok((Some(dx.clone()), Some(dflat)))
    }
}
