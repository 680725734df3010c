//! The rotation that turns one set of rows into another as well as a rotation can.

use super::svd::{dot, svd};
use crate::error::Result;
use crate::ops::maps::on_host;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// For each block `A` of `(D, b, b)` the rotation `X`, `det X = 1`, with the largest `<X, A>`.
///
/// With `A = U S V^T` that is `U V^T`, with the sign of the last pair changed where it would mirror.
/// Singular values up to `tolerance` times the largest leave `X` free between their vectors: of those
/// rotations the one that turns least, that is of the largest trace.
pub(crate) fn nearest_rotation(a: &Tensor, tolerance: f64) -> Result<Tensor> {
    let b = a.dim(1)?;
    let blocks = on_host(a)?;
    let all: Vec<f64> = blocks
        .par_chunks_exact(b * b)
        .flat_map_iter(|a| nearest(a, b, tolerance))
        .collect();
    Ok(Tensor::from_vec(all, a.shape(), &Device::Cpu)?)
}

fn nearest(a: &[f64], b: usize, tolerance: f64) -> Vec<f64> {
    if !a.iter().all(|v| v.is_finite()) {
        return vec![f64::NAN; b * b];
    }
    let found = svd(a, b, tolerance);
    let (rank, free) = (found.rank(), b - found.rank());
    let (mut u, v) = (found.u, found.v);
    let sign = sign(&u, b) * sign(&v, b);
    if free == 0 {
        if sign < 0. {
            negate(&mut u[(b - 1) * b..]);
        }
        return outer(&u, &v, b);
    }
    // Between the free vectors: `Z` of that determinant with the largest trace of `U_0 Z V_0^T`.
    let (u0, v0) = (&u[rank * b..], &v[rank * b..]);
    let among: Vec<f64> = u0
        .chunks_exact(b)
        .flat_map(|u| v0.chunks_exact(b).map(|v| dot(u, v)))
        .collect();
    let within = svd(&among, free, tolerance);
    let mut left = within.u;
    if sign * self::sign(&left, free) * self::sign(&within.v, free) < 0. {
        negate(&mut left[(free - 1) * free..]);
    }
    let z = outer(&left, &within.v, free);
    // The columns of `U_0 Z`.
    let mut turned = vec![0.; free * b];
    for (k, column) in turned.chunks_exact_mut(b).enumerate() {
        for (i, u) in u0.chunks_exact(b).enumerate() {
            let factor = z[i * free + k];
            column.iter_mut().zip(u).for_each(|(c, u)| *c += factor * u);
        }
    }
    u[rank * b..].copy_from_slice(&turned);
    outer(&u, &v, b)
}

fn negate(values: &mut [f64]) {
    values.iter_mut().for_each(|v| *v = -*v);
}

/// `sum_k u_k v_k^T` of vectors that lie one after the other.
fn outer(u: &[f64], v: &[f64], n: usize) -> Vec<f64> {
    let mut sum = vec![0.; n * n];
    for (u, v) in u.chunks_exact(n).zip(v.chunks_exact(n)) {
        for (u, row) in u.iter().zip(sum.chunks_exact_mut(n)) {
            row.iter_mut().zip(v).for_each(|(r, v)| *r += u * v);
        }
    }
    sum
}

/// The sign of the determinant, by elimination.
fn sign(a: &[f64], n: usize) -> f64 {
    let mut a = a.to_vec();
    let mut sign = 1.;
    for k in 0..n {
        let size = |i: &usize| a[i * n + k].abs();
        let pivot = (k + 1..n).fold(k, |best, i| if size(&i) > size(&best) { i } else { best });
        if pivot != k {
            sign = -sign;
            for j in k..n {
                a.swap(k * n + j, pivot * n + j);
            }
        }
        sign *= a[k * n + k].signum();
        for i in k + 1..n {
            let factor = a[i * n + k] / a[k * n + k];
            for j in k..n {
                a[i * n + j] -= factor * a[k * n + j];
            }
        }
    }
    sign
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn random(n: usize, seed: u64) -> Vec<f64> {
        let mut rng = SplitMix64::new(seed);
        (0..n * n).map(|_| rng.normal()).collect()
    }

    fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
        let entry = |i: usize, j: usize| (0..n).map(|k| a[i * n + k] * b[k * n + j]).sum();
        (0..n * n).map(|at| entry(at / n, at % n)).collect()
    }

    fn trace(a: &[f64], n: usize) -> f64 {
        a.iter().step_by(n + 1).sum()
    }

    #[test]
    fn it_is_a_rotation_and_no_other_fits_better() {
        for n in [1, 2, 3, 8, 17] {
            for seed in 0..8 {
                let a = random(n, seed);
                let x = nearest(&a, n, 1e-13);
                assert_eq!(sign(&x, n), 1., "size {n}");
                let off = |i: usize, j: usize| {
                    (dot(&x[i * n..][..n], &x[j * n..][..n]) - f64::from(u8::from(i == j))).abs()
                };
                assert!((0..n * n).all(|at| off(at / n, at % n) < 1e-13));
                let best = dot(&x, &a);
                for other in 0..20 {
                    let other = nearest(&random(n, 100 + other), n, 1e-13);
                    assert!(dot(&other, &a) <= best + 1e-12);
                }
            }
        }
    }

    #[test]
    fn where_a_block_is_free_it_turns_least() {
        // A quarter turn of the first plane is asked for, nothing of the other three axes.
        let n = 5;
        let mut a = vec![0.; n * n];
        (a[1], a[n]) = (2., -3.);
        let x = nearest(&a, n, 1e-13);
        let mut expected = vec![0.; n * n];
        (expected[1], expected[n]) = (1., -1.);
        for axis in 2..n {
            expected[axis * n + axis] = 1.;
        }
        assert!(
            x.iter().zip(&expected).all(|(x, e)| (x - e).abs() < 1e-14),
            "{x:?}"
        );
        // One row alone: of all rotations that fit it, none has a larger trace.
        let u = random(n, 1)[..n].to_vec();
        let v = random(n, 2)[..n].to_vec();
        let a: Vec<f64> = u
            .iter()
            .flat_map(|u| v.iter().map(move |v| u * v))
            .collect();
        let x = nearest(&a, n, 1e-13);
        for seed in 0..50 {
            // Turns around the row that is fixed fit it as well.
            let mut project = vec![0.; n * n];
            for (i, j) in (0..n * n).map(|at| (at / n, at % n)) {
                let along = v[i] * v[j] / dot(&v, &v);
                project[i * n + j] = f64::from(u8::from(i == j)) - along;
            }
            let m = product(&project, &random(n, 10 + seed), n);
            let mut around = product(&m, &project, n);
            for (at, entry) in around.iter_mut().enumerate() {
                *entry += 10. * v[at / n] * v[at % n];
            }
            let other = product(&x, &nearest(&around, n, 1e-13), n);
            assert!(dot(&other, &a) > dot(&x, &a) - 1e-9);
            assert!(trace(&other, n) <= trace(&x, n) + 1e-9);
        }
        // Nothing is asked for at all.
        let x = nearest(&[0.; 9], 3, 1e-13);
        assert_eq!(x, [1., 0., 0., 0., 1., 0., 0., 0., 1.]);
    }
}
