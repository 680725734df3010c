//! Gradients of a loss against its slopes.

use super::tensors::{CPU, seeded, values};
use super::tolerance::{SLOPE, SLOPE_FLOOR};
use super::{assert_close, central_difference};
use candle_core::{Result, Tensor, Var};

/// Compares the gradient of `sum(f() * upstream)` with respect to each variable with its slope, for a
/// seeded upstream gradient.
pub fn check_slopes(
    what: &str,
    vars: &[(String, Var)],
    f: impl Fn() -> Result<Tensor>,
) -> Result<()> {
    let upstream = seeded(f()?.shape().clone(), 20);
    let grads = (f()? * &upstream)?.sum_all()?.backward()?;
    for (name, var) in vars {
        let start = values(var);
        let at = |v: &[f64]| {
            let set = |v: &[f64]| var.set(&Tensor::from_slice(v, var.shape(), &CPU).unwrap());
            set(v).unwrap();
            let loss = (f().unwrap() * &upstream).unwrap().sum_all().unwrap();
            set(&start).unwrap();
            loss.to_scalar::<f64>().unwrap()
        };
        let slope = central_difference(at, &start, 1e-5);
        let scale = slope.iter().fold(0f64, |a, v| a.max(v.abs()));
        let grad = grads
            .get(var)
            .unwrap_or_else(|| panic!("{what}: no gradient of {name}"));
        let what = format!("{what}: d{name}");
        assert_close(&what, grad, &slope, SLOPE_FLOOR * scale, SLOPE);
    }
    Ok(())
}
