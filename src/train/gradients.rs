//! [`Gradients`]: the gradients of one step, summed over micro-batches.

use super::optimizer::wide_dtype;
use crate::error::{Error, GradientReport, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var, WithDType};

/// The gradients of one optimizer step, one sum for each variable, in f32 for one of half precision.
///
/// Made by [`AdamW::gradients`](super::AdamW::gradients); [`train`](super#examples) shows its use.
///
/// ```text
/// g = sum_i weight_i dL_i/dp,    clipped: g min(1, max_norm / ||g||)
/// ```
#[derive(Debug)]
pub struct Gradients {
    step: u64,
    vars: Vec<(String, Var)>,
    sums: Vec<Option<Tensor>>,
}

impl Gradients {
    pub(super) fn new(step: u64, vars: Vec<(String, Var)>) -> Self {
        let sums = vec![None; vars.len()];
        Self { step, vars, sums }
    }

    /// Runs the backward pass of a micro-batch and adds `weight` times its gradients. Weights of a
    /// step usually sum to 1, each the share of tokens or examples of its micro-batch.
    ///
    /// Returns all gradients, for [`Adapter::check_gradients`](crate::Adapter::check_gradients).
    ///
    /// # Errors
    ///
    /// [`Error::Diverged`] when the loss is not finite; those of candle's `backward`.
    pub fn backward(&mut self, loss: &Tensor, weight: f64) -> Result<GradStore> {
        let value: f64 = wide(&loss.detach())?.sum_all()?.to_scalar()?;
        if !value.is_finite() {
            return self.diverged("the loss", value);
        }
        let grads = loss.backward()?;
        self.add(&grads, weight)?;
        Ok(grads)
    }

    /// Adds `weight` times the gradients of a backward pass that has run.
    ///
    /// # Errors
    ///
    /// Those of candle's elementwise operations.
    pub fn add(&mut self, grads: &GradStore, weight: f64) -> Result<()> {
        for ((_, var), sum) in self.vars.iter().zip(&mut self.sums) {
            // A gradient may hold the graph that it was computed in.
            let Some(grad) = grads.get(var).map(Tensor::detach) else {
                continue;
            };
            let grad = grad.to_dtype(wide_dtype(var))?;
            let grad = match weight == 1. {
                true => grad,
                false => (grad * weight)?,
            };
            *sum = Some(match sum.take() {
                Some(sum) => (sum + grad)?,
                None => grad,
            });
        }
        Ok(())
    }

    /// The norm over all variables, in f64.
    ///
    /// # Errors
    ///
    /// [`Error::Diverged`] with the first variable whose gradient is not finite.
    pub fn norm(&self) -> Result<f64> {
        let mut total = 0.;
        let found = self.vars.iter().zip(&self.sums);
        let found = found.filter_map(|((name, _), sum)| Some((name, sum.as_ref()?)));
        let (names, sums): (Vec<_>, Vec<_>) = found.unzip();
        let squares = each_number(&sums, |sum| sum.sqr()?.sum_all())?;
        for (name, square) in names.into_iter().zip(squares) {
            if !square.is_finite() {
                return self.diverged(&format!("the squared gradient of `{name}`"), square);
            }
            total += square;
        }
        Ok(total.sqrt())
    }

    /// Scales everything so that the norm is at most `max_norm`; returns the norm before.
    ///
    /// # Errors
    ///
    /// Those of [`Gradients::norm`]; [`Error::Argument`] for a `max_norm` that is not above 0.
    pub fn clip(&mut self, max_norm: f64) -> Result<f64> {
        if max_norm.is_nan() || max_norm <= 0. {
            return Err(Error::argument(
                "Gradients::clip",
                "`max_norm`",
                max_norm.to_string(),
                "a number above 0",
            ));
        }
        let norm = self.norm()?;
        if norm > max_norm {
            for sum in self.sums.iter_mut().flatten() {
                *sum = (&*sum * (max_norm / norm))?;
            }
        }
        Ok(norm)
    }

    /// Returns an error for an entry whose square leaves the range of the second moment: the variable
    /// would stand still, because a finite step over an infinite moment is 0.
    pub(super) fn check_squares(&self) -> Result<()> {
        for ((name, var), sum) in self.vars.iter().zip(&self.sums) {
            let Some(sum) = sum.as_ref().filter(|sum| sum.elem_count() > 0) else {
                continue;
            };
            let largest: f64 = wide(sum)?.abs()?.flatten_all()?.max(0)?.to_scalar()?;
            if wide_dtype(var) == DType::F32 && largest * largest > f64::from(f32::MAX) {
                let what =
                    format!("a gradient of `{name}`, whose square is above the range of f32,");
                return self.diverged(&what, largest);
            }
        }
        Ok(())
    }

    /// Returns an error for a variable that leaves the range of its dtype.
    pub(super) fn check_range(&self, name: &str, value: &Tensor) -> Result<()> {
        let sum: f64 = wide(value)?.abs()?.sum_all()?.to_scalar()?;
        let what = || format!("`{name}`, in {:?} after the step,", value.dtype());
        match sum.is_finite() {
            true => Ok(()),
            false => self.diverged(&what(), sum),
        }
    }

    /// All numbers in the order of [`AdamW::named_vars`](super::AdamW::named_vars), as `f32` or `f64`; 0 where
    /// there is no gradient. For an exchange of one's own; [`parallel`](super::parallel) has one.
    ///
    /// # Errors
    ///
    /// Those of candle's copies.
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var};
    /// # use candle_doft::train::{AdamW, Group};
    /// let var = Var::new(&[1f32, 2.], &Device::Cpu)?;
    /// let groups = vec![Group::new(vec![("a".to_string(), var.clone())])];
    /// let optimizer = AdamW::new(groups, Default::default())?;
    /// let mut gradients = optimizer.gradients();
    /// gradients.backward(&var.sqr()?.sum_all()?, 1.)?;
    /// let mut flat: Vec<f32> = gradients.flat()?;
    /// assert_eq!(flat, [2., 4.]);
    /// flat[0] = 3.;
    /// gradients.set_flat(&flat)?;
    /// assert_eq!(gradients.norm()?, 5.);
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn flat<T: WithDType>(&self) -> Result<Vec<T>> {
        let mut flat = Vec::with_capacity(self.vars.iter().map(|(_, v)| v.elem_count()).sum());
        for ((_, var), sum) in self.vars.iter().zip(&self.sums) {
            match sum {
                Some(sum) => {
                    let host = sum.to_device(&Device::Cpu)?.to_dtype(T::DTYPE)?;
                    flat.extend(host.flatten_all()?.to_vec1::<T>()?);
                }
                None => flat.resize(flat.len() + var.elem_count(), T::zero()),
            }
        }
        Ok(flat)
    }

    /// Takes the numbers of [`Gradients::flat`] for all variables.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] for another number of them.
    pub fn set_flat<T: WithDType>(&mut self, flat: &[T]) -> Result<()> {
        let there = vec![true; self.vars.len()];
        self.set(flat, &there)
    }

    /// The same, for the variables that are there.
    pub(super) fn set<T: WithDType>(&mut self, flat: &[T], there: &[bool]) -> Result<()> {
        let count: usize = self.vars.iter().map(|(_, var)| var.elem_count()).sum();
        if flat.len() != count {
            return Err(Error::argument(
                "Gradients::set_flat",
                "the number of values",
                flat.len().to_string(),
                format!("{count}, those of all variables"),
            ));
        }
        let mut rest = flat;
        let mut sums = Vec::with_capacity(self.vars.len());
        for ((_, var), there) in self.vars.iter().zip(there) {
            let (values, after) = rest.split_at(var.elem_count());
            rest = after;
            sums.push(match there {
                true => {
                    let host = Tensor::from_slice(values, var.shape(), &Device::Cpu)?;
                    let wide = host.to_dtype(wide_dtype(var))?;
                    Some(wide.to_device(var.device())?)
                }
                false => None,
            });
        }
        self.sums = sums;
        Ok(())
    }

    /// No sums, of the same step and variables.
    pub(super) fn empty(&self) -> Self {
        Self::new(self.step, self.vars.clone())
    }

    /// Adds the sums of another part of the step.
    pub(super) fn append(&mut self, right: Self) -> Result<()> {
        for (sum, right) in self.sums.iter_mut().zip(right.sums) {
            *sum = match (sum.take(), right) {
                (Some(left), Some(right)) => Some((left + right)?),
                (left, right) => left.or(right),
            };
        }
        Ok(())
    }

    /// Which variables have a gradient.
    pub(super) fn there(&self) -> Vec<bool> {
        self.sums.iter().map(Option::is_some).collect()
    }

    /// The dtype that holds all sums.
    pub(super) fn dtype(&self) -> DType {
        let wide = self.vars.iter().map(|(_, var)| wide_dtype(var));
        match wide.into_iter().any(|dtype| dtype == DType::F64) {
            true => DType::F64,
            false => DType::F32,
        }
    }

    /// Each variable with its gradient, in order.
    pub(super) fn each(&self) -> Result<Vec<(&str, &Var, &Tensor)>> {
        let mut all = Vec::with_capacity(self.vars.len());
        let mut missing = Vec::new();
        for ((name, var), sum) in self.vars.iter().zip(&self.sums) {
            match sum {
                Some(sum) => all.push((name.as_str(), var, sum)),
                None => missing.push(name.clone()),
            }
        }
        if missing.is_empty() {
            return Ok(all);
        }
        let report = GradientReport {
            checked: self.vars.len(),
            missing,
            ..Default::default()
        };
        Err(Error::Gradients(Box::new(report)))
    }

    /// The step these are for, counted from 1.
    pub fn step(&self) -> u64 {
        self.step
    }

    fn diverged<T>(&self, what: &str, found: f64) -> Result<T> {
        Err(Error::Diverged {
            step: self.step,
            what: what.to_string(),
            found,
        })
    }
}

/// A number in f64 of each tensor. Each GPU computes its own and is waited for once; Metal has no f64.
fn each_number(
    tensors: &[&Tensor],
    number: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Vec<f64>> {
    let (mut all, mut there) = (vec![0.; tensors.len()], Vec::new());
    for (place, tensor) in tensors.iter().enumerate() {
        match tensor.device() {
            // Nothing is launched over nothing; its sum is 0.
            Device::Cuda(_) if tensor.elem_count() == 0 => {}
            Device::Cuda(_) => there.push((place, number(&tensor.to_dtype(DType::F64)?)?)),
            _ => all[place] = number(&wide(tensor)?)?.to_scalar()?,
        }
    }
    while let Some((_, first)) = there.first() {
        let device = first.device().clone();
        let (here, others): (Vec<_>, Vec<_>) = there
            .into_iter()
            .partition(|(_, number)| number.device().same_device(&device));
        let numbers: Vec<&Tensor> = here.iter().map(|(_, number)| number).collect();
        let numbers = Tensor::stack(&numbers, 0)?.to_vec1::<f64>()?;
        for ((place, _), number) in here.iter().zip(numbers) {
            all[*place] = number;
        }
        there = others;
    }
    Ok(all)
}

/// In f64, on the host, for Metal has none, and squares of f32 leave its range.
fn wide(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
}
