//! What a conversion may change on the way, and what it changed.

use crate::adapter::Warning;
use crate::config::Strengths;

/// What [`convert_with`](super::convert_with) changes on the way. By default nothing.
///
/// # Examples
///
/// ```
/// use candle_doft::config::Strengths;
/// use candle_doft::file::Changes;
///
/// let undone = Changes::default().with_strength(Strengths::from(-1.));
/// let mended = Changes::default().with_projection(true);
/// assert_ne!(undone, mended);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
#[must_use = "each `with_` returns the changed value"]
pub struct Changes {
    /// Does a strength in the file, by the geodesic: planes turn by `s` times their angle, ratios become
    /// `ratio^s`; -1 undoes the adapter. A plane has to stay below 180 degrees.
    pub strength: Strengths,
    /// Replaces each map that is not orthogonal by the Cayley map of its polar factor, before anything
    /// else.
    pub projection: bool,
}

impl Changes {
    /// Sets [`Changes::strength`].
    pub fn with_strength(mut self, strength: impl Into<Strengths>) -> Self {
        self.strength = strength.into();
        self
    }

    /// Sets [`Changes::projection`].
    pub fn with_projection(mut self, projection: bool) -> Self {
        self.projection = projection;
        self
    }
}

/// Why a layer computes something else than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// Its series was projected on rotations.
    Projection,
    /// The readers of the target compute a series in the place of its map.
    Series,
}

/// How far a layer is from what it was.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerChange {
    /// Its path.
    pub path: String,
    /// Why.
    pub cause: Cause,
    /// The largest `|R' - R|` of an entry.
    pub largest_entry: f64,
    /// The largest `|dW| / |W|` that this gives any weight: the spectral norm of `R' - R`.
    pub weight_share: f64,
}

impl LayerChange {
    pub(super) fn new(path: &str, cause: Cause, largest_entry: f64, weight_share: f64) -> Self {
        Self {
            path: path.to_string(),
            cause,
            largest_entry,
            weight_share,
        }
    }
}

/// What a conversion did.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Conversion {
    /// What readers of the result should know.
    pub warnings: Vec<Warning>,
    /// Layers that compute something else than before; those whose strength was asked for are not named.
    pub changes: Vec<LayerChange>,
}

/// One warning for all layers that a cause changed: the one that changed most, and by how much.
pub(super) fn warning(changes: &[LayerChange], cause: Cause, what: &str) -> Option<Warning> {
    let of_cause = || changes.iter().filter(|change| change.cause == cause);
    let most = of_cause().max_by(|a, b| a.weight_share.total_cmp(&b.weight_share))?;
    let entry = of_cause().fold(0f64, |most, change| most.max(change.largest_entry));
    let message = format!(
        "{what} |R' - R| up to {entry:.1e}, |dW| up to {:.3} % of |W|, most in this layer of {}",
        100. * most.weight_share,
        of_cause().count()
    );
    Some(Warning::new(&most.path, message))
}
