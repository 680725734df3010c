//! Fine-tuning methods side by side, all on the crate's frozen product: DOFT and OFT by the crate,
//! LoRA and DoRA as their papers have them, full fine-tuning, and nothing at all.

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_doft::rng::SplitMix64;
use candle_doft::train::{AdamW, Group};
use candle_doft::{Adapter, AdapterBuilder, DoftConfig, DoftLinear, Mode, Pattern, frozen};
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
    device: Device,
    seed: u64,
    builder: Option<AdapterBuilder>,
    targets: Vec<Pattern>,
    vars: Mutex<BTreeMap<String, Var>>,
}

/// The trainable tensors of one model under one method. Clones share them.
#[derive(Clone)]
pub struct Tuner {
    adapter: Option<Adapter>,
    vars: BTreeMap<String, Var>,
}

impl TunerBuilder {
    pub fn new(method: Method, seed: u64, device: &Device) -> candle_doft::Result<Self> {
        let builder = match &method {
            Method::Doft(config) => Some(Adapter::builder(config.as_ref().clone(), device)?),
            _ => None,
        };
        Ok(Self {
            method,
            device: device.clone(),
            seed,
            builder,
            targets: Vec::new(),
            vars: Mutex::default(),
        })
    }

    /// The layers of an adapter that was loaded.
    pub fn with_adapter(method: Method, builder: AdapterBuilder) -> Self {
        Self {
            method,
            device: builder.device().clone(),
            seed: 0,
            builder: Some(builder),
            targets: Vec::new(),
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

    /// Adapts only layers that one of these means, for the methods that are not the crate's; none means
    /// all.
    pub fn with_targets(mut self, targets: &[Pattern]) -> Self {
        self.targets = targets.to_vec();
        self
    }

    fn wants(&self, path: &str) -> candle_doft::Result<bool> {
        for target in &self.targets {
            if target.matches(path)? {
                return Ok(true);
            }
        }
        Ok(self.targets.is_empty())
    }

    /// Wraps the layer at `path`, candle's or a frozen one, dense or quantized.
    pub fn wrap_linear(
        &self,
        path: &str,
        base: impl Into<frozen::Linear>,
    ) -> candle_doft::Result<Tuned> {
        let base = base.into();
        Ok(match &self.method {
            Method::Doft(_) => match &self.builder {
                Some(builder) => Tuned::Doft(builder.wrap(path, base)?),
                None => Tuned::Frozen(base),
            },
            _ if !self.wants(path)? => Tuned::Frozen(base),
            Method::Lora { rank, alpha } => Tuned::Lora(self.lora(path, base, *rank, *alpha)?),
            Method::Dora { rank, alpha } => {
                let norms = candle_doft::params::row_norms(&base.weight()?)?;
                let lora = self.lora(path, base, *rank, *alpha)?;
                Tuned::Dora(self.dora(path, &norms, lora)?)
            }
            Method::Full => {
                let weight = self.var(path, "weight", &base.weight()?)?;
                let bias = base.bias().map(|bias| self.var(path, "bias", bias));
                Tuned::Full(Linear::new(weight, bias.transpose()?))
            }
            Method::Frozen => Tuned::Frozen(base),
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

    // A is uniform in +-1/sqrt(in), B is zero: the initialisation of the authors' code and of PEFT.
    fn lora(
        &self,
        path: &str,
        base: frozen::Linear,
        rank: usize,
        alpha: f64,
    ) -> Result<LoraLinear> {
        let (out, width) = (base.out_dim(), base.in_dim());
        if rank == 0 || rank > out.min(width) {
            bail!("layer `{path}`: rank {rank} does not fit a weight of {out}x{width}");
        }
        let dtype = param_dtype(base.dtype());
        let mut rng = SplitMix64::new(self.seed ^ fingerprint(path));
        let bound = 1. / (width as f64).sqrt();
        let a: Vec<f64> = (0..rank * width)
            .map(|_| bound * (2. * rng.uniform() - 1.))
            .collect();
        let a = Tensor::from_vec(a, (rank, width), &self.device)?.to_dtype(dtype)?;
        let b = Tensor::zeros((out, rank), dtype, &self.device)?;
        let bias = base.bias().cloned();
        Ok(LoraLinear {
            product: base.without_bias(),
            bias,
            a: self.var(path, "lora_A.weight", &a)?,
            b: self.var(path, "lora_B.weight", &b)?,
            scale: alpha / rank as f64,
        })
    }

    fn dora(&self, path: &str, norms: &Tensor, lora: LoraLinear) -> Result<DoraLinear> {
        Ok(DoraLinear {
            magnitude: self.var(path, "lora_magnitude_vector.weight", norms)?,
            squared_norms: norms.sqr()?,
            lora,
        })
    }
}

// FNV-1a: each layer draws numbers of its own.
fn fingerprint(path: &str) -> u64 {
    path.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

fn param_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

impl Tuner {
    /// The crate's adapter, for DOFT and OFT.
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

    /// An optimizer of them: in the groups of [`AdamW::for_adapter`] for DOFT and OFT, in one for others.
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
    Doft(DoftLinear),
    Lora(LoraLinear),
    Dora(DoraLinear),
    Full(Linear),
    Frozen(frozen::Linear),
}

impl Tuned {
    /// The layer as a candle layer of one weight.
    pub fn merge(&self) -> candle_doft::Result<Linear> {
        Ok(match self {
            Self::Doft(layer) => layer.merge()?,
            Self::Lora(layer) => layer.merge()?,
            Self::Dora(layer) => layer.merge()?,
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
            Self::Doft(layer) => layer.forward(x),
            Self::Lora(layer) => layer.forward(x),
            Self::Dora(layer) => layer.forward(x),
            Self::Full(layer) => layer.forward(x),
            Self::Frozen(layer) => layer.forward(x),
        }
    }
}

/// `y = x W^T + s (x A^T) B^T + bias`.
#[derive(Clone, Debug)]
pub struct LoraLinear {
    product: frozen::Linear,
    bias: Option<Tensor>,
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl LoraLinear {
    fn without_bias(&self, x: &Tensor) -> Result<Tensor> {
        let dtype = x.dtype();
        // candle's matmul wants one matrix; the scale goes where the tensor is small.
        let rows = x.elem_count() / x.dim(candle_core::D::Minus1)?.max(1);
        let flat = x.reshape((rows, ()))?;
        let down = flat.matmul(&self.a.to_dtype(dtype)?.t()?)?;
        let up = (down * self.scale)?.matmul(&self.b.to_dtype(dtype)?.t()?)?;
        let y = self.product.forward(x)?;
        y.add(&up.reshape(y.shape())?)
    }

    fn delta(&self) -> Result<Tensor> {
        self.b.detach().matmul(&self.a.detach())? * self.scale
    }

    fn merge(&self) -> Result<Linear> {
        let weight = self.product.weight()?;
        let merged = weight.to_dtype(self.a.dtype())?.add(&self.delta()?)?;
        Ok(Linear::new(
            merged.to_dtype(weight.dtype())?,
            self.bias.clone(),
        ))
    }
}

impl Module for LoraLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.without_bias(x)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// `y = m / ||V|| (x V^T) + bias`, `V = W + s B A`.
#[derive(Clone, Debug)]
pub struct DoraLinear {
    lora: LoraLinear,
    magnitude: Tensor,
    squared_norms: Tensor,
}

impl DoraLinear {
    /// `||V_row||`, which has to be taken anew at every step, without forming `V`:
    /// `||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>`.
    fn norms(&self) -> Result<Tensor> {
        let LoraLinear { a, b, scale, .. } = &self.lora;
        let (a, b) = (a.detach(), b.detach());
        let cross = self.lora.product.forward(&a)?.t()?.mul(&b)?.sum(1)?;
        let square = b.matmul(&a.matmul(&a.t()?)?)?.mul(&b)?.sum(1)?;
        let sum = ((&self.squared_norms + (cross * (2. * scale))?)? + (square * (scale * scale))?)?;
        // Rounding may leave less than nothing where V is nearly zero.
        sum.relu()?.sqrt()
    }

    fn ratio(&self) -> Result<Tensor> {
        self.magnitude.div(&self.norms()?)
    }

    fn merge(&self) -> Result<Linear> {
        let merged = self.lora.merge()?;
        let ratio = self.ratio()?.detach().unsqueeze(1)?;
        let weight = merged
            .weight()
            .to_dtype(ratio.dtype())?
            .broadcast_mul(&ratio)?;
        let weight = weight.to_dtype(merged.weight().dtype())?;
        Ok(Linear::new(weight, merged.bias().cloned()))
    }
}

impl Module for DoraLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.lora.without_bias(x)?;
        let y = y.broadcast_mul(&self.ratio()?.to_dtype(y.dtype())?)?;
        match &self.lora.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}
