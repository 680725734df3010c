//! [`AdamW`] over named variables in groups, with moments that can be saved.

use super::Gradients;
use crate::adapter::{Adapter, Settings};
use crate::error::{Error, Result};
use crate::params::names;
use candle_core::{DType, Tensor, Var};
use candle_nn::ParamsAdamW;
use std::collections::{BTreeMap, HashSet};

/// Variables that share a learning rate and a decay.
///
/// # Examples
///
/// Magnitudes at a tenth of the rotations' rate, once with groups and once with an adapter's own:
///
/// ```
/// # use candle_core::{DType, Device};
/// # let vb = candle_nn::VarBuilder::zeros(DType::F32, &Device::Cpu);
/// # let builder = candle_doft::Adapter::builder(Default::default(), &Device::Cpu)?;
/// # builder.linear(32, 8, vb.pp("layer"))?;
/// # let adapter = builder.finish()?;
/// # let params = candle_nn::ParamsAdamW { weight_decay: 0., ..Default::default() };
/// use candle_doft::train::{AdamW, Group};
///
/// let vars = adapter.named_vars().into_iter();
/// let (magnitudes, rotations) = vars.partition(|(name, _)| name.contains("dora_"));
/// let groups = vec![Group::new(rotations), Group::new(magnitudes).with_rate(0.1)];
/// let mut optimizer = AdamW::new(groups, params.clone())?.with_adapter(&adapter)?;
///
/// let mut optimizer = AdamW::for_adapter(&adapter, params)?;
/// optimizer.set_group_rate(AdamW::MAGNITUDES, 0.1)?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "each `with_` returns the changed group"]
pub struct Group {
    vars: Vec<(String, Var)>,
    rate: f64,
    weight_decay: Option<f64>,
}

impl Group {
    /// A group with the optimizer's own rate and decay. Names are those of checkpoints.
    pub fn new(vars: Vec<(String, Var)>) -> Self {
        Self {
            vars,
            rate: 1.,
            weight_decay: None,
        }
    }

    /// Multiplies the optimizer's learning rate.
    pub fn with_rate(mut self, factor: f64) -> Self {
        self.rate = factor;
        self
    }

    /// Sets the decay, instead of the optimizer's.
    pub fn with_weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = Some(weight_decay);
        self
    }
}

/// What is kept for a variable from step to step.
#[derive(Clone, Debug)]
pub(super) struct State {
    /// The first and the second moment.
    pub(super) first: Tensor,
    pub(super) second: Tensor,
    /// A half variable in f32: steps below its rounding add up here. None for other variables.
    pub(super) master: Option<Tensor>,
}

impl State {
    fn new(var: &Var) -> Result<Self> {
        let zero = var.zeros_like()?.detach().to_dtype(wide_dtype(var))?;
        Ok(Self {
            first: zero.clone(),
            second: zero,
            master: master(var, None)?,
        })
    }
}

/// The f32 copy of a half variable. Where the variable was set from outside, its own value counts.
fn master(var: &Var, before: Option<&Tensor>) -> Result<Option<Tensor>> {
    let dtype = wide_dtype(var);
    if var.dtype() == dtype {
        return Ok(None);
    }
    let value = var.as_tensor().detach();
    let wide = value.to_dtype(dtype)?;
    let Some(before) = before else {
        return Ok(Some(wide));
    };
    let same = before.to_dtype(var.dtype())?.eq(&value)?;
    Ok(Some(same.where_cond(before, &wide)?))
}

/// Adam with decoupled weight decay.
///
/// ```text
/// m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
/// p = (1 - lr decay) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
/// ```
///
/// What candle's own lacks: groups, a state that is saved and restored bit for bit (with
/// [`Checkpoint`](super::Checkpoint)), and an error for a variable without gradient.
///
/// An f16 or bf16 variable has a copy in f32, on which the steps are made: steps below the rounding of
/// the variable add up. Its gradients are summed and its moments kept in f32 as well. Where the variable
/// is set from outside, the copy follows.
///
/// A decay pulls parameters towards 0, which for a rotation and a `Log` magnitude is the base; a
/// `Factor` or `Absolute` magnitude it would shrink, so [`AdamW::for_adapter`] refuses that.
///
/// [`train`](super#examples) shows a run, [`Group`] rates of their own.
///
/// # References
///
/// "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2.
#[derive(Debug)]
pub struct AdamW {
    groups: Vec<Group>,
    params: ParamsAdamW,
    steps: u64,
    states: BTreeMap<String, State>,
    /// Of the layers whose parameters the variables are, by their paths.
    layers: Option<BTreeMap<String, Settings>>,
}

impl AdamW {
    /// The group of all rotations in [`AdamW::for_adapter`].
    pub const ROTATIONS: usize = 0;

    /// The group of all magnitudes in [`AdamW::for_adapter`].
    pub const MAGNITUDES: usize = 1;

    /// The group of the extra tensors in [`AdamW::for_adapter`].
    pub const EXTRAS: usize = 2;

    /// An optimizer of the given groups. Groups of an adapter's variables need
    /// [`AdamW::with_adapter`] for checkpoints that cannot be restored into another one.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] when there are no variables, two have one name, one is no float tensor, or
    /// a parameter is out of its range.
    pub fn new(groups: Vec<Group>, params: ParamsAdamW) -> Result<Self> {
        check_params(&params)?;
        for group in &groups {
            check_rate("the rate of a group", group.rate)?;
            check_rate("the decay of a group", group.weight_decay.unwrap_or(0.))?;
        }
        let mut states = BTreeMap::new();
        for (name, var) in groups.iter().flat_map(|group| &group.vars) {
            let floats = [DType::F16, DType::BF16, DType::F32, DType::F64];
            if !floats.contains(&var.dtype()) {
                let found = format!("`{name}` of {:?}", var.dtype());
                return refuse("a variable", found, "a float tensor");
            }
            if states.insert(name.clone(), State::new(var)?).is_some() {
                return refuse("a variable", format!("`{name}` twice"), "names that differ");
            }
        }
        if states.is_empty() {
            return refuse("the variables", "none".into(), "at least one");
        }
        Ok(Self {
            groups,
            params,
            steps: 0,
            states,
            layers: None,
        })
    }

    /// An optimizer of everything that an adapter trains, in the groups [`AdamW::ROTATIONS`],
    /// [`AdamW::MAGNITUDES`] and [`AdamW::EXTRAS`].
    ///
    /// # Errors
    ///
    /// Those of [`AdamW::new`]; a weight decay above 0 with a `Factor`
    /// or `Absolute` magnitude.
    pub fn for_adapter(adapter: &Adapter, params: ParamsAdamW) -> Result<Self> {
        let ids = |vars: Vec<Var>| vars.iter().map(|var| var.id()).collect::<HashSet<_>>();
        let (of_rotations, of_magnitudes) =
            (ids(adapter.rotation_vars()), ids(adapter.magnitude_vars()));
        let (mut rotations, mut magnitudes, mut extras) = (Vec::new(), Vec::new(), Vec::new());
        for (name, var) in adapter.named_vars() {
            if of_rotations.contains(&var.id()) {
                rotations.push((name, var));
            } else if of_magnitudes.contains(&var.id()) {
                let shrinks = !name.ends_with(names::LOG) && params.weight_decay > 0.;
                if shrinks {
                    let expected = format!("0 with `{name}`, whose start is not 0, or own groups");
                    return refuse("`weight_decay`", params.weight_decay.to_string(), &expected);
                }
                magnitudes.push((name, var));
            } else {
                extras.push((name, var));
            }
        }
        let groups = [rotations, magnitudes, extras].map(Group::new);
        Self::new(groups.into(), params)?.with_adapter(adapter)
    }

    /// Says whose parameters the variables are, for groups of one's own: a checkpoint then holds what the
    /// parameters mean (map, blocks, base weight, ..), and is restored into no other adapter.
    ///
    /// # Errors
    ///
    /// Those of candle's elementwise operations.
    pub fn with_adapter(mut self, adapter: &Adapter) -> Result<Self> {
        self.layers = Some(adapter.settings()?);
        Ok(self)
    }

    /// Steps that were made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The learning rate before the groups' factors.
    pub fn rate(&self) -> f64 {
        self.params.lr
    }

    /// Sets the learning rate; [`AdamW::step`] refuses one that is negative or not finite.
    pub fn set_rate(&mut self, rate: f64) {
        self.params.lr = rate;
    }

    /// Sets the factor of a group, by its place; [`AdamW::step`] refuses one that is negative or not
    /// finite.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] when there is no such group.
    pub fn set_group_rate(&mut self, group: usize, factor: f64) -> Result<()> {
        let groups = self.groups.len();
        let Some(group) = self.groups.get_mut(group) else {
            return Err(Error::argument(
                "AdamW::set_group_rate",
                "the group",
                group.to_string(),
                format!("below {groups}, the number of groups"),
            ));
        };
        group.rate = factor;
        Ok(())
    }

    /// The variables with their names, group by group.
    pub fn named_vars(&self) -> Vec<(String, Var)> {
        let vars = self.groups.iter().flat_map(|group| &group.vars);
        vars.cloned().collect()
    }

    /// Empty sums for the next step.
    pub fn gradients(&self) -> Gradients {
        Gradients::new(self.steps + 1, self.named_vars())
    }

    /// Makes one step. Either every variable moves or none does.
    ///
    /// # Errors
    ///
    /// * [`Error::Gradients`] if a variable got no gradient, [`Error::Diverged`] if one is not finite.
    /// * [`Error::Argument`] if a learning rate is negative or not finite, or the gradients are those of
    ///   another step: they serve one.
    pub fn step(&mut self, gradients: &Gradients) -> Result<()> {
        if gradients.step() != self.steps + 1 {
            let expected = format!(
                "{}: `gradients` makes new ones for each step",
                self.steps + 1
            );
            return refuse(
                "the step of the gradients",
                gradients.step().to_string(),
                &expected,
            );
        }
        let norm = gradients.norm()?;
        let each = gradients.each()?;
        if norm * norm > f64::from(f32::MAX) {
            gradients.check_squares()?;
        }
        check_rate("the learning rate", self.params.lr)?;
        for group in &self.groups {
            check_rate("the rate of a group", group.rate)?;
        }
        let ParamsAdamW {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
        } = self.params;
        let t = (self.steps + 1) as f64;
        let (scale1, scale2) = (1. / (1. - beta1.powf(t)), 1. / (1. - beta2.powf(t)));
        let settings = self.groups.iter().flat_map(|group| {
            let decay = group.weight_decay.unwrap_or(weight_decay);
            group.vars.iter().map(move |_| (lr * group.rate, decay))
        });
        let mut changes = Vec::with_capacity(each.len());
        for ((name, var, grad), (lr, decay)) in each.into_iter().zip(settings) {
            let Some(state) = self.states.get(name) else {
                let expected = "gradients made by this optimizer";
                return refuse("a variable", format!("`{name}`"), expected);
            };
            let first = ((&state.first * beta1)? + (grad * (1. - beta1))?)?;
            let second = ((&state.second * beta2)? + (grad.sqr()? * (1. - beta2))?)?;
            let down = ((&second * scale2)?.sqrt()? + eps)?;
            let change = (&first * (lr * scale1))?.div(&down)?;
            let master = master(var, state.master.as_ref())?;
            let from = master.as_ref().unwrap_or(var.as_tensor());
            let moved = ((from * (1. - lr * decay))? - change)?.detach();
            let value = moved.to_dtype(var.dtype())?;
            // What is kept must not hold the steps before it.
            let state = State {
                first: first.detach(),
                second: second.detach(),
                master: master.is_some().then_some(moved),
            };
            if state.master.is_some() {
                gradients.check_range(name, &value)?;
            }
            changes.push((name.to_string(), var.clone(), value, state));
        }
        for (name, var, value, state) in changes {
            var.set(&value)?;
            self.states.insert(name, state);
        }
        self.steps += 1;
        Ok(())
    }

    /// The settings of the layers whose parameters the variables are, where that is known.
    pub(super) fn layers(&self) -> Option<&BTreeMap<String, Settings>> {
        self.layers.as_ref()
    }

    /// What is kept for each variable, by its name.
    pub(super) fn states(&self) -> Result<BTreeMap<String, State>> {
        let mut states = self.states.clone();
        for (name, var) in self.groups.iter().flat_map(|group| &group.vars) {
            if let Some(state) = states.get_mut(name) {
                state.master = master(var, state.master.as_ref())?;
            }
        }
        Ok(states)
    }

    /// Takes up where another optimizer left off.
    pub(super) fn resume(&mut self, steps: u64, states: Vec<(String, State)>) {
        self.steps = steps;
        self.states.extend(states);
    }
}

/// The dtype of what is kept for a variable and of its gradient's sum. Squares of gradients leave the
/// range of f16, and a step in half precision is lost in rounding.
pub(super) fn wide_dtype(var: &Var) -> DType {
    match var.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

fn check_params(params: &ParamsAdamW) -> Result<()> {
    for (what, value) in [("`beta1`", params.beta1), ("`beta2`", params.beta2)] {
        if !(0. ..1.).contains(&value) {
            return refuse(what, value.to_string(), "at least 0 and below 1");
        }
    }
    check_rate("`lr`", params.lr)?;
    if params.eps == 0. {
        // A gradient of 0 would divide 0 by 0.
        return refuse("`eps`", "0".into(), "a finite number above 0");
    }
    check_rate("`eps`", params.eps)?;
    check_rate("`weight_decay`", params.weight_decay)
}

fn check_rate(what: &'static str, value: f64) -> Result<()> {
    match value >= 0. && value.is_finite() {
        true => Ok(()),
        false => refuse(what, value.to_string(), "a finite number from 0"),
    }
}

fn refuse<T>(what: &'static str, found: String, expected: &str) -> Result<T> {
    Err(Error::argument("AdamW", what, found, expected))
}
