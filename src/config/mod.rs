//! [`DoftConfig`]: what to adapt and how. Plain data, checked once against the width of a layer.
//!
//! [`DoftConfig::layout`] turns a configuration and a width into a [`BlockLayout`]; after that
//! nothing about sizes can go wrong any more.

mod pattern;

pub use pattern::{Pattern, Rule, Targets};

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// How a skew-symmetric block becomes a rotation. [`rotation`](crate::rotation) has the formulas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Map {
    /// `(I + Q)(I - Q)^-1`, exactly orthogonal.
    #[default]
    Cayley,
    /// The truncated series of the Cayley transform that OneTrainer and PEFT train. Not orthogonal;
    /// here so that files trained with it mean what they meant.
    CayleyNeumann {
        /// Number of terms, 0 to 64. OneTrainer and PEFT use 5.
        terms: usize,
        /// Coefficient of the highest power, 1 or 2. Files written before PEFT 0.18 mean 2.
        last_coefficient: u8,
    },
    /// `exp(Q)`, exactly orthogonal.
    Exponential,
}

impl Map {
    /// The series as OneTrainer and PEFT (0.18 and newer) train it: five terms, last coefficient 1.
    pub const SERIES: Self = Self::CayleyNeumann {
        terms: 5,
        last_coefficient: 1,
    };

    /// Whether every `Q` gives an orthogonal `R`.
    pub fn is_orthogonal(&self) -> bool {
        !matches!(self, Self::CayleyNeumann { .. })
    }

    /// The divisor `c` of scaled OFT: `2 sqrt(b - 1)` for the Cayley maps, `sqrt(b - 1)` for the
    /// exponential, 1 where there is nothing to rotate (`block_size` up to 1).
    ///
    /// A row of `R - I` is about `2Q` for the Cayley maps and `Q` for the exponential. Adam moves
    /// each of its `b - 1` entries by about `lr`, so after division by `c` a unit row turns by `lr`.
    pub fn divisor(&self, block_size: usize) -> f64 {
        if block_size <= 1 {
            return 1.;
        }
        let root = ((block_size - 1) as f64).sqrt();
        match self {
            Self::Exponential => root,
            _ => 2. * root,
        }
    }
}

/// `cayley`, `exponential`, `neumann:T` or `neumann:T:2` for a series of `T` terms.
impl std::str::FromStr for Map {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let series = |terms: &str, last: &str| {
            Some(Self::CayleyNeumann {
                terms: terms.parse().ok().filter(|terms| *terms <= 64)?,
                last_coefficient: last.parse().ok().filter(|last| (1..=2).contains(last))?,
            })
        };
        let found = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("cayley"), None, ..) => Some(Self::Cayley),
            (Some("exponential"), None, ..) => Some(Self::Exponential),
            (Some("neumann"), Some(terms), last, None) => series(terms, last.unwrap_or("1")),
            _ => None,
        };
        found.ok_or_else(|| Error::Config {
            field: "map",
            found: format!("`{text}`"),
            expected: "cayley, exponential, neumann:T or neumann:T:2".into(),
        })
    }
}

/// How the magnitude `m` of an output channel is parametrised. `n0` is the norm of the frozen row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Magnitude {
    /// `m = n0 exp(mu)`, trained `mu` starts at 0. A step of `lr` changes `m` by about `lr` of itself.
    #[default]
    Log,
    /// `m = n0 f`, trained `f` starts at 1.
    Factor,
    /// `m` itself is trained and starts at `n0`.
    Absolute,
    /// No magnitude: plain OFT.
    None,
}

/// The kinds of layer that can be adapted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LayerKind {
    /// A linear layer, weight `(out, in)`.
    Linear,
    /// A one-dimensional convolution, weight `(out, in/groups, k)`.
    Conv1d,
    /// A two-dimensional convolution, weight `(out, in/groups, kh, kw)`.
    Conv2d,
    /// An embedding, table `(vocabulary, hidden)`.
    Embedding,
}

impl LayerKind {
    /// Number of axes of the layer's weight.
    pub fn rank(self) -> usize {
        match self {
            Self::Linear | Self::Embedding => 2,
            Self::Conv1d => 3,
            Self::Conv2d => 4,
        }
    }

    /// Whether the weight is the kernel of a convolution.
    pub fn is_kernel(self) -> bool {
        matches!(self, Self::Conv1d | Self::Conv2d)
    }
}

/// What to do when the block size does not divide the width of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Indivisible {
    /// Take the nearest divisor, ties go down, as OneTrainer and PEFT do. The report says so.
    #[default]
    Nearest,
    /// Answer [`Error::BlockSize`].
    Error,
}

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
    /// Chance that a block becomes the identity, in training.
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
            dropout: 0.,
            seed: 0,
            indivisible: Indivisible::default(),
            targets: Targets::default(),
            exclude: Vec::new(),
            rules: Vec::new(),
        }
    }
}

/// A configuration that met the width of a layer: sizes that fit, and how to use them.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct BlockLayout {
    /// Input width of the layer, `blocks * block_size`.
    pub width: usize,
    /// Width `b` of one block.
    pub block_size: usize,
    /// Number `D` of blocks that act.
    pub blocks: usize,
    /// One stored block acts `blocks` times.
    pub shared: bool,
    /// From skew matrix to rotation.
    pub map: Map,
    /// Step normalisation.
    pub scaled: bool,
    /// Cap on the spectral norm of `Q`.
    pub max_norm: Option<f64>,
}

impl BlockLayout {
    /// Rows of the packed parameter: 1 when shared, else `blocks`.
    pub fn rows(&self) -> usize {
        if self.shared { 1 } else { self.blocks }
    }

    /// Entries of a packed block, `b (b - 1) / 2`.
    pub fn entries(&self) -> usize {
        self.block_size * (self.block_size - 1) / 2
    }

    /// What the packed parameter is divided by before it becomes `Q`.
    pub fn divisor(&self) -> f64 {
        if self.scaled {
            self.map.divisor(self.block_size)
        } else {
            1.
        }
    }
}

/// The divisor of `width` nearest to `asked`, ties go down. OneTrainer's and PEFT's rule.
///
/// Both must be at least 1; anything from `width` up answers `width`.
pub fn nearest_divisor(width: usize, asked: usize) -> usize {
    if asked >= width {
        return width;
    }
    let down = (1..=asked)
        .rev()
        .find(|d| width.is_multiple_of(*d))
        .unwrap_or(1);
    let up = (asked..=width)
        .find(|d| width.is_multiple_of(*d))
        .unwrap_or(width);
    if asked - down <= up - asked { down } else { up }
}

impl DoftConfig {
    /// Plain OFT: rotations alone, no magnitude.
    pub fn oft() -> Self {
        Self::default().with_magnitude(Magnitude::None)
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

    /// Adds layers to leave alone.
    pub fn with_exclude<P: Into<Pattern>>(mut self, patterns: impl IntoIterator<Item = P>) -> Self {
        self.exclude.extend(patterns.into_iter().map(Into::into));
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
        let fail = |field, found: String, expected: &str| {
            Err(Error::Config {
                field,
                found,
                expected: expected.to_string(),
            })
        };
        if self.block_size == 0 {
            return fail("block_size", "0".into(), "at least 1");
        }
        if let Map::CayleyNeumann {
            terms,
            last_coefficient,
        } = self.map
        {
            if terms > 64 {
                return fail("map.terms", terms.to_string(), "at most 64");
            }
            if !(1..=2).contains(&last_coefficient) {
                return fail(
                    "map.last_coefficient",
                    last_coefficient.to_string(),
                    "1 or 2",
                );
            }
        }
        if let Some(norm) = self.max_norm
            && !(norm > 0. && norm.is_finite())
        {
            return fail("max_norm", norm.to_string(), "a finite number above 0");
        }
        if !(0. ..1.).contains(&self.dropout) {
            return fail(
                "dropout",
                self.dropout.to_string(),
                "at least 0 and below 1",
            );
        }
        if self.dropout > 0. && self.block_share {
            return fail(
                "dropout",
                self.dropout.to_string(),
                "0 when one block is shared",
            );
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

    /// Checks the configuration and fits it to a layer of input width `width`. Rules are the
    /// business of [`DoftConfig::for_layer`]; `path` only names the layer in errors.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a field out of range, [`Error::BlockSize`] when the block size does not
    /// divide and may not be adjusted, [`Error::NothingToRotate`] when only 1 divides nearby.
    pub fn layout(&self, path: &str, width: usize) -> Result<BlockLayout> {
        self.validate()?;
        if width == 0 {
            return Err(Error::Shape {
                layer: path.to_string(),
                what: "the weight",
                found: vec![0],
                expected: "an input width of at least 1".to_string(),
            });
        }
        let asked = self.block_size;
        let block_size = nearest_divisor(width, asked);
        if self.indivisible == Indivisible::Error && !width.is_multiple_of(asked) {
            return Err(Error::BlockSize {
                layer: path.to_string(),
                asked,
                width,
                nearest: block_size,
            });
        }
        if block_size == 1 {
            return Err(Error::NothingToRotate {
                layer: path.to_string(),
                asked,
                width,
            });
        }
        Ok(BlockLayout {
            width,
            block_size,
            blocks: width / block_size,
            shared: self.block_share,
            map: self.map,
            scaled: self.scaled,
            max_norm: self.max_norm,
        })
    }

    /// The kind of magnitude that a kind of layer has.
    pub(crate) fn magnitude_of(&self, kind: LayerKind) -> Magnitude {
        match kind {
            LayerKind::Embedding => self.embedding_magnitude,
            _ => self.magnitude,
        }
    }

    fn without_patterns(mut self) -> Self {
        self.targets = Targets::All;
        self.exclude.clear();
        self.rules.clear();
        self
    }
}
