//! Both checkpoints, and what is to be done with each tensor.

use super::super::header::{self, Source};
use crate::adapter::{check_patterns, selects};
use crate::config::{DoftConfig, LayerKind, Targets};
use crate::error::{Error, Result, shown};
use std::collections::BTreeMap;
use std::path::Path;

/// A checkpoint of several files, and which of them has a tensor.
pub(super) struct Checkpoint {
    pub(super) sources: Vec<Source>,
    pub(super) places: BTreeMap<String, usize>,
}

impl Checkpoint {
    fn open(path: &Path) -> Result<Self> {
        let (mut sources, mut places) = (Vec::new(), BTreeMap::new());
        for file in header::checkpoints(path)? {
            let source = Source::open(&file)?;
            for name in source.names() {
                if places.insert(name.clone(), sources.len()).is_some() {
                    let reason = format!(
                        "another file of the folder has `{}` as well; keep one of them",
                        shown(&name)
                    );
                    return Err(Error::file(&file, reason));
                }
            }
            sources.push(source);
        }
        Ok(Self { sources, places })
    }

    pub(super) fn source(&self, name: &str) -> Option<&Source> {
        let place = self.places.get(name)?;
        self.sources.get(*place)
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let source = self.sources.get(*self.places.get(name)?)?;
        source.info(name).ok().map(|info| info.shape.clone())
    }
}

/// What is to be done with a tensor of the base.
pub(super) enum Planned {
    /// A layer that is to be adapted.
    Layer { path: String, kind: LayerKind },
    /// Anything else, with the reason.
    Other(&'static str),
    /// The fine-tune lacks it.
    Missing,
}

/// Both checkpoints.
pub(super) struct Pairs<'a> {
    pub(super) base: Checkpoint,
    pub(super) tuned: Checkpoint,
    /// For errors.
    pub(super) tuned_path: &'a Path,
}

impl<'a> Pairs<'a> {
    pub(super) fn open(base: &Path, tuned: &'a Path) -> Result<Self> {
        Ok(Self {
            base: Checkpoint::open(base)?,
            tuned: Checkpoint::open(tuned)?,
            tuned_path: tuned,
        })
    }

    /// What to do with each tensor of the base; names and shapes are checked before anything is computed.
    pub(super) fn plan(&self, config: &DoftConfig) -> Result<Vec<(String, Planned)>> {
        let mut plan = Vec::new();
        let mut paths = Vec::new();
        // In the order of the data, so that files are read from front to back.
        for name in self.base.sources.iter().flat_map(Source::names) {
            let shape = self.base.shape(&name).unwrap_or_default();
            let planned = planned(config, &name, &shape)?;
            if let (Some(path), true) = (name.strip_suffix(".weight"), shape.len() > 1) {
                paths.push(path.to_string());
            }
            let planned = match (self.tuned.shape(&name), planned) {
                (None, Planned::Layer { .. }) => {
                    let name = shown(&name);
                    let reason = format!(
                        "it lacks `{name}` of the base; is it a fine-tune of it? Targets or excludes without \
                         that layer go on"
                    );
                    return Err(Error::file(self.tuned_path, reason));
                }
                (None, _) => Planned::Missing,
                (Some(found), _) if found != shape => {
                    let name = shown(&name);
                    let reason = format!(
                        "`{name}` has shape {found:?}, expected {shape:?} as in the base; is it a fine-tune of it?"
                    );
                    return Err(Error::file(self.tuned_path, reason));
                }
                (Some(_), planned) => planned,
            };
            plan.push((name, planned));
        }
        check_patterns(config, paths.iter().map(String::as_str))?;
        Ok(plan)
    }
}

/// Names of embeddings that have no `embed` in them.
const TABLES: [&str; 5] = [
    "wte",
    "wpe",
    "shared",
    "token_type",
    "relative_attention_bias",
];

fn planned(config: &DoftConfig, name: &str, shape: &[usize]) -> Result<Planned> {
    let Some(path) = name.strip_suffix(".weight") else {
        return Ok(Planned::Other("it is not the weight of a layer"));
    };
    let Some(kind) = LayerKind::of_rank(shape.len()) else {
        return Ok(Planned::Other("it is a vector, as of a norm or a bias"));
    };
    let last = path.rsplit('.').next().unwrap_or(path);
    let table = TABLES.contains(&last) || last.contains("embed") && last != "embed_out";
    let kind = if table && shape.len() == 2 {
        LayerKind::Embedding
    } else {
        kind
    };
    let by_pattern = matches!(config.targets, Targets::Patterns(_));
    if kind == LayerKind::Embedding && !by_pattern {
        return Ok(Planned::Other(
            "it is named as an embedding, and no target names it",
        ));
    }
    let path = path.to_string();
    Ok(match selects(config, &path, kind)? {
        true => Planned::Layer { path, kind },
        false => Planned::Other("it is outside the targets"),
    })
}
