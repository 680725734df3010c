//! The composed twins: the same products out of candle's operations, for every dtype and device.

use super::Weight;
use super::conv::Geometry;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, MetalStorage, Result, Shape, Storage, Tensor,
};

/// The dtype that a twin computes in: f32 for half types.
pub(super) fn composed_in(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    }
}

/// `x . W^T + bias`, with a gradient to `x` alone.
pub(crate) fn frozen(x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    finish(product(x, weight)?, None, bias)
}

/// `ratio * (x . blockdiag(r) . W^T) + bias`.
pub(crate) fn doft(
    x: &Tensor,
    r: &Tensor,
    ratio: Option<&Tensor>,
    weight: &Weight,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    finish(product(&rotate(x, r)?, weight)?, ratio, bias)
}

/// The same by candle's quantized product, which rounds the rotated input: for inference alone.
pub(crate) fn decode(
    x: &Tensor,
    r: Option<&Tensor>,
    ratio: Option<&Tensor>,
    weight: &Weight,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let Some(quantized) = weight.decoder() else {
        return Err(candle_core::Error::Msg(
            "expected a quantized weight".into(),
        ));
    };
    let rotated = match r {
        Some(r) => rotate(x, r)?,
        None => x.clone(),
    };
    let wide = rotated.contiguous()?.to_dtype(DType::F32)?;
    let y = wide.apply_op1_no_bwd(quantized.as_ref())?;
    finish(y.to_dtype(x.dtype())?, ratio, bias)
}

// The magnitude of a half y acts in f32, so that only the result has to be in range.
fn finish(y: Tensor, ratio: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Tensor> {
    let dtype = y.dtype();
    let mut y = y;
    if let Some(ratio) = ratio {
        y = y.to_dtype(ratio.dtype())?.broadcast_mul(ratio)?;
    }
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.detach().to_dtype(y.dtype())?)?;
    }
    y.to_dtype(dtype)
}

/// `x . blockdiag(r)`, computed in the dtype of `r` and rounded to that of `x`.
pub(super) fn rotate(x: &Tensor, r: &Tensor) -> Result<Tensor> {
    if x.dtype() != r.dtype() {
        return rotate(&x.to_dtype(r.dtype())?, r)?.to_dtype(x.dtype());
    }
    let (stored, b, _) = r.dims3()?;
    let width = x.dim(candle_core::D::Minus1)?;
    let rows = x.elem_count() / width.max(1);
    let blocks = width / b;
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
        .matmul(r)?
        .transpose(0, 1)?
        .contiguous()?
        .reshape(x.shape())
}

/// Rows of a table, rotated, each times a ratio of its own.
pub(crate) fn embedding(rows: &Tensor, r: &Tensor, ratio: Option<&Tensor>) -> Result<Tensor> {
    let ratio = ratio.map(|ratio| ratio.unsqueeze(1)).transpose()?;
    finish(rotate(rows, r)?, ratio.as_ref(), None)
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

/// The convolution as a product with patches, which candle's operations gather and scatter.
pub(crate) fn conv(
    x: &Tensor,
    factors: Option<(&Tensor, Option<&Tensor>)>,
    weight: &Weight,
    bias: Option<&Tensor>,
    geometry: Geometry,
) -> Result<Tensor> {
    let (images, channels, height, width) = x.dims4()?;
    let Some((rows, columns)) = geometry.output(height, width) else {
        return Err(candle_core::Error::Msg(
            "a kernel larger than its input".into(),
        ));
    };
    let (g, taps) = (geometry, geometry.kernel.0 * geometry.kernel.1);
    let padded = x
        .pad_with_zeros(2, g.padding.0, g.padding.0)?
        .pad_with_zeros(3, g.padding.1, g.padding.1)?;
    let stride = width + 2 * g.padding.1;
    let mut places = Vec::with_capacity(taps * rows * columns);
    for (i, j) in (0..g.kernel.0).flat_map(|i| (0..g.kernel.1).map(move |j| (i, j))) {
        for (y, x) in (0..rows).flat_map(|y| (0..columns).map(move |x| (y, x))) {
            let y = y * g.stride.0 + i * g.dilation.0;
            places.push((y * stride + x * g.stride.1 + j * g.dilation.1) as u32);
        }
    }
    let places = Tensor::new(places, x.device())?;
    let patches = padded
        .contiguous()?
        .reshape((images * channels, ()))?
        .index_select(&places, 1)?
        .reshape((images, channels, taps, rows * columns))?
        .permute((0, 3, 1, 2))?
        .reshape((images * rows * columns, channels * taps))?;
    let (out, patch) = (weight.out_dim() / g.groups, weight.in_dim());
    let mut parts = Vec::with_capacity(g.groups);
    for group in 0..g.groups {
        let x = patches.narrow(1, group * patch, patch)?.contiguous()?;
        let of_group = |t: &Tensor| t.narrow(0, group * out, out);
        let weight = Weight::dense(&of_group(&weight.tensor()?)?.contiguous()?);
        let bias = bias.map(of_group).transpose()?;
        parts.push(match factors {
            None => frozen(&x, &weight, bias.as_ref())?,
            Some((r, ratio)) => {
                let ratio = ratio.map(of_group).transpose()?;
                doft(&x, r, ratio.as_ref(), &weight, bias.as_ref())?
            }
        });
    }
    Tensor::cat(&parts, 1)?
        .reshape((images, rows * columns, out * g.groups))?
        .transpose(1, 2)?
        .reshape((images, out * g.groups, rows, columns))
}

/// candle's own product on whatever backend the storage is, the weight outside the graph. A quantized
/// weight is expanded for as long as the product runs, as is one of another dtype than the input.
struct Product(Weight);

impl Product {
    fn weight(&self, dtype: DType) -> Result<Tensor> {
        match self.0.native(dtype) {
            Some(weight) => Ok(weight.clone()),
            None => self.0.tensor()?.to_dtype(dtype),
        }
    }

    fn run<S: BackendStorage>(
        &self,
        x: &S,
        l: &Layout,
        (weight, layout): (&S, &Layout),
    ) -> Result<(S, Shape)> {
        let (rows, width) = l.shape().dims2()?;
        let out = self.0.out_dim();
        let y = x.matmul(weight, (1, rows, out, width), l, &layout.transpose(0, 1)?)?;
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
        let weight = self.weight(x.dtype())?;
        let (storage, layout) = weight.storage_and_layout();
        match &*storage {
            Storage::Cpu(weight) => self.run(x, l, (weight, layout)),
            _ => self.elsewhere(),
        }
    }

    fn cuda_fwd(&self, x: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        let weight = self.weight(x.dtype())?;
        let (storage, layout) = weight.storage_and_layout();
        match &*storage {
            Storage::Cuda(weight) => self.run(x, l, (weight, layout)),
            _ => self.elsewhere(),
        }
    }

    fn metal_fwd(&self, x: &MetalStorage, l: &Layout) -> Result<(MetalStorage, Shape)> {
        let weight = self.weight(x.dtype())?;
        let (storage, layout) = weight.storage_and_layout();
        match &*storage {
            Storage::Metal(weight) => self.run(x, l, (weight, layout)),
            _ => self.elsewhere(),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.contiguous()?.matmul(&self.weight(dy.dtype())?).map(Some)
    }
}
