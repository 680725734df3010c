//! Singular values and vectors of small square matrices: Hestenes' one-sided Jacobi rotations.
//!
//! # References
//!
//! Golub, Van Loan, "Matrix Computations", 4th edition, section 8.6.3.

/// Sweeps over all pairs of columns; some ten suffice, and a NaN must not loop for ever.
const SWEEPS: usize = 60;

/// `A = U diag(s) V^T`, `s` from the largest to the least.
pub(super) struct Svd {
    pub(super) values: Vec<f64>,
    /// The columns of `U`, one after the other: `n` numbers each. Those of values of 0 complete the basis.
    pub(super) u: Vec<f64>,
    /// The columns of `V`.
    pub(super) v: Vec<f64>,
}

impl Svd {
    /// How many values are above 0.
    pub(super) fn rank(&self) -> usize {
        self.values.iter().filter(|s| **s > 0.).count()
    }
}

/// Of a row-major matrix of size `n`. Values up to `tolerance` times the largest become 0.
pub(super) fn svd(a: &[f64], n: usize, tolerance: f64) -> Svd {
    // Squares of the entries neither underflow nor overflow.
    let scale = a.iter().fold(0f64, |most, v| most.max(v.abs()));
    let scale = if scale > 0. { scale } else { 1. };
    // Columns as rows, so that they lie together.
    let mut columns = vec![0.; n * n];
    let mut v = vec![0.; n * n];
    for i in 0..n {
        v[i * n + i] = 1.;
        for j in 0..n {
            columns[j * n + i] = a[i * n + j] / scale;
        }
    }
    for _ in 0..SWEEPS {
        let mut turned = false;
        for p in 0..n {
            for q in p + 1..n {
                turned |= make_orthogonal(&mut columns, &mut v, n, (p, q));
            }
        }
        if !turned {
            break;
        }
    }
    let norm = |j: usize| dot(&columns[j * n..][..n], &columns[j * n..][..n]).sqrt();
    let mut order: Vec<(f64, usize)> = (0..n).map(|j| (norm(j), j)).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    let values: Vec<f64> = order.iter().map(|(s, _)| *s).collect();
    let tiny = tolerance * values.first().copied().unwrap_or(0.);
    let rank = values.iter().filter(|s| **s > tiny).count();
    let mut u = Vec::with_capacity(n * n);
    for (s, j) in order.iter().take(rank) {
        u.extend(columns[j * n..][..n].iter().map(|x| x / s));
    }
    complete(&mut u, n);
    let values = values.iter().enumerate();
    let values = values.map(|(at, s)| if at < rank { s * scale } else { 0. });
    let v = order.iter().flat_map(|(_, j)| v[j * n..][..n].to_vec());
    Svd {
        v: v.collect(),
        values: values.collect(),
        u,
    }
}

/// Turns two columns in their plane until they are orthogonal; false where they are.
fn make_orthogonal(columns: &mut [f64], v: &mut [f64], n: usize, (p, q): (usize, usize)) -> bool {
    let (a, b) = pair(columns, n, p, q);
    let (alpha, beta, gamma) = (dot(a, a), dot(b, b), dot(a, b));
    if gamma.abs() <= f64::EPSILON * alpha.sqrt() * beta.sqrt() || !gamma.is_normal() {
        return false;
    }
    let zeta = (beta - alpha) / (2. * gamma);
    let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.));
    let cosine = 1. / tangent.hypot(1.);
    let sine = cosine * tangent;
    for rows in [columns, v] {
        let (a, b) = pair(rows, n, p, q);
        for (a, b) in a.iter_mut().zip(b) {
            (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
        }
    }
    true
}

fn pair(rows: &mut [f64], n: usize, p: usize, q: usize) -> (&mut [f64], &mut [f64]) {
    let (before, after) = rows.split_at_mut(q * n);
    (&mut before[p * n..][..n], &mut after[..n])
}

/// Adds orthonormal rows of length `n` until there are `n` of them.
fn complete(rows: &mut Vec<f64>, n: usize) {
    for axis in 0..n {
        if rows.len() == n * n {
            return;
        }
        let mut row = vec![0.; n];
        row[axis] = 1.;
        // Twice: once leaves what rounding brought in.
        for _ in 0..2 {
            for known in rows.chunks_exact(n) {
                let along = dot(known, &row);
                row.iter_mut().zip(known).for_each(|(r, k)| *r -= along * k);
            }
        }
        let left = dot(&row, &row).sqrt();
        // Of the axes that are left, one has at least this much outside the rows so far.
        if left > 0.5 / (n as f64).sqrt() {
            rows.extend(row.iter().map(|r| r / left));
        }
    }
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn of_rank(n: usize, rank: usize) -> Vec<f64> {
        let mut rng = SplitMix64::new((n * 100 + rank) as u64);
        let mut a = vec![0.; n * n];
        for _ in 0..rank {
            let mut normal = || -> Vec<f64> { (0..n).map(|_| rng.normal()).collect() };
            let (x, y) = (normal(), normal());
            for i in 0..n {
                for j in 0..n {
                    a[i * n + j] += x[i] * y[j];
                }
            }
        }
        a
    }

    #[test]
    fn factors_are_orthonormal_and_rebuild_the_matrix_at_any_rank_and_scale() {
        for (n, rank) in [
            (1, 1),
            (2, 2),
            (3, 1),
            (5, 4),
            (8, 0),
            (8, 8),
            (32, 31),
            (33, 5),
        ] {
            for scale in [1e-100, 1., 1e100] {
                let a: Vec<f64> = of_rank(n, rank).iter().map(|v| v * scale).collect();
                let found = svd(&a, n, 1e-13);
                assert_eq!(found.rank(), rank, "size {n}, scale {scale:e}");
                assert!(found.values.is_sorted_by(|a, b| a >= b));
                let size = found.values[0];
                for i in 0..n {
                    for j in 0..n {
                        let same = f64::from(u8::from(i == j));
                        for basis in [&found.u, &found.v] {
                            let product = dot(&basis[i * n..][..n], &basis[j * n..][..n]);
                            assert!((product - same).abs() < 1e-12, "{i}, {j} of size {n}");
                        }
                        let sum: f64 = (0..n)
                            .map(|k| found.u[k * n + i] * found.values[k] * found.v[k * n + j])
                            .sum();
                        let off = (sum - a[i * n + j]).abs();
                        assert!(off <= 1e-13 * size, "entry {i}, {j} of size {n}: {off:e}");
                    }
                }
            }
        }
    }
}
