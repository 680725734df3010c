//! Which layers a configuration means: names, globs and regular expressions over dotted paths.

use super::{DoftConfig, LowRank, Magnitude, Map};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

/// A pattern over dotted layer paths such as `model.layers.3.self_attn.q_proj`.
///
/// A string becomes a [`Pattern::Glob`] if it holds one of `*?[{`, else a [`Pattern::Name`].
///
/// # Examples
///
/// ```
/// use candle_doft::Pattern;
///
/// let path = "model.layers.3.self_attn.q_proj";
/// for pattern in ["q_proj", "self_attn.q_proj", "**.{q,v}_proj", "model.layers.[0-7].*.*"] {
///     assert!(Pattern::from(pattern).matches(path)?, "{pattern}");
/// }
/// assert!(!Pattern::from("proj").matches(path)?);
/// assert!(!Pattern::from("model.*").matches(path)?); // a star stops at a dot
/// assert!(Pattern::Regex(r".*\.[1-3]\..*".into()).matches(path)?);
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Pattern {
    /// The whole path, or its end after a dot: `q_proj`, `self_attn.q_proj`.
    Name(String),
    /// The whole path with `*` (anything but a dot), `**` (any segments), `?`, `[..]`, `{a,b}`.
    Glob(String),
    /// A regular expression that matches the whole path.
    Regex(String),
}

impl Pattern {
    /// The text of the pattern.
    pub fn text(&self) -> &str {
        match self {
            Self::Name(text) | Self::Glob(text) | Self::Regex(text) => text,
        }
    }

    /// Whether the layer at `path` is meant.
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`] when the pattern cannot be read.
    pub fn matches(&self, path: &str) -> Result<bool> {
        Ok(match self {
            Self::Name(name) => path
                .strip_suffix(name.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
            Self::Glob(glob) => glob_matcher(glob)?.is_match(path.replace('.', "/")),
            Self::Regex(regex) => regex_matcher(regex)?.is_match(path),
        })
    }

    /// What a text that matches nothing was probably meant to be.
    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::Name(text) | Self::Glob(text) if text.contains(',') && !text.contains('{') => {
                "; a list of patterns is given as one string each, as in `[\"a\", \"b\"]`"
            }
            Self::Name(text) | Self::Glob(text)
                if text.contains(['|', '\\', '(', '^', '$', '+']) || text.contains(".*") =>
            {
                "; a plain string is a name or a glob, a regular expression is `Pattern::Regex`"
            }
            _ => "",
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        match self {
            Self::Name(name) if name.is_empty() => Err(Error::Pattern {
                pattern: String::new(),
                reason: "it is empty".to_string(),
            }),
            _ => self.matches("").map(|_| ()),
        }
    }
}

fn failed(pattern: &str) -> impl Fn(&dyn std::fmt::Display) -> Error {
    move |reason| Error::Pattern {
        pattern: pattern.to_string(),
        reason: reason.to_string(),
    }
}

/// Compiled patterns by their text: a rule is matched with every layer, and compiling takes far longer
/// than matching.
type Compiled<T> = LazyLock<Mutex<HashMap<String, T>>>;

/// More are not kept: a program has a few rules, and text that is made up has no end.
const KEPT: usize = 1024;

fn compiled<T: Clone>(
    cache: &Compiled<T>,
    text: &str,
    compile: impl FnOnce() -> Result<T>,
) -> Result<T> {
    // A panic elsewhere leaves the map whole, so a poisoned lock is still good.
    let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = cache.get(text) {
        return Ok(found.clone());
    }
    let made = compile()?;
    if cache.len() >= KEPT {
        cache.clear();
    }
    cache.insert(text.to_string(), made.clone());
    Ok(made)
}

// A dotted path is matched as a file path, so that `*` stops at a dot.
fn glob_matcher(glob: &str) -> Result<Arc<globset::GlobMatcher>> {
    static CACHE: Compiled<Arc<globset::GlobMatcher>> = LazyLock::new(Mutex::default);
    compiled(&CACHE, glob, || {
        let built = globset::GlobBuilder::new(&glob.replace('.', "/"))
            .literal_separator(true)
            .build();
        let built = built.map_err(|e| failed(glob)(e.kind()))?;
        Ok(Arc::new(built.compile_matcher()))
    })
}

fn regex_matcher(regex: &str) -> Result<regex::Regex> {
    static CACHE: Compiled<regex::Regex> = LazyLock::new(Mutex::default);
    compiled(&CACHE, regex, || {
        regex::Regex::new(&format!("^(?:{regex})$")).map_err(|e| failed(regex)(&e))
    })
}

impl From<&str> for Pattern {
    fn from(text: &str) -> Self {
        if text.contains(['*', '?', '[', '{']) {
            Self::Glob(text.to_string())
        } else {
            Self::Name(text.to_string())
        }
    }
}

impl From<String> for Pattern {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

/// The layers to adapt, among those built through an adapter.
///
/// # Examples
///
/// ```
/// use candle_doft::{DoftConfig, Targets};
///
/// let config = DoftConfig::default().with_targets(["q_proj", "layers.[0-7].*.v_proj"]);
/// assert!(matches!(config.targets, Targets::Patterns(patterns) if patterns.len() == 2));
/// assert_eq!(Targets::from("all-linear"), Targets::AllLinear);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Targets {
    /// Every layer.
    #[default]
    All,
    /// Every linear layer: no convolution, no embedding.
    AllLinear,
    /// No layer: the model is the frozen one. An adapter may then hold extra tensors alone, or nothing.
    None,
    /// The layers that at least one pattern matches. A pattern that matches no layer is an error.
    Patterns(Vec<Pattern>),
}

impl Targets {
    pub(super) fn validate(&self) -> Result<()> {
        match self {
            Self::Patterns(patterns) if patterns.is_empty() => Err(Error::config(
                "targets",
                "an empty list",
                "at least one pattern, `Targets::All` or `Targets::None`",
            )),
            Self::Patterns(patterns) => patterns.iter().try_for_each(Pattern::validate),
            Self::All | Self::AllLinear | Self::None => Ok(()),
        }
    }
}

/// `"all-linear"` is [`Targets::AllLinear`], anything else one pattern.
impl From<&str> for Targets {
    fn from(text: &str) -> Self {
        match text {
            "all-linear" => Self::AllLinear,
            text => Self::Patterns(vec![text.into()]),
        }
    }
}

impl From<Pattern> for Targets {
    fn from(pattern: Pattern) -> Self {
        Self::Patterns(vec![pattern])
    }
}

impl From<String> for Targets {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl<P: Into<Pattern>> From<Vec<P>> for Targets {
    fn from(patterns: Vec<P>) -> Self {
        Self::Patterns(patterns.into_iter().map(Into::into).collect())
    }
}

impl<P: Into<Pattern>, const N: usize> From<[P; N]> for Targets {
    fn from(patterns: [P; N]) -> Self {
        Self::Patterns(patterns.into_iter().map(Into::into).collect())
    }
}

/// Settings for the layers that a pattern matches; what is not set stays as in the configuration.
///
/// # Examples
///
/// ```
/// use candle_doft::{DoftConfig, config::Rule};
///
/// let config = DoftConfig::default().with_rule(Rule::new("down_proj").with_block_size(64));
/// assert_eq!(config.for_layer("layers.0.down_proj")?.block_size, 64);
/// assert_eq!(config.for_layer("layers.0.up_proj")?.block_size, 32);
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
#[must_use = "each `with_` answers the changed rule"]
pub struct Rule {
    /// The layers that are meant.
    pub pattern: Pattern,
    /// Width of a rotation block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<usize>,
    /// One block for the whole input side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_share: Option<bool>,
    /// From skew matrix to rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<Map>,
    /// Step normalisation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaled: Option<bool>,
    /// Cap on the spectral norm of `Q`; 0 takes a cap away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_norm: Option<f64>,
    /// Kind of magnitude.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub magnitude: Option<Magnitude>,
    /// Low-rank matrices in place of the rotation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_rank: Option<LowRank>,
    /// Chance that a block becomes the identity, in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
}

impl Rule {
    /// A rule that changes nothing yet.
    pub fn new(pattern: impl Into<Pattern>) -> Self {
        Self {
            pattern: pattern.into(),
            block_size: None,
            block_share: None,
            map: None,
            scaled: None,
            max_norm: None,
            magnitude: None,
            low_rank: None,
            dropout: None,
        }
    }

    /// Sets the width of a rotation block.
    pub fn with_block_size(mut self, block_size: usize) -> Self {
        self.block_size = Some(block_size);
        self
    }

    /// Sets whether one block serves the whole input side.
    pub fn with_block_share(mut self, block_share: bool) -> Self {
        self.block_share = Some(block_share);
        self
    }

    /// Sets the map from skew matrix to rotation.
    pub fn with_map(mut self, map: Map) -> Self {
        self.map = Some(map);
        self
    }

    /// Switches step normalisation.
    pub fn with_scaled(mut self, scaled: bool) -> Self {
        self.scaled = Some(scaled);
        self
    }

    /// Caps the spectral norm of `Q`; 0 takes a cap away.
    pub fn with_max_norm(mut self, max_norm: f64) -> Self {
        self.max_norm = Some(max_norm);
        self
    }

    /// Sets the kind of magnitude.
    pub fn with_magnitude(mut self, magnitude: Magnitude) -> Self {
        self.magnitude = Some(magnitude);
        self
    }

    /// Sets low-rank matrices in place of the rotation.
    pub fn with_low_rank(mut self, low_rank: LowRank) -> Self {
        self.low_rank = Some(low_rank);
        self
    }

    /// Sets the chance that a block becomes the identity in a training step.
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = Some(dropout);
        self
    }

    pub(super) fn apply(&self, config: &DoftConfig) -> DoftConfig {
        let mut config = config.clone();
        config.block_size = self.block_size.unwrap_or(config.block_size);
        config.block_share = self.block_share.unwrap_or(config.block_share);
        config.map = self.map.unwrap_or(config.map);
        config.scaled = self.scaled.unwrap_or(config.scaled);
        config.max_norm = match self.max_norm {
            Some(0.) => None,
            Some(norm) => Some(norm),
            None => config.max_norm,
        };
        config.magnitude = self.magnitude.unwrap_or(config.magnitude);
        config.embedding_magnitude = self.magnitude.unwrap_or(config.embedding_magnitude);
        config.low_rank = self.low_rank.or(config.low_rank);
        config.dropout = self.dropout.unwrap_or(config.dropout);
        config
    }
}
