//! [`GradientReport`]: which adapter parameters a backward pass reached.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Var};
use std::fmt;

/// Which adapter parameters got no gradient, a zero one, or one that is not finite. Made by
/// [`Adapter::check_gradients`](crate::Adapter::check_gradients), which has an example.
///
/// # What it can tell
///
/// * *missing*: the backward pass never reached the parameter. Certain: something between it and the
///   loss cut the graph, or the layer was not run.
/// * *not finite*: an overflow or a division by zero upstream. Certain.
/// * *zero*: the graph is whole, for the parameter was reached, but nothing came through. That may
///   be right: by symmetry at the start (a magnitude in front of a normalisation of the same
///   values, a rotation of which no entry matters yet), behind a dead row, behind a `relu` that is
///   shut, or for a loss that ignores the layer. Look again after a step or two.
///
/// # What it cannot tell
///
/// Whether a gradient that is there is right, or whether one of two paths to a parameter was cut. A
/// sum of outputs as a loss is a poor probe: through a softmax or a normalisation its gradient is
/// zero although nothing is wrong. Use the loss that is trained.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GradientReport {
    /// Number of parameters looked at.
    pub checked: usize,
    /// Parameters that the backward pass did not reach.
    pub missing: Vec<String>,
    /// Parameters whose gradient is zero everywhere.
    pub zero: Vec<String>,
    /// Parameters whose gradient holds a NaN or an infinity.
    pub non_finite: Vec<String>,
}

impl GradientReport {
    pub(crate) fn new(vars: &[(String, Var)], grads: &GradStore) -> Result<Self> {
        let mut report = Self {
            checked: vars.len(),
            ..Self::default()
        };
        for (name, var) in vars {
            let Some(grad) = grads.get(var) else {
                report.missing.push(name.clone());
                continue;
            };
            // On the host, for Metal has no f64. The largest entry would hide a NaN: comparisons with
            // it are false.
            let grad = grad.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            let sum = grad.abs()?.sum_all()?.to_scalar::<f64>()?;
            if !sum.is_finite() {
                report.non_finite.push(name.clone());
            } else if sum == 0. && grad.elem_count() > 0 {
                report.zero.push(name.clone());
            }
        }
        Ok(report)
    }

    /// Whether every parameter got a finite gradient, zero or not.
    pub fn is_sound(&self) -> bool {
        self.missing.is_empty() && self.non_finite.is_empty()
    }
}

impl fmt::Display for GradientReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = |names: &[String]| -> String {
            let more = match names.len() {
                0..=5 => String::new(),
                n => format!(" and {} more", n - 5),
            };
            let shown = &names[..names.len().min(5)];
            format!("`{}`{more}", shown.join("`, `"))
        };
        let mut parts = Vec::new();
        if !self.missing.is_empty() {
            parts.push(format!(
                "no gradient reached {}: the graph is cut behind them (candle_nn's LayerNorm, \
                 RmsNorm, softmax_last_dim and rope have no backward on contiguous input, a \
                 quantized matmul has none at all; `frozen` has ones that do), `detach` was \
                 used, the adapter was in `Mode::Eval` or `Mode::Off`, or the layer was not run",
                found(&self.missing)
            ));
        }
        if !self.non_finite.is_empty() {
            parts.push(format!(
                "the gradient of {} is not finite: look for an overflow, a logarithm of 0 or a \
                 division by 0 in the loss, or lower the learning rate",
                found(&self.non_finite)
            ));
        }
        if !self.zero.is_empty() {
            parts.push(format!(
                "the gradient of {} is zero: by symmetry at the start, or because the loss does \
                 not depend on the layer; look again after a step",
                found(&self.zero)
            ));
        }
        match parts.is_empty() {
            true => write!(f, "all {} adapter parameters got a gradient", self.checked),
            false => write!(f, "{}", parts.join("; ")),
        }
    }
}
