//! Slow twins of the maps in f64 that can be checked by eye. They share no code with the kernels.
//!
//! Each takes packed rows `theta`, as many as there are, and answers row-major blocks.

#![allow(
    clippy::needless_range_loop,
    reason = "indices read as in the formulas"
)]

type Matrix = Vec<Vec<f64>>;

fn blocks(theta: &[f64], b: usize, f: impl Fn(&Matrix) -> Matrix) -> Vec<f64> {
    let rows = theta.chunks_exact((b * (b - 1) / 2).max(1));
    // A block of size 1 has no parameters: one block stands for it.
    let qs: Vec<Matrix> = match b {
        1 => vec![vec![vec![0.]]],
        _ => rows.map(|theta| skew_block(theta, b)).collect(),
    };
    qs.iter().flat_map(|q| f(q).concat()).collect()
}

fn skew_block(theta: &[f64], b: usize) -> Matrix {
    let mut q = zeros(b);
    let upper = (0..b).flat_map(|i| (i + 1..b).map(move |j| (i, j)));
    for ((i, j), v) in upper.zip(theta) {
        q[i][j] = *v;
        q[j][i] = -v;
    }
    q
}

/// `Q`.
pub fn skew(theta: &[f64], b: usize) -> Vec<f64> {
    blocks(theta, b, Clone::clone)
}

/// `(I + Q)(I - Q)^-1`: Gauss' elimination of `(I - Q) X = I + Q` and back substitution. The two
/// factors commute.
pub fn cayley(theta: &[f64], b: usize) -> Vec<f64> {
    blocks(theta, b, |q| {
        let mut m = sum(&identity(b), &scaled(q, -1.));
        let mut rhs = sum(&identity(b), q);
        for k in 0..b {
            for i in k + 1..b {
                let f = m[i][k] / m[k][k];
                for j in 0..b {
                    m[i][j] -= f * m[k][j];
                    rhs[i][j] -= f * rhs[k][j];
                }
            }
        }
        let mut x = zeros(b);
        for i in (0..b).rev() {
            for j in 0..b {
                let known: f64 = (i + 1..b).map(|k| m[i][k] * x[k][j]).sum();
                x[i][j] = (rhs[i][j] - known) / m[i][i];
            }
        }
        x
    })
}

/// The Cayley-Neumann series, power by power.
pub fn cayley_neumann(theta: &[f64], b: usize, terms: usize, last_coefficient: u8) -> Vec<f64> {
    blocks(theta, b, |q| {
        let terms = if terms == 3 && last_coefficient == 1 {
            4
        } else {
            terms
        };
        let mut r = identity(b);
        let mut power = identity(b);
        for k in 1..terms {
            power = product(&power, q);
            let last = k == terms - 1 && terms >= 4;
            let c = if last {
                f64::from(last_coefficient)
            } else {
                2.
            };
            r = sum(&r, &scaled(&power, c));
        }
        r
    })
}

/// `exp(Q)`: thirty terms of its series for `Q / 2^s`, squared `s` times.
pub fn exponential(theta: &[f64], b: usize) -> Vec<f64> {
    blocks(theta, b, |q| {
        let size: f64 = q.iter().flatten().map(|v| v * v).sum::<f64>().sqrt();
        let squarings = size.log2().ceil().max(0.) as i32;
        let q = scaled(q, 0.5f64.powi(squarings));
        let mut r = identity(b);
        let mut term = identity(b);
        for k in 1..=30 {
            term = scaled(&product(&term, &q), 1. / f64::from(k));
            r = sum(&r, &term);
        }
        for _ in 0..squarings {
            r = product(&r, &r);
        }
        r
    })
}

/// `Q min(1, max_norm / ||Q||)`.
pub fn clip(theta: &[f64], b: usize, max_norm: f64) -> Vec<f64> {
    blocks(theta, b, |q| {
        scaled(q, (max_norm / spectral_norm(q)).min(1.))
    })
}

/// `||Q||` by bisection: `s` is above it when `s^2 I - Q^T Q` has a Cholesky factor.
fn spectral_norm(q: &Matrix) -> f64 {
    let b = q.len();
    let squared = scaled(&product(q, q), -1.);
    let mut high: f64 = q.iter().flatten().map(|v| v * v).sum::<f64>().sqrt();
    let mut low = 0.;
    for _ in 0..54 {
        let middle: f64 = (low + high) / 2.;
        let shifted = sum(
            &scaled(&identity(b), middle * middle),
            &scaled(&squared, -1.),
        );
        if has_cholesky(shifted) {
            high = middle
        } else {
            low = middle
        }
    }
    high
}

fn has_cholesky(mut a: Matrix) -> bool {
    let b = a.len();
    for k in 0..b {
        if a[k][k] <= 0. {
            return false;
        }
        for i in k + 1..b {
            let f = a[i][k] / a[k][k];
            for j in k + 1..=i {
                a[i][j] -= f * a[j][k];
            }
        }
    }
    true
}

fn zeros(b: usize) -> Matrix {
    vec![vec![0.; b]; b]
}

fn identity(b: usize) -> Matrix {
    let mut m = zeros(b);
    for (i, row) in m.iter_mut().enumerate() {
        row[i] = 1.;
    }
    m
}

fn scaled(a: &Matrix, factor: f64) -> Matrix {
    a.iter()
        .map(|row| row.iter().map(|v| factor * v).collect())
        .collect()
}

fn sum(a: &Matrix, b: &Matrix) -> Matrix {
    let rows = a.iter().zip(b);
    rows.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect())
        .collect()
}

fn product(a: &Matrix, b: &Matrix) -> Matrix {
    let mut out = zeros(a.len());
    for i in 0..a.len() {
        for j in 0..a.len() {
            for k in 0..a.len() {
                out[i][j] += a[i][k] * b[k][j];
            }
        }
    }
    out
}
