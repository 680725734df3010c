//! What every adapted layer shares: rotation and ratio, dropout, switches and constants.

use crate::config::{BlockLayout, DoftConfig, LayerKind};
use crate::error::{Error, Result};
use crate::ops::Weight;
use crate::params::{Params, names, row_norms_of};
use crate::rng::SplitMix64;
use crate::rotation;
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The frozen weight that an adapter stands on: its rows, and the shape it has in its layer.
pub(crate) struct Base<'a> {
    pub(crate) weight: &'a Weight,
    pub(crate) shape: &'a [usize],
}

impl Base<'_> {
    /// Norms of the rows; of a quantized weight a few rows are expanded at a time.
    pub(crate) fn norms(&self) -> Result<Tensor> {
        row_norms_of(self.weight)
    }
}

/// What a layer needs of its adapter in one pass: the blocks `R` (1 or `D`, b, b) and `m / n0`.
#[derive(Clone, Debug)]
pub(crate) struct Factors {
    pub(crate) r: Tensor,
    pub(crate) ratio: Option<Tensor>,
}

/// The adapter of one layer. Layers hold it in an `Arc`, so that clones train the same parameters.
#[derive(Debug)]
pub(crate) struct Adaptation {
    path: String,
    kind: LayerKind,
    shape: Vec<usize>,
    layout: BlockLayout,
    asked: usize,
    dropout: f64,
    seed: u64,
    params: Params,
    enabled: AtomicBool,
    /// Rotation and ratio while they are constants.
    constants: RwLock<Option<Factors>>,
    /// Training step, and training passes since it began: what dropout masks are made from.
    step: AtomicU64,
    passes: AtomicU64,
}

impl Adaptation {
    /// Checks `weight` (rows first) against the configuration and gets the parameters from `vb`,
    /// whose prefix is the layer's path. `norms` are its row norms, where they are known already.
    pub(crate) fn new(
        kind: LayerKind,
        weight: &Base,
        config: &DoftConfig,
        norms: Option<Tensor>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (path, shape) = (vb.prefix(), weight.shape);
        check_weight(&path, kind, shape, weight.weight.dtype())?;
        let norms = match norms {
            Some(norms) => norms,
            None => weight.norms()?,
        };
        let config = config.for_layer(&path)?;
        let width = shape.iter().skip(1).product();
        let layout = config.layout(&path, width)?;
        let name = names::rotation(kind);
        let magnitude = config.magnitude_of(kind);
        let params = Params::new(&layout, magnitude, norms, name, vb)?;
        Ok(Self {
            path,
            kind,
            shape: shape.to_vec(),
            layout,
            asked: config.block_size,
            dropout: config.dropout,
            seed: config.seed,
            params,
            enabled: AtomicBool::new(true),
            constants: RwLock::new(None),
            step: AtomicU64::new(0),
            passes: AtomicU64::new(0),
        })
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    pub(crate) fn kind(&self) -> LayerKind {
        self.kind
    }

    /// Shape of the frozen weight.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(crate) fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    /// The block size that was asked for; the layout has the one in use.
    pub(crate) fn asked(&self) -> usize {
        self.asked
    }

    pub(crate) fn params(&self) -> &Params {
        &self.params
    }

    pub(crate) fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Relaxed);
    }

    /// The blocks of the rotation, in the dtype of the parameters.
    pub(crate) fn rotation(&self) -> Result<Tensor> {
        rotation::rotation(self.params.rotation(), &self.layout)
    }

    /// Rotation and ratio for one pass, or none when the adapter is disabled.
    pub(crate) fn factors(&self, train: bool) -> Result<Option<Factors>> {
        if !self.enabled() {
            return Ok(None);
        }
        if let Some(constants) = self.constants()
            && !train
        {
            return Ok(Some(constants));
        }
        // An embedding looks up the ratios that it needs.
        let ratio = match self.kind {
            LayerKind::Embedding => None,
            _ => self.params.ratio()?,
        };
        let r = self.rotation()?;
        let mut factors = Factors { r, ratio };
        if train && self.dropout > 0. {
            factors.r = self.drop_blocks(&factors.r)?;
        }
        Ok(Some(factors))
    }

    /// For `Module::forward`, which cannot say whether it trains: fine without dropout.
    pub(crate) fn factors_of_forward(&self) -> Result<Option<Factors>> {
        if self.dropout > 0. && self.enabled() && self.constants().is_none() {
            return Err(Error::DropoutMode {
                layer: self.path.clone(),
            });
        }
        self.factors(false)
    }

    /// The weight that acts when the layer's is `weight`: computed in f32 or wider, rounded once.
    pub(crate) fn effective_weight(&self, weight: &Tensor) -> Result<Tensor> {
        let Some(Factors { r, ratio }) = self.factors(false)? else {
            return Ok(weight.clone());
        };
        let (r, ratio) = match self.kind {
            // A row of an embedding turns by R, that of a weight by its transpose.
            LayerKind::Embedding => (r.transpose(1, 2)?.contiguous()?, self.params.ratio()?),
            _ => (r, ratio),
        };
        let ratio = ratio.map(|ratio| ratio.detach());
        rotation::effective_weight(weight, &r.detach(), ratio.as_ref())
    }

    fn constants(&self) -> Option<Factors> {
        let guard = self.constants.read().unwrap_or_else(|e| e.into_inner());
        guard.clone()
    }

    /// Fixes rotation and ratio at their present values, outside any graph.
    pub(crate) fn set_constants(&self) -> Result<()> {
        // A factor is its own ratio: without the copy it would go on training.
        let ratio = self.params.ratio()?;
        let factors = Factors {
            r: self.rotation()?.detach(),
            ratio: ratio.map(|ratio| ratio.detach().copy()).transpose()?,
        };
        *self.constants.write().unwrap_or_else(|e| e.into_inner()) = Some(factors);
        Ok(())
    }

    /// Lets rotation and ratio follow the parameters again.
    pub(crate) fn clear_constants(&self) {
        *self.constants.write().unwrap_or_else(|e| e.into_inner()) = None;
    }

    /// A copy of its own that answers constants only.
    pub(crate) fn inference(&self) -> Result<Self> {
        let copy = Self {
            path: self.path.clone(),
            kind: self.kind,
            shape: self.shape.clone(),
            layout: self.layout.clone(),
            asked: self.asked,
            dropout: self.dropout,
            seed: self.seed,
            params: self.params.clone(),
            enabled: AtomicBool::new(self.enabled()),
            constants: RwLock::new(None),
            step: AtomicU64::new(0),
            passes: AtomicU64::new(0),
        };
        copy.set_constants()?;
        Ok(copy)
    }

    /// Says which training step comes next, so that masks depend on (seed, path, step, pass) alone.
    pub(crate) fn set_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
        self.passes.store(0, Ordering::Relaxed);
    }

    // Each block becomes the identity with probability p; nothing is rescaled.
    fn drop_blocks(&self, r: &Tensor) -> Result<Tensor> {
        let pass = self.passes.fetch_add(1, Ordering::Relaxed);
        let step = self.step.load(Ordering::Relaxed);
        let mut rng = SplitMix64::stream(self.seed, &self.path, [step, pass]);
        let (blocks, b, _) = r.dims3()?;
        let keep: Vec<f32> = (0..blocks)
            .map(|_| f32::from(u8::from(rng.uniform() >= self.dropout)))
            .collect();
        let keep = Tensor::from_vec(keep, (blocks, 1, 1), r.device())?.to_dtype(r.dtype())?;
        let identity = Tensor::eye(b, r.dtype(), r.device())?.unsqueeze(0)?;
        let dropped = identity.broadcast_mul(&keep.affine(-1., 1.)?)?;
        Ok(r.broadcast_mul(&keep)?.add(&dropped)?)
    }
}

/// Refuses a weight that no adapter can stand on.
pub(crate) fn check_weight(
    path: &str,
    kind: LayerKind,
    shape: &[usize],
    dtype: DType,
) -> Result<()> {
    if shape.len() != kind.rank() || shape.contains(&0) {
        return Err(Error::Shape {
            layer: path.to_string(),
            what: "the weight",
            found: shape.to_vec(),
            expected: format!("{} axes, none of them empty", kind.rank()),
        });
    }
    if !matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        return Err(Error::DType {
            layer: path.to_string(),
            what: "the weight",
            found: dtype,
            expected: "f32, f64, f16 or bf16".to_string(),
        });
    }
    Ok(())
}
