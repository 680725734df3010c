//! Fine-tuning methods side by side: adapters of the crate (DOFT, OFT, LoRA, DoRA), full fine-tuning, and nothing
//! at all.

use candle_core::{Device, Result, Tensor, Var, bail};
use candle_doft::train::{AdamW, Group};
use candle_doft::{
    Adapter, AdapterBuilder, DoftConfig, DoftLinear, Mode, Pattern, Targets, frozen,
};
use candle_nn::{Linear, Module, ParamsAdamW};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

/// How a frozen layer is adapted.
#[derive(Clone, Debug)]
pub enum Method {
    /// This crate: DOFT, or OFT where the magnitude is none.
    Doft(Box<DoftConfig>),
    /// `W + alpha/rank B A` ("LoRA", arXiv:2106.09685, section 4.1).
    Lora { rank: usize, alpha: f64 },
    /// `m V / ||V||`, `V = W + alpha/rank B A`, the norm of each output row a constant in the
    /// backward pass ("DoRA", arXiv:2402.09353, equations 5 and 11).
    Dora { rank: usize, alpha: f64 },
    /// Every weight and bias trains.
    Full,
    /// Nothing trains.
    Frozen,
}

/// Builds the layers of one model under one method, as [`AdapterBuilder`] does for the crate's own.
pub struct TunerBuilder {
    method: Method,
    seed: u64,
    device: Device,
    /// Of the methods that are the crate's.
    builder: Option<AdapterBuilder>,
    vars: Mutex<BTreeMap<String, Var>>,
}

/// The trainable tensors of one model under one method. Clones share them.
#[derive(Clone)]
pub struct Tuner {
    adapter: Option<Adapter>,
    vars: BTreeMap<String, Var>,
}

impl Method {
    /// The configuration of an adapter of the crate; none where the method is no adapter.
    fn config(&self, seed: u64) -> Option<DoftConfig> {
        match self {
            Self::Doft(config) => Some(config.as_ref().clone()),
            Self::Lora { rank, alpha } => Some(DoftConfig::lora(*rank, *alpha).with_seed(seed)),
            Self::Dora { rank, alpha } => Some(DoftConfig::dora(*rank, *alpha).with_seed(seed)),
            Self::Full | Self::Frozen => None,
        }
    }
}

impl TunerBuilder {
    pub fn new(method: Method, seed: u64, device: &Device) -> candle_doft::Result<Self> {
        let config = method.config(seed);
        let builder = config.map(|config| Adapter::builder(config, device));
        Ok(Self {
            seed,
            device: device.clone(),
            builder: builder.transpose()?,
            method,
            vars: Mutex::default(),
        })
    }

    /// The layers of an adapter that was loaded.
    pub fn with_adapter(method: Method, builder: AdapterBuilder) -> Self {
        Self {
            method,
            seed: 0,
            device: builder.device().clone(),
            builder: Some(builder),
            vars: Mutex::default(),
        }
    }

    /// Ends building: the crate's adapter is complete, or the error says what is missing.
    pub fn finish(self) -> candle_doft::Result<Tuner> {
        Ok(Tuner {
            adapter: self.builder.map(AdapterBuilder::finish).transpose()?,
            vars: self.vars.into_inner().unwrap_or_else(|e| e.into_inner()),
        })
    }

    /// Adapts only layers that one of these means, for LoRA and DoRA; none means all.
    pub fn with_targets(mut self, targets: &[Pattern]) -> candle_doft::Result<Self> {
        let low_rank = matches!(self.method, Method::Lora { .. } | Method::Dora { .. });
        if let (Some(config), true, false) =
            (self.method.config(self.seed), low_rank, targets.is_empty())
        {
            let config = config.with_targets(Targets::Patterns(targets.to_vec()));
            self.builder = Some(Adapter::builder(config, &self.device)?);
        }
        Ok(self)
    }

    /// Wraps the layer at `path`, candle's or a frozen one, dense or quantized.
    pub fn wrap_linear(
        &self,
        path: &str,
        base: impl Into<frozen::Linear>,
    ) -> candle_doft::Result<Tuned> {
        let base = base.into();
        Ok(match (&self.builder, &self.method) {
            (Some(builder), _) => Tuned::Adapted(builder.wrap(path, base)?),
            (None, Method::Full) => {
                let weight = self.var(path, "weight", &base.weight()?)?;
                let bias = base.bias().map(|bias| self.var(path, "bias", bias));
                Tuned::Full(Linear::new(weight, bias.transpose()?))
            }
            (None, _) => Tuned::Frozen(base),
        })
    }

    fn own(&self) -> MutexGuard<'_, BTreeMap<String, Var>> {
        self.vars.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn var(&self, path: &str, name: &str, start: &Tensor) -> Result<Tensor> {
        let var = Var::from_tensor(&start.copy()?)?;
        let tensor = var.as_tensor().clone();
        if self.own().insert(format!("{path}.{name}"), var).is_some() {
            bail!("layer `{path}` is wrapped already");
        }
        Ok(tensor)
    }
}

impl Tuner {
    /// The crate's adapter: DOFT, OFT, LoRA or DoRA.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// Runs `f` with rotations as constants, so that no graph is built.
    pub fn eval<T, E: From<candle_doft::Error>>(
        &self,
        f: impl FnOnce() -> candle_doft::Result<T, E>,
    ) -> candle_doft::Result<T, E> {
        match &self.adapter {
            Some(adapter) => adapter.with_mode(Mode::Eval, f),
            None => f(),
        }
    }

    /// The trainable tensors by name, in the order of their names.
    pub fn named_vars(&self) -> Vec<(String, Var)> {
        match &self.adapter {
            Some(adapter) => adapter.named_vars(),
            None => self.vars.clone().into_iter().collect(),
        }
    }

    /// An optimizer of them: in the groups of [`AdamW::for_adapter`] for adapters, in one for others.
    pub fn optimizer(&self, params: ParamsAdamW) -> candle_doft::Result<AdamW> {
        match &self.adapter {
            Some(adapter) => AdamW::for_adapter(adapter, params),
            None => AdamW::new(vec![Group::new(self.named_vars())], params),
        }
    }

    /// Number of trainable parameters.
    pub fn trainable(&self) -> usize {
        self.named_vars().iter().map(|(_, v)| v.elem_count()).sum()
    }
}

/// A layer under one of the methods.
#[derive(Clone, Debug)]
pub enum Tuned {
    /// By an adapter of the crate: DOFT, OFT, LoRA, DoRA.
    Adapted(DoftLinear),
    Full(Linear),
    Frozen(frozen::Linear),
}

impl Tuned {
    /// The layer as a candle layer of one weight.
    pub fn merge(&self) -> candle_doft::Result<Linear> {
        Ok(match self {
            Self::Adapted(layer) => layer.merge()?,
            Self::Full(layer) => {
                Linear::new(layer.weight().detach(), layer.bias().map(Tensor::detach))
            }
            Self::Frozen(layer) => Linear::new(layer.weight()?, layer.bias().cloned()),
        })
    }
}

impl Module for Tuned {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Adapted(layer) => layer.forward(x),
            Self::Full(layer) => layer.forward(x),
            Self::Frozen(layer) => layer.forward(x),
        }
    }
}
