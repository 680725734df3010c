//! [`DoftConfig`]: what to adapt and how. Plain data, checked once against the width of a layer.
//!
//! [`DoftConfig::layout`] turns a configuration and a width into a [`BlockLayout`]; after that
//! nothing about sizes can go wrong any more.

mod kinds;
mod layout;
mod low_rank;
mod map;
mod pattern;
mod strengths;

pub use kinds::{LayerKind, Magnitude};
pub use layout::{BlockLayout, Indivisible, nearest_divisor};
pub use low_rank::LowRank;
pub use map::Map;
pub use pattern::{Pattern, Rule, Targets};
pub use strengths::Strengths;

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// What to adapt and how.
///
/// | field | default | purpose | range |
/// |---|---|---|---|
/// | `block_size` | 32 | width of a rotation block | at least 1 |
/// | `block_share` | false | one block, repeated along the input | |
/// | `map` | [`Map::Cayley`] | from skew matrix to rotation | |
/// | `scaled` | true | step normalisation: divide by [`Map::divisor`] | |
/// | `max_norm` | none | cap on the spectral norm of `Q` | above 0 |
/// | `magnitude` | [`Magnitude::Log`] | scale of each output channel | |
/// | `embedding_magnitude` | [`Magnitude::None`] | the same for embeddings, one per token: vocabularies are large | |
/// | `low_rank` | none | LoRA or DoRA in place of the rotation and its magnitude | [`LowRank`] |
/// | `dropout` | 0 | chance that a block is the identity in a training step | `0 <= p < 1` |
/// | `seed` | 0 | of the dropout masks | |
/// | `indivisible` | [`Indivisible::Nearest`] | block size that does not divide a width | |
/// | `targets` | [`Targets::All`] | layers to adapt | |
/// | `exclude` | empty | layers to leave alone, stronger than `targets` | |
/// | `rules` | empty | settings of single layers; of several that match, the last wins | |
///
/// # Examples
///
/// ```
/// use candle_doft::{DoftConfig, Magnitude};
///
/// let config = DoftConfig::default().with_block_size(16).with_magnitude(Magnitude::Factor);
/// let layout = config.layout("model.q_proj", 576)?;
/// assert_eq!((layout.blocks, layout.block_size), (36, 16));
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
#[must_use = "each `with_` answers the changed configuration"]
pub struct DoftConfig {
    /// Width of a rotation block.
    pub block_size: usize,
    /// One block for the whole input side.
    pub block_share: bool,
    /// From skew matrix to rotation.
    pub map: Map,
    /// Step normalisation (scaled OFT).
    pub scaled: bool,
    /// Cap on the spectral norm of `Q`.
    pub max_norm: Option<f64>,
    /// Parametrisation of the magnitude.
    pub magnitude: Magnitude,
    /// Parametrisation of the magnitude of embeddings, one for each token. A [`Rule`] that sets a
    /// magnitude sets this one, too.
    pub embedding_magnitude: Magnitude,
    /// Low-rank matrices in place of the rotation and its magnitude: LoRA or DoRA. The fields of rotations have no
    /// effect then, but a dropout above 0 is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low_rank: Option<LowRank>,
    /// Chance that a block becomes the identity, in training: the multiplicative dropout of
    /// arXiv:2311.06243. Nothing is rescaled.
    pub dropout: f64,
    /// Seed of the dropout masks.
    pub seed: u64,
    /// What to do with a block size that does not divide.
    pub indivisible: Indivisible,
    /// Layers to adapt.
    pub targets: Targets,
    /// Layers to leave alone.
    pub exclude: Vec<Pattern>,
    /// Settings of single layers.
    pub rules: Vec<Rule>,
}

impl Default for DoftConfig {
    fn default() -> Self {
        Self {
            block_size: 32,
            block_share: false,
            map: Map::default(),
            scaled: true,
            max_norm: None,
            magnitude: Magnitude::default(),
            embedding_magnitude: Magnitude::None,
            low_rank: None,
            dropout: 0.,
            seed: 0,
            indivisible: Indivisible::default(),
            targets: Targets::default(),
            exclude: Vec::new(),
            rules: Vec::new(),
        }
    }
}

impl DoftConfig {
    /// Plain OFT: rotations alone, no magnitude.
    pub fn oft() -> Self {
        Self::default().with_magnitude(Magnitude::None)
    }

    /// LoRA of scale `alpha / rank`.
    pub fn lora(rank: usize, alpha: f64) -> Self {
        Self::default().with_low_rank(LowRank::new(rank, alpha))
    }

    /// DoRA of scale `alpha / rank`.
    pub fn dora(rank: usize, alpha: f64) -> Self {
        Self::default().with_low_rank(LowRank::new(rank, alpha).with_dora(true))
    }

    /// Sets low-rank matrices in place of rotations; none sets rotations.
    pub fn with_low_rank(mut self, low_rank: impl Into<Option<LowRank>>) -> Self {
        self.low_rank = low_rank.into();
        self
    }

    /// Sets the width of a rotation block.
    pub fn with_block_size(mut self, block_size: usize) -> Self {
        self.block_size = block_size;
        self
    }

    /// Sets whether one block serves the whole input side.
    pub fn with_block_share(mut self, block_share: bool) -> Self {
        self.block_share = block_share;
        self
    }

    /// Sets the map from skew matrix to rotation.
    pub fn with_map(mut self, map: Map) -> Self {
        self.map = map;
        self
    }

    /// Switches step normalisation.
    pub fn with_scaled(mut self, scaled: bool) -> Self {
        self.scaled = scaled;
        self
    }

    /// Caps the spectral norm of `Q`.
    pub fn with_max_norm(mut self, max_norm: impl Into<Option<f64>>) -> Self {
        self.max_norm = max_norm.into();
        self
    }

    /// Sets the kind of magnitude.
    pub fn with_magnitude(mut self, magnitude: Magnitude) -> Self {
        self.magnitude = magnitude;
        self
    }

    /// Sets the kind of magnitude of embeddings.
    pub fn with_embedding_magnitude(mut self, magnitude: Magnitude) -> Self {
        self.embedding_magnitude = magnitude;
        self
    }

    /// Sets the chance that a block becomes the identity in a training step.
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = dropout;
        self
    }

    /// Sets the seed of the dropout masks.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets what happens when the block size does not divide the width of a layer.
    pub fn with_indivisible(mut self, indivisible: Indivisible) -> Self {
        self.indivisible = indivisible;
        self
    }

    /// Sets the layers to adapt.
    pub fn with_targets(mut self, targets: impl Into<Targets>) -> Self {
        self.targets = targets.into();
        self
    }

    /// Sets the layers to leave alone, instead of those set before.
    pub fn with_exclude<P: Into<Pattern>>(mut self, patterns: impl IntoIterator<Item = P>) -> Self {
        self.exclude = patterns.into_iter().map(Into::into).collect();
        self
    }

    /// Adds a rule for the layers that its pattern matches. Later rules win.
    pub fn with_rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] with the field, its value and its range; [`Error::Pattern`] for a pattern
    /// that cannot be read.
    pub fn validate(&self) -> Result<()> {
        let fail = |field, found: f64, expected: &str| Err(Error::config(field, found, expected));
        if self.block_size == 0 {
            return fail("block_size", 0., "at least 1");
        }
        self.map.check()?;
        if let Some(norm) = self.max_norm {
            check_max_norm(norm)?;
        }
        if !(0. ..1.).contains(&self.dropout) {
            return fail("dropout", self.dropout, "at least 0 and below 1");
        }
        if self.dropout > 0. && self.block_share {
            return fail("dropout", self.dropout, "0 when one block is shared");
        }
        if let Some(low_rank) = &self.low_rank {
            low_rank.check()?;
            if self.dropout > 0. {
                return fail("dropout", self.dropout, "0 with low-rank matrices");
            }
        }
        self.targets.validate()?;
        for pattern in &self.exclude {
            pattern.validate()?;
        }
        for rule in &self.rules {
            rule.pattern.validate()?;
            rule.apply(self).without_patterns().validate()?;
        }
        Ok(())
    }

    /// The settings of the layer at `path`: this configuration with every matching rule applied in
    /// order, and without patterns.
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`] for a rule whose pattern cannot be read.
    pub fn for_layer(&self, path: &str) -> Result<Self> {
        let mut config = self.clone();
        for rule in &self.rules {
            if rule.pattern.matches(path)? {
                config = rule.apply(&config);
            }
        }
        Ok(config.without_patterns())
    }

    /// The kind of magnitude that a kind of layer has.
    pub(crate) fn magnitude_of(&self, kind: LayerKind) -> Magnitude {
        match kind {
            LayerKind::Embedding => self.embedding_magnitude,
            LayerKind::Linear | LayerKind::Conv1d | LayerKind::Conv2d => self.magnitude,
        }
    }

    fn without_patterns(mut self) -> Self {
        self.targets = Targets::All;
        self.exclude.clear();
        self.rules.clear();
        self
    }
}

/// Refuses a cap on the spectral norm that is none.
pub(crate) fn check_max_norm(max_norm: f64) -> Result<()> {
    match max_norm > 0. && max_norm.is_finite() {
        true => Ok(()),
        false => Err(Error::config(
            "max_norm",
            max_norm,
            "a finite number above 0",
        )),
    }
}
