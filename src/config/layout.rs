//! [`BlockLayout`]: how a width is cut into blocks.

use super::{DoftConfig, Map};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

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

/// A configuration that met the width of a layer: sizes that fit, and how to use them. Made by
/// [`DoftConfig::layout`].
///
/// # Examples
///
/// ```
/// use candle_doft::DoftConfig;
///
/// let layout = DoftConfig::default().with_block_size(32).layout("layers.0.q_proj", 576)?;
/// assert_eq!((layout.blocks, layout.rows(), layout.entries()), (18, 18, 496));
/// assert_eq!(layout.divisor(), 2. * 31f64.sqrt());
/// # Ok::<(), candle_doft::Error>(())
/// ```
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
/// Anything from `width` up answers `width`, and 0 answers 1.
///
/// # Examples
///
/// ```
/// use candle_doft::config::nearest_divisor;
///
/// assert_eq!(nearest_divisor(576, 32), 32);
/// assert_eq!(nearest_divisor(49, 32), 49); // of 7 and 49
/// assert_eq!(nearest_divisor(10, 3), 2); // of 2 and 5
/// ```
pub fn nearest_divisor(width: usize, asked: usize) -> usize {
    let small = (1..=width.isqrt()).filter(|d| width.is_multiple_of(*d));
    let divisors = small.flat_map(|d| [d, width / d]);
    let nearest = divisors.min_by_key(|d| (d.abs_diff(asked), *d));
    nearest.unwrap_or(width)
}

impl DoftConfig {
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
            let expected = "an input width of at least 1";
            return Err(Error::shape(path, "the weight", &[0], expected));
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
}
