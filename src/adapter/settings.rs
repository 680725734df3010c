//! [`Settings`]: what the parameters of a layer mean, which their names and shapes do not say.

use super::fingerprint::{differs, fingerprint};
use super::{Adaptation, Adapter};
use crate::config::{LayerKind, LowRank, Magnitude, Map};
use crate::error::Result;
use crate::layer::Form;
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    low_rank: Option<LowRank>,
    base: Option<[f64; 5]>,
}

impl Settings {
    fn new(layer: &Adaptation) -> Result<Self> {
        let mut settings = Self {
            kind: layer.kind(),
            shape: layer.shape().to_vec(),
            block_size: 0,
            block_share: false,
            map: Map::default(),
            scaled: false,
            max_norm: None,
            magnitude: Magnitude::None,
            low_rank: None,
            base: fingerprint(layer.norms())?,
        };
        match layer.form() {
            Form::Rotation { layout, params, .. } => {
                settings.block_size = layout.block_size;
                settings.block_share = layout.shared;
                settings.map = layout.map;
                settings.scaled = layout.scaled;
                settings.max_norm = layout.max_norm;
                settings.magnitude = params.kind();
            }
            Form::LowRank(params) => settings.low_rank = Some(params.spec()),
        }
        Ok(settings)
    }

    /// The first setting that differs, as it is here and there.
    pub(crate) fn difference(&self, other: &Self) -> Option<[String; 2]> {
        let pairs = self.fields().into_iter().zip(other.fields());
        let mut others = pairs.filter(|(here, there)| here != there);
        others.next().map(|(here, there)| [here, there])
    }

    fn fields(&self) -> [String; 9] {
        [
            format!("`low_rank` {:?}", self.low_rank),
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
