//! [`Conv2d`] and [`Conv1d`]: convolutions whose kernel never enters the graph.

use super::base::{Base, Frozen};
use crate::error::Error;
use crate::ops::conv::Geometry;
use crate::ops::{self, Weight};
use candle_core::{DType, Result, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, Module};

/// A kernel as a matrix of patches.
fn flat(weight: &Tensor) -> Weight {
    // Of another rank than 3 or 4 it is refused when the layer is adapted or run.
    match weight.flatten_from(1) {
        Ok(flat) if weight.rank() > 1 => Weight::dense(&flat),
        _ => Weight::dense(weight),
    }
}

// A kernel of another rank is refused before it is used.
fn axis(shape: &[usize], axis: usize) -> usize {
    shape.get(axis).copied().unwrap_or(1)
}

/// Refuses groups, strides and dilations that a convolution of `outputs` channels cannot have.
fn check_geometry(layer: &str, outputs: usize, geometry: &Geometry) -> crate::Result<()> {
    let Geometry {
        groups,
        stride,
        dilation,
        ..
    } = *geometry;
    if groups > 0 && outputs.is_multiple_of(groups) && stride.1 > 0 && dilation.1 > 0 {
        return Ok(());
    }
    Err(Error::argument(
        "convolution",
        "the configuration",
        format!(
            "{groups} groups, stride {} and dilation {} in layer `{layer}`",
            stride.1, dilation.1
        ),
        format!("a divisor of its {outputs} outputs, stride and dilation of at least 1"),
    ))
}

/// Refuses an input whose shape a convolution of that kernel cannot take.
fn check_input(
    layer: &str,
    x: &Tensor,
    kernel: &[usize],
    geometry: &Geometry,
) -> crate::Result<()> {
    let refuse = |expected: String| Err(Error::shape(layer, "the input", x.dims(), expected));
    let channels = kernel[1] * geometry.groups;
    let (height, width) = match (geometry.one_dimensional, x.dims()) {
        (true, &[_, found, width]) if found == channels => (1, width),
        (false, &[_, found, height, width]) if found == channels => (height, width),
        (true, _) => return refuse(format!("(N, {channels}, L)")),
        (false, _) => return refuse(format!("(N, {channels}, H, W)")),
    };
    if height * width == 0 {
        return refuse("no empty axis but the first".to_string());
    }
    let Geometry {
        stride,
        padding,
        dilation,
        ..
    } = *geometry;
    if geometry.output(height, width).is_none() {
        return refuse(format!(
            "room for a kernel of {:?} with dilation {dilation:?} and padding {padding:?}",
            geometry.kernel
        ));
    }
    match geometry.fits(&[x.dims()[0], channels, height, width], kernel[0]) {
        true => Ok(()),
        false => refuse(format!(
            "an answer that memory can hold, with stride {stride:?} and padding {padding:?}"
        )),
    }
}

/// A two-dimensional convolution of frozen kernel and bias.
///
/// ```text
/// y[o] = sum_c W[o, c] * x[c] + bias[o],    dx = the transposed convolution of dy with W
/// ```
///
/// The kernel lives inside the operation: only the input gets a gradient. On CPU forward and backward
/// are this crate's or candle's kernels, whichever is exact and whole: candle's backward fails on some
/// rectangles (stride 2, padding 1, a 3x3 kernel on 8x7) and runs groups one after the other.
///
/// # Shapes
///
/// `weight` is `(out, in/groups, kh, kw)`, `bias` is `(out)`; `x` is `(N, in, H, W)`, the answer
/// `(N, out, H', W')`. Stride, padding, dilation and groups are those of candle's configuration.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_doft::frozen::Conv2d;
/// use candle_nn::{Conv2dConfig, Module};
///
/// let weight = Tensor::randn(0f32, 1., (4, 2, 3, 3), &Device::Cpu)?;
/// let config = Conv2dConfig { stride: 2, padding: 1, ..Default::default() };
/// let x = Var::from_tensor(&Tensor::randn(0f32, 1., (1, 2, 8, 7), &Device::Cpu)?)?;
/// let y = Conv2d::new(weight, None, config).forward(&x)?;
/// assert_eq!(y.dims(), [1, 4, 4, 4]);
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Conv2d {
    shape: Vec<usize>,
    weight: Weight,
    bias: Option<Tensor>,
    config: Conv2dConfig,
}

impl Conv2d {
    pub(crate) fn geometry(&self) -> Geometry {
        let config = &self.config;
        Geometry {
            kernel: (axis(&self.shape, 2), axis(&self.shape, 3)),
            stride: (config.stride, config.stride),
            padding: (config.padding, config.padding),
            dilation: (config.dilation, config.dilation),
            one_dimensional: false,
            groups: config.groups,
        }
    }
}

/// A one-dimensional convolution of frozen kernel and bias, otherwise as [`Conv2d`]: only the input
/// gets a gradient.
///
/// # Shapes
///
/// `weight` is `(out, in/groups, k)`, `bias` is `(out)`; `x` is `(N, in, L)`, the answer `(N, out, L')`.
/// Stride, padding, dilation and groups are those of candle's configuration.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_doft::frozen::Conv1d;
/// use candle_nn::{Conv1dConfig, Module};
///
/// let weight = Tensor::randn(0f32, 1., (4, 2, 3), &Device::Cpu)?;
/// let config = Conv1dConfig { stride: 2, padding: 1, ..Default::default() };
/// let x = Var::from_tensor(&Tensor::randn(0f32, 1., (1, 2, 8), &Device::Cpu)?)?;
/// let y = Conv1d::new(weight, None, config).forward(&x)?;
/// assert_eq!(y.dims(), [1, 4, 4]);
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Conv1d {
    shape: Vec<usize>,
    weight: Weight,
    bias: Option<Tensor>,
    config: Conv1dConfig,
}

impl Conv1d {
    pub(crate) fn geometry(&self) -> Geometry {
        let config = &self.config;
        Geometry {
            kernel: (1, axis(&self.shape, 2)),
            stride: (1, config.stride),
            padding: (0, config.padding),
            dilation: (1, config.dilation),
            one_dimensional: true,
            groups: config.groups,
        }
    }
}

/// What both convolutions answer about their kernel, and how they run.
macro_rules! convolution {
    ($conv:ident, $config:ident, $rank:literal, $shape:literal) => {
        impl $conv {
            #[doc = concat!("Freezes a kernel `", $shape, "` and a bias `(out)`.")]
            pub fn new(weight: Tensor, bias: Option<Tensor>, config: $config) -> Self {
                Self {
                    shape: weight.dims().to_vec(),
                    weight: flat(&weight),
                    bias: bias.map(|bias| bias.detach()),
                    config,
                }
            }

            #[doc = concat!("The frozen kernel, `", $shape, "`.")]
            ///
            /// # Errors
            ///
            /// Those of candle's `reshape`.
            pub fn weight(&self) -> Result<Tensor> {
                self.as_base().tensor()
            }

            /// The frozen bias, `(out)`.
            pub fn bias(&self) -> Option<&Tensor> {
                self.bias.as_ref()
            }

            /// Stride, padding, dilation and groups.
            pub fn config(&self) -> &$config {
                &self.config
            }

            /// Shape of the kernel.
            pub fn dims(&self) -> &[usize] {
                &self.shape
            }

            /// Dtype of the kernel.
            pub fn dtype(&self) -> DType {
                self.weight.dtype()
            }

            /// Refuses an input that the layer cannot take, and a kernel or settings that it cannot
            /// run with.
            pub(crate) fn check(&self, layer: &str, x: &Tensor) -> crate::Result<()> {
                self.check_base(layer)?;
                check_input(layer, x, &self.shape, &self.geometry())?;
                self.as_base().check_dtype(layer, x)
            }
        }

        impl Frozen for $conv {
            fn as_base(&self) -> Base<'_> {
                Base {
                    weight: &self.weight,
                    shape: &self.shape,
                    rank: $rank,
                    bias: self.bias.as_ref(),
                }
            }

            fn run(&self, layer: &str, x: &Tensor) -> Result<Tensor> {
                self.check(layer, x)?;
                ops::conv::conv(x, None, &self.weight, self.bias.as_ref(), self.geometry())
            }

            fn check_base(&self, layer: &str) -> crate::Result<()> {
                self.as_base().check(layer)?;
                check_geometry(layer, self.shape[0], &self.geometry())
            }
        }

        impl From<candle_nn::$conv> for $conv {
            fn from(layer: candle_nn::$conv) -> Self {
                let (weight, bias) = (layer.weight().clone(), layer.bias().cloned());
                Self::new(weight, bias, *layer.config())
            }
        }

        impl Module for $conv {
            fn forward(&self, x: &Tensor) -> Result<Tensor> {
                self.run("the convolution", x)
            }
        }
    };
}

convolution!(Conv2d, Conv2dConfig, 4, "(out, in/groups, kh, kw)");
convolution!(Conv1d, Conv1dConfig, 3, "(out, in/groups, k)");
