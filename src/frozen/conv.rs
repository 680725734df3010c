//! [`Conv2d`] and [`Conv1d`]: convolutions whose kernel never enters the graph.

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

/// Refuses an input that a convolution cannot take.
pub(crate) fn check(
    layer: &str,
    x: &Tensor,
    kernel: &[usize],
    dtype: DType,
    geometry: &Geometry,
) -> crate::Result<()> {
    let refuse = |expected: String| {
        Err(Error::Shape {
            layer: layer.to_string(),
            what: "the input",
            found: x.dims().to_vec(),
            expected,
        })
    };
    let rank = if geometry.one_dimensional { 3 } else { 4 };
    let Geometry { groups, stride, .. } = *geometry;
    if kernel.len() != rank || kernel.contains(&0) {
        return Err(Error::Shape {
            layer: layer.to_string(),
            what: "the weight",
            found: kernel.to_vec(),
            expected: format!("{rank} axes, none of them empty"),
        });
    }
    if groups == 0 || !kernel[0].is_multiple_of(groups) || stride.1 == 0 {
        return Err(Error::Argument {
            function: "convolution",
            what: "the configuration",
            found: format!("{groups} groups and stride {} in layer `{layer}`", stride.1),
            expected: format!(
                "a divisor of its {} outputs, and a stride of at least 1",
                kernel[0]
            ),
        });
    }
    let channels = kernel[1] * groups;
    if x.rank() != kernel.len() || x.dims()[1] != channels {
        let axes = if geometry.one_dimensional {
            "L"
        } else {
            "H, W"
        };
        return refuse(format!("(N, {channels}, {axes})"));
    }
    let (height, width) = match x.dims() {
        &[_, _, height, width] => (height, width),
        dims => (1, dims[2]),
    };
    if geometry.output(height, width).is_none() {
        let (kernel, dilation) = (geometry.kernel, geometry.dilation);
        return refuse(format!(
            "room for a kernel of {kernel:?} with dilation {dilation:?} and padding {:?}",
            geometry.padding
        ));
    }
    let half = matches!(dtype, DType::F16 | DType::BF16) && x.dtype() == DType::F32;
    if x.dtype() != dtype && !half {
        return Err(Error::DType {
            layer: layer.to_string(),
            what: "the input",
            found: x.dtype(),
            expected: format!("{dtype:?}, the dtype of the weight"),
        });
    }
    Ok(())
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
    ($conv:ident, $config:ident, $shape:literal) => {
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
                self.weight.tensor()?.reshape(self.shape.as_slice())
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

            pub(crate) fn frozen_weight(&self) -> &Weight {
                &self.weight
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
                let geometry = self.geometry();
                check("the convolution", x, &self.shape, self.dtype(), &geometry)?;
                ops::conv::conv(x, None, &self.weight, self.bias.as_ref(), geometry)
            }
        }
    };
}

convolution!(Conv2d, Conv2dConfig, "(out, in/groups, kh, kw)");
convolution!(Conv1d, Conv1dConfig, "(out, in/groups, k)");
