//! [`LayerKind`] and [`Magnitude`]: what can be adapted, and how its outputs are scaled.

use serde::{Deserialize, Serialize};

/// How the magnitude `m` of an output channel is parametrised. `n0` is the norm of the frozen row.
///
/// Every kind starts at `m = n0`, where the layer answers what its base answers.
///
/// # References
///
/// "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, section 4.1; its `m` is
/// [`Magnitude::Absolute`].
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

    /// The kind of a weight by its number of axes. That of an embedding cannot be told from a matrix.
    pub(crate) fn of_rank(rank: usize) -> Option<Self> {
        let kinds = [Self::Linear, Self::Conv1d, Self::Conv2d];
        kinds.into_iter().find(|kind| kind.rank() == rank)
    }

    /// Whether the weight is the kernel of a convolution.
    pub fn is_kernel(self) -> bool {
        match self {
            Self::Conv1d | Self::Conv2d => true,
            Self::Linear | Self::Embedding => false,
        }
    }

    /// Whether [`Targets::AllLinear`](super::Targets::AllLinear) means it.
    pub(crate) fn is_linear(self) -> bool {
        match self {
            Self::Linear => true,
            Self::Conv1d | Self::Conv2d | Self::Embedding => false,
        }
    }
}
