//! Eigenvalues and eigenvectors of a real symmetric matrix: Householder's reflections to tridiagonal
//! form, then implicit QL steps.
//!
//! # References
//!
//! Golub, Van Loan, "Matrix Computations", 4th edition, algorithms 8.3.1 to 8.3.3.

/// Steps for one eigenvalue; two or three suffice, and a NaN must not loop for ever.
const STEPS: usize = 60;

/// The eigenvalues of the row-major symmetric matrix, in no order.
pub(crate) fn eigenvalues(mut a: Vec<f64>, n: usize) -> Vec<f64> {
    let mut t = tridiagonalise(&mut a, n);
    diagonalise(&mut t.diagonal, &mut t.off_diagonal, None);
    t.diagonal
}

/// The eigenvalues, in no order, and the eigenvectors as the rows of a matrix, in the same order.
pub(crate) fn symmetric_eigen(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut t = tridiagonalise(&mut a, n);
    let mut rows = t.rows(n);
    diagonalise(&mut t.diagonal, &mut t.off_diagonal, Some((&mut rows, n)));
    (t.diagonal, rows)
}

struct Tridiagonal {
    diagonal: Vec<f64>,
    /// `n` numbers, the last of them 0.
    off_diagonal: Vec<f64>,
    /// `v` of each reflection `I - 2 v v^T`, for the entries from `k + 1` on.
    reflections: Vec<Vec<f64>>,
}

impl Tridiagonal {
    /// `P^T`, where `A = P T P^T`: the reflections multiplied together, last to first.
    fn rows(&self, n: usize) -> Vec<f64> {
        let mut z = vec![0.; n * n];
        z.iter_mut().step_by(n + 1).for_each(|v| *v = 1.);
        for (k, v) in self.reflections.iter().enumerate().rev() {
            // Only these rows and columns differ from the identity so far.
            for row in z.chunks_exact_mut(n).skip(k + 1) {
                let row = &mut row[k + 1..];
                let along = 2. * dot(row, v);
                row.iter_mut().zip(v).for_each(|(z, v)| *z -= along * v);
            }
        }
        z
    }
}

fn tridiagonalise(a: &mut [f64], n: usize) -> Tridiagonal {
    let mut reflections = Vec::new();
    let mut off_diagonal = vec![0.; n];
    for k in 0..n.saturating_sub(1) {
        // A symmetric matrix: the row is the column.
        let mut v = a[k * n + k + 1..(k + 1) * n].to_vec();
        let length = dot(&v, &v).sqrt();
        let alpha = if v[0] > 0. { -length } else { length };
        off_diagonal[k] = if v.len() > 1 { alpha } else { v[0] };
        if v.len() == 1 {
            break;
        }
        v[0] -= alpha;
        let size = dot(&v, &v).sqrt();
        if size > 0. {
            v.iter_mut().for_each(|v| *v /= size);
        }
        let rest = &mut a[(k + 1) * n..];
        let mut w: Vec<f64> = rest
            .chunks_exact(n)
            .map(|row| 2. * dot(&row[k + 1..], &v))
            .collect();
        let along = dot(&w, &v);
        w.iter_mut().zip(&v).for_each(|(w, v)| *w -= along * v);
        for (i, row) in rest.chunks_exact_mut(n).enumerate() {
            let (vi, wi) = (v[i], w[i]);
            for ((a, v), w) in row[k + 1..].iter_mut().zip(&v).zip(&w) {
                *a -= vi * w + wi * v;
            }
        }
        reflections.push(v);
    }
    Tridiagonal {
        diagonal: a.iter().copied().step_by(n + 1).collect(),
        off_diagonal,
        reflections,
    }
}

/// Implicit QL steps with Wilkinson's shift; `rows` rotate along, and end as eigenvectors.
fn diagonalise(d: &mut [f64], e: &mut [f64], mut rows: Option<(&mut [f64], usize)>) {
    let n = d.len();
    let norm = d.iter().chain(e.iter()).fold(0f64, |m, v| m.max(v.abs()));
    for first in 0..n {
        for _ in 0..STEPS {
            let small = |m: &usize| {
                let near = f64::EPSILON * (d[*m].abs() + d[m + 1].abs());
                // Zeros on the diagonal would otherwise ask for more than f64 holds.
                e[*m].abs() <= near.max(f64::EPSILON * 1e-2 * norm)
            };
            let last = (first..n - 1).find(small).unwrap_or(n - 1);
            if last == first {
                break;
            }
            step(d, e, first, last, &mut rows);
        }
    }
}

fn step(
    d: &mut [f64],
    e: &mut [f64],
    first: usize,
    last: usize,
    rows: &mut Option<(&mut [f64], usize)>,
) {
    let half = (d[first + 1] - d[first]) / (2. * e[first]);
    let root = half.hypot(1.).copysign(half);
    let mut g = d[last] - d[first] + e[first] / (half + root);
    let (mut sine, mut cosine, mut shift) = (1., 1., 0.);
    for i in (first..last).rev() {
        let f = sine * e[i];
        let h = cosine * e[i];
        let r = f.hypot(g);
        e[i + 1] = r;
        if r == 0. {
            // The matrix fell apart here; the next step sees two smaller ones.
            d[i + 1] -= shift;
            e[last] = 0.;
            return;
        }
        sine = f / r;
        cosine = g / r;
        g = d[i + 1] - shift;
        let t = (d[i] - g) * sine + 2. * cosine * h;
        shift = sine * t;
        d[i + 1] = g + shift;
        g = cosine * t - h;
        if let Some((rows, n)) = rows {
            givens(&mut rows[i * *n..(i + 2) * *n], *n, sine, cosine);
        }
    }
    d[first] -= shift;
    e[first] = g;
    e[last] = 0.;
}

fn givens(rows: &mut [f64], n: usize, sine: f64, cosine: f64) {
    let (upper, lower) = rows.split_at_mut(n);
    for (a, b) in upper.iter_mut().zip(lower) {
        (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn symmetric(n: usize, rank: usize) -> Vec<f64> {
        let mut rng = SplitMix64::new(n as u64);
        let mut a = vec![0.; n * n];
        for _ in 0..rank {
            let v: Vec<f64> = (0..n).map(|_| rng.normal()).collect();
            let sign = rng.normal().signum();
            for i in 0..n {
                for j in 0..n {
                    a[i * n + j] += sign * v[i] * v[j];
                }
            }
        }
        a
    }

    #[test]
    fn vectors_are_orthonormal_and_rebuild_the_matrix() {
        for (n, rank) in [
            (1, 1),
            (2, 2),
            (3, 1),
            (5, 5),
            (8, 2),
            (32, 32),
            (33, 4),
            (6, 0),
        ] {
            let a = symmetric(n, rank);
            let (values, rows) = symmetric_eigen(a.clone(), n);
            assert_eq!(eigenvalues(a.clone(), n), values);
            let size = values.iter().fold(1f64, |m, v| m.max(v.abs()));
            for i in 0..n {
                for j in 0..n {
                    let same = f64::from(u8::from(i == j));
                    let product = dot(&rows[i * n..(i + 1) * n], &rows[j * n..(j + 1) * n]);
                    assert!((product - same).abs() < 1e-13, "rows {i}, {j} of size {n}");
                    let sum: f64 = (0..n)
                        .map(|k| values[k] * rows[k * n + i] * rows[k * n + j])
                        .sum();
                    assert!(
                        (sum - a[i * n + j]).abs() < 1e-13 * size,
                        "entry {i}, {j} of size {n}"
                    );
                }
            }
        }
    }
}
