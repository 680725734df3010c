//! [`Adapted`]: the one way of a kernel into candle's graph, with R and ratio or without.

use super::real::{Real, by_dtype, with_elements};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor,
};

/// What a backward pass found for x, R and the ratio.
pub(super) type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// A storage and how it is read.
pub(super) type Stored<'a> = (&'a CpuStorage, &'a Layout);

/// A frozen product whose input side is rotated by R and whose outputs are scaled by the ratio.
pub(super) trait Kernel: Send + Sync + 'static {
    /// Names of the op without R, with R, and with R and the ratio.
    const NAMES: [&'static str; 3];

    fn forward<T: Real>(
        &self,
        x: Stored,
        r: Option<Stored>,
        ratio: Option<Stored>,
    ) -> Result<(CpuStorage, Shape)>;

    fn backward<T: Real>(
        &self,
        inputs: (&Tensor, Option<&Tensor>, Option<&Tensor>),
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<Gradients>;
}

/// Runs a kernel on x, and on R and the ratio where there are any.
pub(super) fn apply<K: Kernel>(
    x: &Tensor,
    factors: Option<(&Tensor, Option<&Tensor>)>,
    kernel: K,
) -> Result<Tensor> {
    let op = Adapted(kernel);
    match factors {
        None => x.apply_op1(op),
        Some((r, None)) => x.apply_op2(&r.contiguous()?, op),
        Some((r, Some(ratio))) => x.apply_op3(&r.contiguous()?, &ratio.contiguous()?, op),
    }
}

/// The op. Its arguments are x, then R, then the ratio.
struct Adapted<K>(K);

impl<K: Kernel> CustomOp1 for Adapted<K> {
    fn name(&self) -> &'static str {
        K::NAMES[0]
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, forward((x, l), None, None), self.0)
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (dx, _, _) = by_dtype!(x, backward((x, None, None), y, dy), self.0)?;
        Ok(dx)
    }
}

impl<K: Kernel> CustomOp2 for Adapted<K> {
    fn name(&self) -> &'static str {
        K::NAMES[1]
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        r: &CpuStorage,
        rl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, forward((x, xl), Some((r, rl)), None), self.0)
    }

    fn bwd(
        &self,
        x: &Tensor,
        r: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dr, _) = by_dtype!(x, backward((x, Some(r), None), y, dy), self.0)?;
        Ok((dx, dr))
    }
}

impl<K: Kernel> CustomOp3 for Adapted<K> {
    fn name(&self) -> &'static str {
        K::NAMES[2]
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        r: &CpuStorage,
        rl: &Layout,
        ratio: &CpuStorage,
        sl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(
            x,
            forward((x, xl), Some((r, rl)), Some((ratio, sl))),
            self.0
        )
    }

    fn bwd(
        &self,
        x: &Tensor,
        r: &Tensor,
        ratio: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<Gradients> {
        by_dtype!(x, backward((x, Some(r), Some(ratio)), y, dy), self.0)
    }
}

/// The values of a bias in the dtype that is computed in. Kernels rest on one for each of `count`
/// outputs; the layers have told their user.
pub(super) fn bias_values<T: Real>(bias: Option<&Tensor>, count: usize) -> Result<Option<Vec<T>>> {
    let values = |bias: &Tensor| match bias.elem_count() == count {
        true => with_elements(bias, |bias| Ok(bias.to_vec())),
        false => Err(candle_core::Error::Msg("a bias that does not fit".into())),
    };
    bias.map(values).transpose()
}

/// Where a y of some dtype has lost too much of the product for the magnitude's gradient.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// How much larger than the product the bias may be: five bits of a y in f32 or f64, none of a
    /// half one.
    bias: f64,
    /// Below this root mean square most of `y - bias` is rounded as an f16 without leading bit. 0 where
    /// the range is that of f32 or more.
    pub(super) least: f64,
}

impl Limits {
    pub(super) fn of(y: DType) -> Self {
        let bias = match y {
            DType::F16 | DType::BF16 => 1.,
            _ => 32.,
        };
        let least = match y {
            DType::F16 => half::f16::MIN_POSITIVE.to_f64(),
            _ => 0.,
        };
        Self { bias, least }
    }
}

/// Ratios below this divide the rounding of y up too far.
const TINY: f64 = 1e-12;

/// One output of the magnitude's gradient from y: sums over `count` rows, and what they stand on.
pub(super) struct FromOutput {
    /// `sum dy (y - bias)`.
    pub(super) slope: f64,
    /// `sum (y - bias)^2`.
    pub(super) square: f64,
    pub(super) bias: f64,
    pub(super) ratio: f64,
    pub(super) count: usize,
    pub(super) limits: Limits,
}

impl FromOutput {
    /// `slope / ratio`, or 0 and that it is not to be trusted.
    pub(super) fn gradient<T: Real>(&self) -> (T, bool) {
        let Limits { bias, least } = self.limits;
        let all = |value: f64| value * value * self.count as f64;
        let lost = all(self.bias) > bias * bias * self.square
            || all(least) > self.square
            || self.ratio.abs() < TINY;
        let gradient = if lost { 0. } else { self.slope / self.ratio };
        (T::from_f64(gradient), lost)
    }
}
