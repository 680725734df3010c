//! [`Strengths`]: one strength for all layers, and others for some.

use super::Pattern;
use crate::error::{Error, Result, nearest};

/// How much of an adapter is wanted: one strength for all layers, and others for those that patterns
/// match; of several that match, the last wins.
///
/// # Examples
///
/// ```
/// use candle_doft::config::Strengths;
///
/// let strengths = Strengths::from(0.5).with_rule("layers.[0-3].**", 0.25).with_rule("v_proj", 1.);
/// assert_eq!(strengths.of("layers.2.q_proj")?, 0.25);
/// assert_eq!(strengths.of("layers.2.v_proj")?, 1.);
/// assert_eq!(strengths.of("layers.9.q_proj")?, 0.5);
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[must_use = "`with_rule` returns the changed strengths"]
pub struct Strengths {
    /// The strength of every layer that no pattern matches: 1 for what the file means.
    pub value: f64,
    /// Layers with a strength of their own.
    pub rules: Vec<(Pattern, f64)>,
}

impl Default for Strengths {
    fn default() -> Self {
        Self::from(1.)
    }
}

impl From<f64> for Strengths {
    fn from(value: f64) -> Self {
        Self {
            value,
            rules: Vec::new(),
        }
    }
}

impl Strengths {
    /// Gives the layers that a pattern matches a strength of their own.
    pub fn with_rule(mut self, pattern: impl Into<Pattern>, value: f64) -> Self {
        self.rules.push((pattern.into(), value));
        self
    }

    /// The strength of the layer at `path`.
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`] when a pattern cannot be read.
    pub fn of(&self, path: &str) -> Result<f64> {
        for (pattern, value) in self.rules.iter().rev() {
            if pattern.matches(path)? {
                return Ok(*value);
            }
        }
        Ok(self.value)
    }

    /// Checks that every strength is a finite number.
    pub(crate) fn check_values(&self) -> Result<()> {
        let all = self.rules.iter().map(|(_, value)| *value);
        for strength in all.chain([self.value]) {
            if !strength.is_finite() {
                let reason = "it is not a finite number".to_string();
                return Err(Error::Strength { strength, reason });
            }
        }
        Ok(())
    }

    /// Checks that every pattern matches one of these layers.
    pub(crate) fn check_patterns<'a>(
        &self,
        paths: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<()> {
        for (pattern, _) in &self.rules {
            let mut matched = false;
            for path in paths.clone() {
                matched |= pattern.matches(path)?;
            }
            if !matched {
                return Err(Error::NoMatch {
                    field: "strength",
                    pattern: pattern.text().to_string(),
                    nearest: nearest(pattern.text(), paths),
                    hint: pattern.hint(),
                });
            }
        }
        Ok(())
    }
}
