//! LoRA and DoRA of other tools: PEFT's folders (`lora_A`, `lora_B`), files of diffusers in the same names, and those of
//! kohya's scripts and OneTrainer (`lora_down`, `lora_up`, `alpha`).

use super::group::Group;
use super::keys::{self, Groups, unknown_keys};
use super::layer::stored;
use super::lora_config::Lora;
use super::options::LoadOptions;
use super::peft::{self, Grouped};
use super::read::Found;
use super::tensors::{Tensors, refused};
use crate::adapter::{Stored, StoredLayer, StoredLowRank, Warning};
use crate::config::{LayerKind, LowRank};
use crate::error::{Result, shown};
use crate::params::names;
use std::collections::BTreeMap;

const DOWN: &str = "lora_down.weight";
const UP: &str = "lora_up.weight";

pub(super) fn recognises(found: &Found) -> bool {
    let of_config = found
        .config
        .as_ref()
        .is_some_and(|config| config.lora.is_some());
    of_config || found.any(|_, role| is_own(role))
}

/// Roles that no other dialect has.
fn is_own(role: &str) -> bool {
    let known = [
        DOWN,
        UP,
        "lora_A.weight",
        "lora_B.weight",
        "lora_embedding_A",
        "lora_embedding_B",
    ];
    known.contains(&role)
}

pub(super) fn read(found: &Found, options: &LoadOptions) -> Result<Stored> {
    let (tensors, config) = (&found.tensors, found.config.as_ref());
    if found.any(|_, role| role.starts_with("oft_")) {
        return refused(tensors.file(), "it has tensors of LoRA and of OFT together");
    }
    if options.map.is_some() || options.divisor.is_some() {
        let reason = "it is LoRA, to which a map or a divisor (--map, --divisor) does not apply";
        return refused(tensors.file(), reason);
    }
    let mut warnings = Vec::new();
    let Grouped {
        groups,
        extras,
        unannounced,
    } = match found.has(DOWN) || found.has(UP) {
        true => flattened(tensors, options, &mut warnings)?,
        false => peft::grouped(tensors, config, "lora_", options, &mut warnings)?,
    };
    let lora = config.and_then(|config| config.lora.as_ref());
    let mut layers = BTreeMap::new();
    let mut guessed = Vec::new();
    for (module, roles) in &groups {
        let group = Group {
            tensors,
            module,
            roles,
        };
        let layer = layer(&group, lora, &mut guessed)?;
        layers.insert(module.clone(), layer);
    }
    if let Some(first) = guessed.first() {
        let message = format!(
            "{} layers have no `alpha`, which is taken to be their rank: the scale is 1",
            guessed.len()
        );
        warnings.push(Warning::new(first, message));
    }
    let mut stored = stored(tensors.file(), layers, extras, warnings)?;
    stored.unannounced = unannounced;
    Ok(stored)
}

/// Keys of kohya's kind, whose modules stand in two spellings.
fn flattened(
    tensors: &Tensors,
    options: &LoadOptions,
    warnings: &mut Vec<Warning>,
) -> Result<Grouped> {
    let (mut groups, mut unknown) = (Groups::new(), Vec::new());
    for key in tensors.names() {
        match keys::parse(key) {
            Some((module, role)) if [DOWN, UP, "alpha", "dora_scale"].contains(&role) => {
                keys::insert(tensors.file(), &mut groups, (module, role), key)?;
            }
            _ => unknown.push(shown(key)),
        }
    }
    unknown_keys(tensors, unknown, options, warnings)?;
    let groups = keys::join(tensors.file(), groups, |role| role == DOWN)?;
    Ok(Grouped {
        groups,
        ..Grouped::default()
    })
}

fn layer(group: &Group, config: Option<&Lora>, guessed: &mut Vec<String>) -> Result<StoredLayer> {
    if group.has("dora_scale") {
        let reason = "it is DoRA with `dora_scale`, whose norms are of rows in some tools and of columns in others; \
                      merge it with the program that made it";
        return group.refuse(reason);
    }
    let (a, b) = match group.has(DOWN) || group.has(UP) {
        true => (DOWN, UP),
        false => match group.has("lora_embedding_A") || group.has("lora_embedding_B") {
            true => names::low_rank(LayerKind::Embedding),
            false => names::low_rank(LayerKind::Linear),
        },
    };
    let embedding = a == "lora_embedding_A";
    let (a, b) = (
        group.tensors.read(group.key(a)?)?,
        group.tensors.read(group.key(b)?)?,
    );
    let rank = a.dims().first().copied().unwrap_or(0);
    let fits = a.rank() >= 2 && b.rank() == a.rank() && rank > 0 && b.dims()[1] == rank;
    if !fits {
        let (a, b) = (a.dims(), b.dims());
        return group.refuse(format!("{a:?} and {b:?} are no pair of low-rank matrices"));
    }
    let magnitude = ["lora_magnitude_vector.weight", "lora_magnitude_vector"];
    let magnitude = magnitude.into_iter().find(|role| group.has(role));
    let magnitude = magnitude.map(|role| group.outputs(role)).transpose()?;
    if magnitude.is_some() && (embedding || a.rank() > 2) {
        return group
            .refuse("it is DoRA of an embedding or a convolution, which this crate does not read");
    }
    let spec = match config {
        Some(config) => {
            let spec = config.spec(group.module);
            if spec.rank != rank {
                let reason = format!(
                    "its rank is {} by the configuration, its tensors have {rank}",
                    spec.rank
                );
                return group.refuse(reason);
            }
            spec
        }
        None => match group.marker("alpha")? {
            Some(alpha) => LowRank::new(rank, alpha.number()),
            None => {
                guessed.push(group.module.to_string());
                LowRank::new(rank, rank as f64)
            }
        },
    };
    if config.is_some_and(|_| spec.dora != magnitude.is_some()) {
        let found = if magnitude.is_some() { "a" } else { "no" };
        return group.refuse(format!(
            "`use_dora` is {}, and it has {found} magnitude",
            spec.dora
        ));
    }
    let low_rank = StoredLowRank {
        spec: spec.with_dora(magnitude.is_some()),
        a,
        b,
        magnitude,
        transposed: config.is_some_and(|config| config.transposed),
    };
    let stored = low_rank.layer(embedding.then_some(LayerKind::Embedding))?;
    if !stored
        .low_rank
        .as_ref()
        .is_some_and(|l| l.spec.scale().is_finite())
    {
        return group.refuse("its `alpha` is no finite number");
    }
    Ok(stored)
}
