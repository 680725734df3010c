//! The composed twins: the same products out of candle's operations, for every dtype and device.

use super::Weight;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Result, Shape, Storage, Tensor,
};

/// `x . W^T + bias`, with a gradient to `x` alone.
pub(crate) fn frozen(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = product(x, weight)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.detach()),
        None => Ok(y),
    }
}

/// `ratio * (x . blockdiag(r) . W^T) + bias`.
pub(crate) fn doft(
    x: &Tensor,
    r: &Tensor,
    ratio: Option<&Tensor>,
    weight: &Weight,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let mut y = product(&rotate(x, r)?, weight)?;
    if let Some(ratio) = ratio {
        y = y.broadcast_mul(&ratio.to_dtype(y.dtype())?)?;
    }
    match bias {
        Some(bias) => y.broadcast_add(&bias.detach()),
        None => Ok(y),
    }
}

/// `x . blockdiag(r)` in the dtype of `x`.
pub(crate) fn rotate(x: &Tensor, r: &Tensor) -> Result<Tensor> {
    let (stored, b, _) = r.dims3()?;
    let width = x.dim(candle_core::D::Minus1)?;
    let rows = x.elem_count() / width.max(1);
    let blocks = width / b;
    let r = r.to_dtype(x.dtype())?;
    if rows == 0 {
        return Ok(x.clone());
    }
    if stored == 1 {
        return x
            .reshape((rows * blocks, b))?
            .matmul(&r.get(0)?)?
            .reshape(x.shape());
    }
    let by_block = x
        .reshape((rows, blocks, b))?
        .transpose(0, 1)?
        .contiguous()?;
    by_block
        .matmul(&r)?
        .transpose(0, 1)?
        .contiguous()?
        .reshape(x.shape())
}

fn product(x: &Tensor, weight: &Weight) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let rows = shape[..x.rank() - 1].iter().product::<usize>();
    if let Some(last) = shape.last_mut() {
        *last = weight.out_dim();
    }
    let flat = x.reshape((rows, weight.in_dim()))?.contiguous()?;
    flat.apply_op1(Product(weight.clone()))?.reshape(shape)
}

/// candle's own product on whatever backend the storage is, the weight outside the graph.
struct Product(Weight);

impl Product {
    fn run<S: BackendStorage>(&self, x: &S, l: &Layout, weight: &S) -> Result<(S, Shape)> {
        let (rows, width) = l.shape().dims2()?;
        let out = self.0.out_dim();
        let transposed = self.0.tensor().layout().transpose(0, 1)?;
        let y = x.matmul(weight, (1, rows, out, width), l, &transposed)?;
        Ok((y, Shape::from((rows, out))))
    }

    fn elsewhere<A>(&self) -> Result<A> {
        let message = "the input is on another device than the frozen weight".to_string();
        Err(candle_core::Error::Msg(message))
    }
}

impl CustomOp1 for Product {
    fn name(&self) -> &'static str {
        "frozen-product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        if l.shape().elem_count() == 0 {
            let shape = Shape::from((l.dims()[0], self.0.out_dim()));
            let empty = Tensor::zeros(&shape, x.dtype(), &candle_core::Device::Cpu)?;
            let (storage, layout) = empty.storage_and_layout();
            return match &*storage {
                Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, shape)),
                _ => self.elsewhere(),
            };
        }
        match &*self.0.tensor().storage_and_layout().0 {
            Storage::Cpu(weight) => self.run(x, l, weight),
            _ => self.elsewhere(),
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        match &*self.0.tensor().storage_and_layout().0 {
            Storage::Cuda(weight) => self.run(x, l, weight),
            _ => self.elsewhere(),
        }
    }

    fn metal_fwd(&self, x: &MetalStorage, l: &Layout) -> Result<(MetalStorage, Shape)> {
        match &*self.0.tensor().storage_and_layout().0 {
            Storage::Metal(weight) => self.run(x, l, weight),
            _ => self.elsewhere(),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.contiguous()?.matmul(self.0.tensor()).map(Some)
    }
}
