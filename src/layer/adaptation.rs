//! [`Adaptation`]: the adapter of one layer. Its parameters, and what they are in one pass.

use super::low_rank::LowRankParams;
use super::mode::{Acts, Factors, Pass};
use super::replay;
use crate::config::{BlockLayout, DoftConfig, LayerKind};
use crate::error::{Error, Result};
use crate::frozen::Base;
use crate::params::{Params, names, row_norms_of};
use crate::rng::SplitMix64;
use crate::rotation;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// The adapter of one layer. Layers hold it in an `Arc`, so that clones train the same parameters.
#[derive(Debug)]
pub(crate) struct Adaptation {
    id: u64,
    path: String,
    kind: LayerKind,
    shape: Vec<usize>,
    form: Form,
    dropout: f64,
    seed: u64,
    /// Row norms of a base that can be set, until a pass has found them unchanged.
    unverified: Mutex<Option<Tensor>>,
    /// Training step, and training passes since it began: what dropout masks are made from.
    step: AtomicU64,
    passes: AtomicU64,
}

/// What is trained.
#[derive(Debug)]
pub(crate) enum Form {
    /// A rotation, and mostly a magnitude.
    Rotation {
        layout: BlockLayout,
        /// The block size of the configuration; the layout has the one in use.
        requested_block_size: usize,
        params: Params,
    },
    /// LoRA or DoRA.
    LowRank(LowRankParams),
}

impl Adaptation {
    /// Fits the configuration to `base`, which was checked, and gets the parameters from `vb`, whose
    /// prefix is the layer's path. `norms` are the row norms of the base, where they are known already.
    pub(crate) fn new(
        id: u64,
        kind: LayerKind,
        base: &Base,
        config: &DoftConfig,
        norms: Option<Tensor>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let path = vb.prefix();
        let given = norms.is_some();
        let norms = match norms {
            Some(norms) => norms,
            None => row_norms_of(base.weight)?,
        };
        check_finite(&path, &norms)?;
        let unverified = match (base.weight.is_variable(), given) {
            (false, _) => None,
            (true, false) => Some(norms.clone()),
            (true, true) => Some(row_norms_of(base.weight)?),
        };
        let config = config.for_layer(&path)?;
        let form = match config.low_rank {
            Some(spec) => Form::LowRank(LowRankParams::new(
                spec,
                kind,
                base,
                norms,
                config.seed,
                vb,
            )?),
            None => {
                let layout = config.layout(&path, base.weight.in_dim())?;
                let name = names::rotation(kind);
                let params = Params::new(&layout, config.magnitude_of(kind), norms, name, vb)?;
                Form::Rotation {
                    layout,
                    requested_block_size: config.block_size,
                    params,
                }
            }
        };
        Ok(Self {
            id,
            path,
            kind,
            shape: base.shape.to_vec(),
            form,
            dropout: config.dropout,
            seed: config.seed,
            unverified: Mutex::new(unverified),
            step: AtomicU64::new(0),
            passes: AtomicU64::new(0),
        })
    }

    /// The id of its layer.
    pub(crate) fn id(&self) -> u64 {
        self.id
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

    pub(crate) fn form(&self) -> &Form {
        &self.form
    }

    /// The trainable tensors with their names, each with whether it is a magnitude.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor, bool)> {
        match &self.form {
            Form::Rotation { params, .. } => {
                let rotation = (names::rotation(self.kind), params.rotation(), false);
                let magnitude = names::magnitude(params.kind()).zip(params.magnitude_parameter());
                let magnitude = magnitude.map(|(name, tensor)| (name, tensor, true));
                [Some(rotation), magnitude].into_iter().flatten().collect()
            }
            Form::LowRank(params) => {
                let (a, b) = names::low_rank(self.kind);
                let mut all = vec![(a, params.a(), false), (b, params.b(), false)];
                all.extend(params.magnitude().map(|m| (names::DORA, m, true)));
                all
            }
        }
    }

    /// Row norms `n0` of the base.
    pub(crate) fn norms(&self) -> &Tensor {
        match &self.form {
            Form::Rotation { params, .. } => params.norms(),
            Form::LowRank(params) => params.norms(),
        }
    }

    /// What acts as it is now, outside any graph.
    pub(crate) fn factors(&self, base: &Base) -> Result<Factors> {
        Ok(match &self.form {
            Form::Rotation { layout, params, .. } => {
                // A factor is its own ratio: without the copy it would go on training.
                let copy = |ratio: Tensor| ratio.detach().copy();
                Factors::Rotation {
                    r: rotation::rotation(params.rotation(), layout)?.detach(),
                    ratio: params.ratio()?.map(copy).transpose()?,
                }
            }
            Form::LowRank(params) => Factors::LowRank(params.held(base)?),
        })
    }

    /// What acts in a pass of training: a part of the graph, with dropout.
    pub(crate) fn training(&self, base: &Base) -> Result<Acts<'_>> {
        match &self.form {
            Form::Rotation { layout, params, .. } => {
                let r = rotation::rotation(params.rotation(), layout)?;
                let r = if self.dropout > 0. {
                    self.drop_blocks(&r)?
                } else {
                    r
                };
                Ok(Acts::Rotation(Pass::made(r, params)))
            }
            Form::LowRank(params) => Ok(Acts::LowRank(params.pass(base)?)),
        }
    }

    /// Checks, once, that the values of the base are those that the layer was built over: candle's models
    /// are often built first and loaded then, through `VarMap::load`.
    pub(crate) fn check_unchanged(&self, base: &Base) -> Result<()> {
        // A panic elsewhere leaves the norms whole, so a poisoned lock is still good.
        let mut unverified = self.unverified.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(norms) = &*unverified {
            // By their bits: a NaN that was there before has not changed.
            let bits = |norms: &Tensor| -> Result<Vec<u64>> {
                let norms = norms.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
                Ok(norms.to_vec1()?.into_iter().map(f64::to_bits).collect())
            };
            if bits(&row_norms_of(base.weight)?)? != bits(norms)? {
                return Err(Error::BaseChanged {
                    layer: self.path.clone(),
                });
            }
            *unverified = None;
        }
        Ok(())
    }

    /// The weight that acts, whatever the mode: computed in f32 or wider, rounded once.
    pub(crate) fn effective_weight(&self, base: &Base, weight: &Tensor) -> Result<Tensor> {
        match (&self.form, self.factors(base)?) {
            (Form::LowRank(params), _) => params.effective_weight(base, weight),
            (_, Factors::Rotation { r, ratio }) => {
                rotation::effective_weight(self.kind, weight, &r, ratio.as_ref())
            }
            (_, Factors::LowRank(_)) => Ok(weight.clone()),
        }
    }

    /// Says which training step comes next, so that masks depend on (seed, path, step, pass) alone.
    pub(crate) fn set_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
        self.passes.store(0, Ordering::Relaxed);
    }

    // Each block becomes the identity with probability p; nothing is rescaled.
    fn drop_blocks(&self, r: &Tensor) -> Result<Tensor> {
        let at = replay::drawn(self.id, || {
            let pass = self.passes.fetch_add(1, Ordering::Relaxed);
            [self.step.load(Ordering::Relaxed), pass]
        });
        let mut rng = SplitMix64::stream(self.seed, &self.path, at);
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

/// Returns an error for a base weight with a row whose norm is no number.
pub(crate) fn check_finite(layer: &str, norms: &Tensor) -> Result<()> {
    let norms: Vec<f64> = norms
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .to_vec1()?;
    match norms.iter().position(|norm| !norm.is_finite()) {
        None => Ok(()),
        Some(row) => Err(Error::BaseNotFinite {
            layer: layer.to_string(),
            row,
            found: norms[row],
        }),
    }
}
