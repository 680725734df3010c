//! [`Planes`]: functions of skew blocks by their eigenplanes.

use crate::error::Result;
use crate::ops::maps::{eigen::symmetric_eigen, on_host};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// The eigenvectors of each block of a skew `Q`.
///
/// `H = -iQ` is Hermitian; on `(x, y)`, `z = x + iy`, it is the real symmetric `[[0, Q], [-Q, 0]]`, whose
/// `2b` eigenvectors show each `z` twice. A function `f` of `H` that is odd gives the real skew
/// `i f(H) = sum_k f(l_k) x_k y_k^T`.
pub(crate) struct Planes {
    b: usize,
    blocks: Vec<Block>,
}

/// Eigenvalues and eigenvectors; none where an entry is not finite.
struct Block(Option<(Vec<f64>, Vec<f64>)>);

impl Planes {
    /// Of blocks `(D, b, b)`, each with `Q^T = -Q`.
    pub(crate) fn of(q: &Tensor) -> Result<Self> {
        let b = q.dim(1)?;
        let q = on_host(q)?;
        let blocks = q.par_chunks_exact(b * b).map(|q| Block::of(q, b)).collect();
        Ok(Self { b, blocks })
    }

    /// The sizes `l` of all eigenvalues `±il`, each several times.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = f64> {
        let known = self.blocks.iter().filter_map(|block| block.0.as_ref());
        known.flat_map(|(values, _)| values.iter().map(|l| l.abs()))
    }

    /// The largest `l`; 0 without blocks.
    pub(crate) fn widest(&self) -> f64 {
        self.sizes().fold(0., f64::max)
    }

    /// The skew `i f(H)`, for an odd `f`: `Q` itself for `f(l) = l`. `(D, b, b)`, f64, on the host.
    pub(crate) fn odd(&self, f: impl Fn(f64) -> f64 + Send + Sync) -> Result<Tensor> {
        let b = self.b;
        self.blocks(|block| {
            let sum = block.sum(b, |l, _, y| f(l) * y);
            (0..b * b)
                .map(|at| (sum[at] - sum[at % b * b + at / b]) / 2.)
                .collect()
        })
    }

    /// The rotation `exp(i φ(H))`, for an odd `φ`: every plane turns by `φ(l)`.
    pub(crate) fn turned(&self, phi: impl Fn(f64) -> f64 + Send + Sync) -> Result<Tensor> {
        self.blocks(|block| {
            block.sum(self.b, |l, x, y| {
                let (sine, cosine) = phi(l).sin_cos();
                cosine * x + sine * y
            })
        })
    }

    fn blocks(&self, of_block: impl Fn(&Block) -> Vec<f64> + Send + Sync) -> Result<Tensor> {
        let all: Vec<f64> = self.blocks.par_iter().flat_map_iter(of_block).collect();
        let shape = (self.blocks.len(), self.b, self.b);
        Ok(Tensor::from_vec(all, shape, &Device::Cpu)?)
    }
}

impl Block {
    fn of(q: &[f64], b: usize) -> Self {
        if !q.iter().all(|v| v.is_finite()) {
            return Self(None);
        }
        let mut h = vec![0.; 4 * b * b];
        for i in 0..b {
            for j in 0..b {
                h[i * 2 * b + b + j] = q[i * b + j];
                h[(b + i) * 2 * b + j] = 0. - q[i * b + j];
            }
        }
        Self(Some(symmetric_eigen(h, 2 * b)))
    }

    /// `sum_k x_k w(l_k, x_k, y_k)^T`; NaN where the block is not finite.
    fn sum(&self, b: usize, w: impl Fn(f64, f64, f64) -> f64) -> Vec<f64> {
        let Some((values, vectors)) = &self.0 else {
            return vec![f64::NAN; b * b];
        };
        let mut sum = vec![0.; b * b];
        for (l, z) in values.iter().zip(vectors.chunks_exact(2 * b)) {
            let (x, y) = z.split_at(b);
            let row: Vec<f64> = x.iter().zip(y).map(|(x, y)| w(*l, *x, *y)).collect();
            for (x, r) in x.iter().zip(sum.chunks_exact_mut(b)) {
                r.iter_mut().zip(&row).for_each(|(r, v)| *r += x * v);
            }
        }
        sum
    }
}
