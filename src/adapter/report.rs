//! [`Report`]: what an adapter adapts, as data and as a table.

use crate::config::LayerKind;
use std::fmt;

/// One layer of a [`Report`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerReport {
    /// Path of the layer.
    pub path: String,
    /// Its kind.
    pub kind: LayerKind,
    /// Shape of the frozen weight.
    pub shape: Vec<usize>,
    /// Block size in use.
    pub block_size: usize,
    /// Block size that was asked for.
    pub asked: usize,
    /// Blocks that act; 0, as the sizes, for low-rank matrices.
    pub blocks: usize,
    /// Rank of low-rank matrices.
    pub rank: Option<usize>,
    /// Trainable parameters, rotation and magnitude.
    pub parameters: usize,
}

/// What an adapter adapts. `Display` prints a table.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The adapted layers, by path.
    pub layers: Vec<LayerReport>,
    /// Layers built through the adapter that stay frozen.
    pub frozen_layers: usize,
    /// Trainable parameters: rotations, magnitudes and extra tensors.
    pub trainable: usize,
    /// Parameters of all layers built through the adapter, frozen and trainable. What the model
    /// builds elsewhere is not counted.
    pub total: usize,
}

impl Report {
    /// Trainable parameters in percent of all.
    pub fn percent(&self) -> f64 {
        100. * self.trainable as f64 / self.total.max(1) as f64
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widest = self.layers.iter().map(|l| l.path.len()).max();
        let width = widest.unwrap_or(0).max("layer".len());
        writeln!(
            f,
            "{:width$}  {:>14}  {:>6}  {:>6}  {:>10}",
            "layer", "weight", "block", "blocks", "parameters"
        )?;
        for layer in &self.layers {
            let shape: Vec<String> = layer.shape.iter().map(ToString::to_string).collect();
            write!(
                f,
                "{:width$}  {:>14}  {:>6}  {:>6}  {:>10}",
                layer.path,
                shape.join("x"),
                match layer.rank {
                    Some(rank) => format!("r{rank}"),
                    None => layer.block_size.to_string(),
                },
                layer.blocks,
                layer.parameters
            )?;
            if layer.block_size != layer.asked {
                write!(f, "  (block size {} was asked for)", layer.asked)?;
            }
            writeln!(f)?;
        }
        write!(
            f,
            "{} adapted, {} frozen; {} of {} parameters train ({:.2} %)",
            self.layers.len(),
            self.frozen_layers,
            self.trainable,
            self.total,
            self.percent()
        )
    }
}
