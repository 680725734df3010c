//! [`Adaptation`]: the adapter of one layer. Rotation and ratio, dropout, switches and scopes.

use crate::config::{BlockLayout, DoftConfig, LayerKind};
use crate::error::{Error, Result};
use crate::frozen::Base;
use crate::params::{Params, names, row_norms_of};
use crate::rng::SplitMix64;
use crate::rotation;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{RwLock, RwLockWriteGuard};

/// What a layer needs of its adapter in one pass.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    /// The blocks `R`, (1 or `D`, b, b).
    pub(crate) r: Tensor,
    ratio: Ratio<'a>,
}

/// `m / n0`, made from the parameters or held.
#[derive(Debug)]
enum Ratio<'a> {
    Made(&'a Params),
    Held(Option<Tensor>),
}

impl Pass<'_> {
    /// `m / n0` for each row of the weight; none for plain OFT.
    pub(crate) fn ratio(&self) -> Result<Option<Tensor>> {
        match &self.ratio {
            Ratio::Made(params) => params.ratio(),
            Ratio::Held(ratio) => Ok(ratio.clone()),
        }
    }

    /// The same for the rows that `ids` `(n)` (u32) name.
    pub(crate) fn ratio_at(&self, ids: &Tensor) -> Result<Option<Tensor>> {
        match &self.ratio {
            Ratio::Made(params) => params.ratio_at(ids),
            Ratio::Held(None) => Ok(None),
            Ratio::Held(Some(ratio)) => Ok(Some(ratio.index_select(ids, 0)?)),
        }
    }
}

/// Rotation and ratio outside any graph.
#[derive(Clone, Debug)]
struct Factors {
    r: Tensor,
    ratio: Option<Tensor>,
}

/// The adapter of one layer. Layers hold it in an `Arc`, so that clones train the same parameters.
#[derive(Debug)]
pub(crate) struct Adaptation {
    spec: Spec,
    state: State,
}

/// What is settled when the layer is made. Clones share the parameters.
#[derive(Clone, Debug)]
struct Spec {
    path: String,
    kind: LayerKind,
    shape: Vec<usize>,
    layout: BlockLayout,
    asked: usize,
    dropout: f64,
    seed: u64,
    params: Params,
}

/// What is switched while the layer is used.
#[derive(Debug, Default)]
struct State {
    disabled: AtomicBool,
    /// Scopes that switch the adapter off while they run. A count, so that scopes of several threads
    /// may end in any order.
    suspended: AtomicUsize,
    held: RwLock<Held>,
    /// Training step, and training passes since it began: what dropout masks are made from.
    step: AtomicU64,
    passes: AtomicU64,
}

/// Rotation and ratio while they are constants, and how many scopes hold them.
#[derive(Debug, Default)]
struct Held {
    scopes: usize,
    factors: Option<Factors>,
}

impl Adaptation {
    /// Fits the configuration to `base`, which was checked, and gets the parameters from `vb`, whose
    /// prefix is the layer's path. `norms` are the row norms of the base, where they are known already.
    pub(crate) fn new(
        kind: LayerKind,
        base: &Base,
        config: &DoftConfig,
        norms: Option<Tensor>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let path = vb.prefix();
        let norms = match norms {
            Some(norms) => norms,
            None => row_norms_of(base.weight)?,
        };
        let config = config.for_layer(&path)?;
        let layout = config.layout(&path, base.weight.in_dim())?;
        let name = names::rotation(kind);
        let params = Params::new(&layout, config.magnitude_of(kind), norms, name, vb)?;
        let spec = Spec {
            path,
            kind,
            shape: base.shape.to_vec(),
            layout,
            asked: config.block_size,
            dropout: config.dropout,
            seed: config.seed,
            params,
        };
        Ok(Self {
            spec,
            state: State::default(),
        })
    }

    pub(crate) fn path(&self) -> &str {
        &self.spec.path
    }

    pub(crate) fn kind(&self) -> LayerKind {
        self.spec.kind
    }

    /// Shape of the frozen weight.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.spec.shape
    }

    pub(crate) fn layout(&self) -> &BlockLayout {
        &self.spec.layout
    }

    /// The block size that was asked for; the layout has the one in use.
    pub(crate) fn asked(&self) -> usize {
        self.spec.asked
    }

    pub(crate) fn params(&self) -> &Params {
        &self.spec.params
    }

    /// Whether it acts: switched on, and in no scope that suspends it.
    pub(crate) fn enabled(&self) -> bool {
        let state = &self.state;
        !state.disabled.load(Ordering::Relaxed) && state.suspended.load(Ordering::Relaxed) == 0
    }

    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.state.disabled.store(!enabled, Ordering::Relaxed);
    }

    /// Enters a scope that switches it off, until as many [`Adaptation::resume`].
    pub(crate) fn suspend(&self) {
        self.state.suspended.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn resume(&self) {
        self.state.suspended.fetch_sub(1, Ordering::Relaxed);
    }

    /// Enters a scope in which rotation and ratio stay at their present values, outside any graph,
    /// until as many [`Adaptation::release`].
    pub(crate) fn hold(&self) -> Result<()> {
        // Made outside the lock: a thread that waits for its part may run another pass meanwhile.
        let factors = self.present()?;
        let mut held = self.held_mut();
        if held.scopes == 0 {
            held.factors = Some(factors);
        }
        held.scopes += 1;
        Ok(())
    }

    pub(crate) fn release(&self) {
        let mut held = self.held_mut();
        held.scopes = held.scopes.saturating_sub(1);
        if held.scopes == 0 {
            held.factors = None;
        }
    }

    /// A copy with its own switches that answers constants only.
    pub(crate) fn inference(&self) -> Result<Self> {
        let held = Held {
            scopes: 1,
            factors: Some(self.present()?),
        };
        Ok(Self {
            spec: self.spec.clone(),
            state: State {
                disabled: AtomicBool::new(!self.enabled()),
                held: RwLock::new(held),
                ..State::default()
            },
        })
    }

    /// The blocks of the rotation, in the dtype of the parameters.
    pub(crate) fn rotation(&self) -> Result<Tensor> {
        match self.held() {
            Some(factors) => Ok(factors.r),
            None => self.made_rotation(),
        }
    }

    /// `m` for each row of the weight.
    pub(crate) fn magnitude(&self) -> Result<Tensor> {
        let params = &self.spec.params;
        let Some(held) = self.held() else {
            return params.magnitude();
        };
        Ok(match held.ratio {
            Some(ratio) => ratio.mul(params.norms())?,
            None => params.norms().clone(),
        })
    }

    /// What acts in one pass, or none when the adapter is off. Where rotation and ratio are held there
    /// is neither graph nor dropout.
    pub(crate) fn pass(&self, train: bool) -> Result<Option<Pass<'_>>> {
        if !self.enabled() {
            return Ok(None);
        }
        if let Some(Factors { r, ratio }) = self.held() {
            let ratio = Ratio::Held(ratio);
            return Ok(Some(Pass { r, ratio }));
        }
        let r = self.made_rotation()?;
        let r = match train && self.spec.dropout > 0. {
            true => self.drop_blocks(&r)?,
            false => r,
        };
        let ratio = Ratio::Made(&self.spec.params);
        Ok(Some(Pass { r, ratio }))
    }

    /// Refuses a pass that does not say whether it trains, where that makes a difference.
    pub(crate) fn check_mode(&self) -> Result<()> {
        match self.spec.dropout > 0. && self.enabled() && self.held().is_none() {
            true => Err(Error::DropoutMode {
                layer: self.spec.path.clone(),
            }),
            false => Ok(()),
        }
    }

    /// The weight that acts when the layer's is `weight`: computed in f32 or wider, rounded once.
    pub(crate) fn effective_weight(&self, weight: &Tensor) -> Result<Tensor> {
        if !self.enabled() {
            return Ok(weight.clone());
        }
        let Factors { r, ratio } = self.present()?;
        rotation::effective_weight(self.spec.kind, weight, &r, ratio.as_ref())
    }

    fn made_rotation(&self) -> Result<Tensor> {
        rotation::rotation(self.spec.params.rotation(), &self.spec.layout)
    }

    /// Rotation and ratio outside any graph: those that are held, or made from the parameters.
    fn present(&self) -> Result<Factors> {
        self.held().map_or_else(|| self.detached(), Ok)
    }

    /// Rotation and ratio made from the parameters, outside any graph.
    fn detached(&self) -> Result<Factors> {
        // A factor is its own ratio: without the copy it would go on training.
        let copy = |ratio: Tensor| ratio.detach().copy();
        Ok(Factors {
            r: self.made_rotation()?.detach(),
            ratio: self.spec.params.ratio()?.map(copy).transpose()?,
        })
    }

    // A panic elsewhere leaves the pair whole, so a poisoned lock is still good.
    fn held(&self) -> Option<Factors> {
        let held = self.state.held.read().unwrap_or_else(|e| e.into_inner());
        held.factors.clone()
    }

    fn held_mut(&self) -> RwLockWriteGuard<'_, Held> {
        self.state.held.write().unwrap_or_else(|e| e.into_inner())
    }

    /// Says which training step comes next, so that masks depend on (seed, path, step, pass) alone.
    pub(crate) fn set_step(&self, step: u64) {
        self.state.step.store(step, Ordering::Relaxed);
        self.state.passes.store(0, Ordering::Relaxed);
    }

    // Each block becomes the identity with probability p; nothing is rescaled.
    fn drop_blocks(&self, r: &Tensor) -> Result<Tensor> {
        let pass = self.state.passes.fetch_add(1, Ordering::Relaxed);
        let step = self.state.step.load(Ordering::Relaxed);
        let mut rng = SplitMix64::stream(self.spec.seed, &self.spec.path, [step, pass]);
        let (blocks, b, _) = r.dims3()?;
        let keep: Vec<f32> = (0..blocks)
            .map(|_| f32::from(u8::from(rng.uniform() >= self.spec.dropout)))
            .collect();
        let keep = Tensor::from_vec(keep, (blocks, 1, 1), r.device())?.to_dtype(r.dtype())?;
        let identity = Tensor::eye(b, r.dtype(), r.device())?.unsqueeze(0)?;
        let dropped = identity.broadcast_mul(&keep.affine(-1., 1.)?)?;
        Ok(r.broadcast_mul(&keep)?.add(&dropped)?)
    }
}
