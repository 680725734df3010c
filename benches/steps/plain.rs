//! The methods as one writes them today with plain candle operations.

use super::seeded;
use candle_core::{D, DType, Device, Result, Tensor, Var};

/// A layer of plain candle operations. The weight is an ordinary tensor.
pub enum Plain {
    Linear {
        weight: Tensor,
    },
    Lora {
        weight: Tensor,
        a: Var,
        b: Var,
    },
    Dora {
        weight: Tensor,
        a: Var,
        b: Var,
        m: Var,
    },
    Oft {
        weight: Tensor,
        theta: Var,
        index: Tensor,
        sign: Tensor,
        b: usize,
    },
}

impl Plain {
    /// None when the name is not that of a plain method.
    pub fn new(name: &str, weight: &Tensor, rank: usize, b: usize) -> Result<Option<Self>> {
        let weight = weight.clone();
        let (out, width) = weight.dims2()?;
        let low_rank = || -> Result<(Var, Var)> {
            let a = Var::from_tensor(&(seeded((rank, width), 4)? * 0.02)?)?;
            Ok((a, Var::zeros((out, rank), DType::F32, &Device::Cpu)?))
        };
        Ok(Some(match name {
            "candle_linear" => Self::Linear { weight },
            "candle_lora" => {
                let (a, b) = low_rank()?;
                Self::Lora { weight, a, b }
            }
            "candle_dora" => {
                let (a, b) = low_rank()?;
                let m = Var::from_tensor(&weight.sqr()?.sum(1)?.sqrt()?)?;
                Self::Dora { weight, a, b, m }
            }
            "candle_oft" => {
                let theta = Var::zeros((width / b, b * (b - 1) / 2), DType::F32, &Device::Cpu)?;
                let (index, sign) = triangle(b)?;
                Self::Oft {
                    weight,
                    theta,
                    index,
                    sign,
                    b,
                }
            }
            _ => return Ok(None),
        }))
    }

    pub fn vars(&self) -> Vec<Var> {
        match self {
            Self::Linear { .. } => Vec::new(),
            Self::Lora { a, b, .. } => vec![a.clone(), b.clone()],
            Self::Dora { a, b, m, .. } => vec![a.clone(), b.clone(), m.clone()],
            Self::Oft { theta, .. } => vec![theta.clone()],
        }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Linear { weight } => x.matmul(&weight.t()?),
            Self::Lora { weight, a, b } => {
                x.matmul(&weight.t()?)? + x.matmul(&a.t()?)?.matmul(&b.t()?)?
            }
            Self::Dora { weight, a, b, m } => {
                let v = (weight + b.matmul(a)?)?;
                let norm = v.detach().sqr()?.sum(1)?.sqrt()?;
                x.matmul(&v.t()?)?.broadcast_mul(&m.div(&norm)?)
            }
            Self::Oft {
                weight,
                theta,
                index,
                sign,
                b,
            } => {
                let (rows, width) = x.dims2()?;
                let blocks = width / b;
                let q = theta
                    .index_select(index, 1)?
                    .broadcast_mul(sign)?
                    .reshape((blocks, *b, *b))?;
                let r = series(&q)?;
                let x = x
                    .reshape((rows, blocks, *b))?
                    .transpose(0, 1)?
                    .contiguous()?;
                let x = x.matmul(&r)?.transpose(0, 1)?.contiguous()?;
                x.reshape((rows, width))?.matmul(&weight.t()?)
            }
        }
    }
}

/// `I + 2Q + 2Q^2 + 2Q^3 + Q^4`, for candle has no solve.
pub fn series(q: &Tensor) -> Result<Tensor> {
    let b = q.dim(D::Minus1)?;
    let eye = Tensor::eye(b, q.dtype(), q.device())?.unsqueeze(0)?;
    let q2 = q.matmul(q)?;
    let a = ((q * 2.)? + &q2)?.broadcast_add(&eye)?;
    &a + q2.matmul(&a)?
}

/// Place in a packed row and sign of every entry of a skew-symmetric block.
fn triangle(b: usize) -> Result<(Tensor, Tensor)> {
    let mut index = vec![0u32; b * b];
    let mut sign = vec![0f32; b * b];
    let upper = (0..b).flat_map(|i| (i + 1..b).map(move |j| (i, j)));
    for (k, (i, j)) in upper.enumerate() {
        (index[i * b + j], index[j * b + i]) = (k as u32, k as u32);
        (sign[i * b + j], sign[j * b + i]) = (1., -1.);
    }
    let sign = Tensor::from_vec(sign, (1, b * b), &Device::Cpu)?;
    Ok((Tensor::from_vec(index, b * b, &Device::Cpu)?, sign))
}
