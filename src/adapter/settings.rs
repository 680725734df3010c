//! [`Settings`]: what the parameters of a layer mean, which their names and shapes do not say.

use super::fingerprint::{differs, fingerprint};
use super::{Adaptation, Adapter};
use crate::config::{LayerKind, Magnitude, Map};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the parameters of one layer mean: read by other settings they are another layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    kind: LayerKind,
    shape: Vec<usize>,
    block_size: usize,
    block_share: bool,
    map: Map,
    scaled: bool,
    max_norm: Option<f64>,
    magnitude: Magnitude,
    base: Option<[f64; 5]>,
}

impl Settings {
    fn new(layer: &Adaptation) -> Result<Self> {
        let (layout, params) = (layer.layout(), layer.params());
        Ok(Self {
            kind: layer.kind(),
            shape: layer.shape().to_vec(),
            block_size: layout.block_size,
            block_share: layout.shared,
            map: layout.map,
            scaled: layout.scaled,
            max_norm: layout.max_norm,
            magnitude: params.kind(),
            base: fingerprint(params.norms())?,
        })
    }

    /// The first setting that differs, as it is here and there.
    pub(crate) fn difference(&self, other: &Self) -> Option<[String; 2]> {
        let pairs = self.fields().into_iter().zip(other.fields());
        let mut others = pairs.filter(|(here, there)| here != there);
        others.next().map(|(here, there)| [here, there])
    }

    fn fields(&self) -> [String; 8] {
        [
            format!("`kind` {:?}", self.kind),
            format!("`shape` {:?}", self.shape),
            format!("`block_size` {}", self.block_size),
            format!("`block_share` {}", self.block_share),
            format!("`map` {}", self.map),
            format!("`scaled` {}", self.scaled),
            match self.max_norm {
                Some(norm) => format!("`max_norm` {norm}"),
                None => "no `max_norm`".to_string(),
            },
            format!("`magnitude` {:?}", self.magnitude),
        ]
    }

    /// Whether the base weight is another, by its row norms.
    pub(crate) fn other_base(&self, other: &Self) -> bool {
        match (&self.base, &other.base) {
            (Some(a), Some(b)) => differs(a, b),
            (a, b) => a.is_some() != b.is_some(),
        }
    }
}

impl Adapter {
    /// The settings of every adapted layer, by its path.
    pub(crate) fn settings(&self) -> Result<BTreeMap<String, Settings>> {
        let layers = self.adapted();
        let settings = layers.map(|layer| Ok((layer.path().to_string(), Settings::new(layer)?)));
        settings.collect()
    }
}
