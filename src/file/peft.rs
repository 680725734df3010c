//! PEFT's OFT: folders of 0.16 and newer (`oft_R`), and files of 0.14 and 0.15 (`oft_r`, `oft_s`).

use super::group::Group;
use super::keys::{self, Groups, unknown_keys};
use super::layer::{Description, stored};
use super::onetrainer;
use super::options::LoadOptions;
use super::read::Found;
use super::tensors::{Tensors, refused};
use crate::adapter::{PEFT_PREFIX, Stored, StoredLayer, Warning};
use crate::config::{LayerKind, Magnitude, Map};
use crate::error::{Error, Result, shown};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The tensors of a folder, and what says how to read them.
pub(super) const TENSORS: &str = "adapter_model.safetensors";
pub(super) const CONFIG: &str = "adapter_config.json";

/// The largest configuration that is read.
const CONFIG_BYTES: u64 = 1 << 20;

/// What `adapter_config.json` decides.
pub(super) struct Config {
    block_share: bool,
    exact: bool,
    terms: usize,
    last_coefficient: u8,
    coft: Option<f64>,
    bias: String,
    modules_to_save: Vec<String>,
    has_block_size: bool,
}

impl Config {
    /// The file beside the tensors, where there is one.
    pub(super) fn beside(folder: &Path) -> Result<Option<Self>> {
        let file = folder.join(CONFIG);
        let failed = Error::io(&file);
        match std::fs::metadata(&file) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
            Ok(found) if found.len() > CONFIG_BYTES => {
                return refused(&file, format!("larger than {CONFIG_BYTES} bytes"));
            }
            Ok(_) => {}
        }
        let text = std::fs::read(&file).map_err(failed)?;
        let json: Value =
            serde_json::from_slice(&text).or_else(|e| refused(&file, format!("not JSON: {e}")))?;
        Self::parse(&file, &json).map(Some)
    }

    fn parse(file: &Path, json: &Value) -> Result<Self> {
        let wrong = |field: &str, expected: &str| {
            let found = shown(&json[field].to_string());
            let reason = format!("`{field}` is {found}, expected {expected}");
            refused(file, reason)
        };
        let flag = |name: &str, absent: bool| -> Result<bool> {
            Ok(field(file, json, name, "true or false")?.unwrap_or(absent))
        };
        if json["peft_type"].as_str() != Some("OFT") {
            return wrong("peft_type", "OFT");
        }
        if flag("fan_in_fan_out", false)? {
            return wrong(
                "fan_in_fan_out",
                "false: its base would be stored transposed",
            );
        }
        let whole = "a whole number up to 64";
        let terms = field(file, json, "num_cayley_neumann_terms", whole)?.unwrap_or(5);
        if terms > 64 {
            return wrong("num_cayley_neumann_terms", whole);
        }
        let eps = field(file, json, "eps", "a finite number from 0")?.unwrap_or(6e-5);
        if eps < 0. {
            return wrong("eps", "a finite number from 0");
        }
        let kinds = "none, oft_only or all";
        let bias: String = field(file, json, "bias", kinds)?.unwrap_or("none".into());
        if !["none", "oft_only", "all"].contains(&bias.as_str()) {
            return wrong("bias", kinds);
        }
        let size: Option<u64> = field(file, json, "oft_block_size", "a whole number")?;
        let version = field(file, json, "peft_version", "a version such as 0.18.0")?;
        let modules: Option<Vec<String>> = field(file, json, "modules_to_save", "a list of names")?;
        let task: Option<String> = field(file, json, "task_type", "the name of a task")?;
        let mut modules = modules.unwrap_or_default();
        // The heads that PEFT adds for these tasks without being told.
        modules.extend(match task.as_deref() {
            Some("SEQ_CLS" | "TOKEN_CLS") => vec!["classifier".into(), "score".into()],
            Some("QUESTION_ANS") => vec!["qa_outputs".into()],
            _ => Vec::new(),
        });
        Ok(Self {
            block_share: flag("block_share", false)?,
            exact: !flag("use_cayley_neumann", true)?,
            terms,
            last_coefficient: last_coefficient(&version.unwrap_or(String::new())),
            coft: flag("coft", false)?.then_some(eps),
            bias,
            modules_to_save: modules,
            has_block_size: size.is_some(),
        })
    }

    /// Whether a key is of a module that was trained whole, or of one inside such a module. PEFT takes
    /// each module whose path ends with a name, in the middle of a segment too.
    fn saves(&self, key: &str) -> bool {
        let ends = key.match_indices('.').map(|(at, _)| &key[..at]);
        let mut modules = ends.collect::<Vec<_>>().into_iter();
        modules.any(|module| {
            let mut names = self.modules_to_save.iter();
            names.any(|name| module.ends_with(name.as_str()))
        })
    }

    fn map(&self) -> Map {
        match self.exact {
            true => Map::Cayley,
            false => Map::CayleyNeumann {
                terms: self.terms,
                last_coefficient: self.last_coefficient,
            },
        }
    }
}

/// A field that may be absent or null, of the type that it has to have.
fn field<T: DeserializeOwned>(
    file: &Path,
    json: &Value,
    name: &str,
    expected: &str,
) -> Result<Option<T>> {
    let value = &json[name];
    Option::deserialize(value).or_else(|_| {
        let found = shown(&value.to_string());
        refused(file, format!("`{name}` is {found}, expected {expected}"))
    })
}

/// The series' last coefficient: 1 from PEFT 0.18, which was the first to write its version.
fn last_coefficient(version: &str) -> u8 {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    let parts: [u32; 2] = [(); 2].map(|_| parts.next().unwrap_or(0));
    if parts >= [0, 18] { 1 } else { 2 }
}

pub(super) fn recognises_full_matrices(found: &Found) -> bool {
    found.has("oft_r") || found.has("oft_s")
}

pub(super) fn recognises(found: &Found) -> bool {
    let rotation = |key: &str, role: &str| {
        keys::unwrapped(key).starts_with(PEFT_PREFIX) && role == "oft_R.weight"
    };
    found.config.is_some()
        || found.has("oft_embedding_R.weight")
        || found.any(rotation) && !found.any(|_, role| onetrainer::is_own(role))
}

pub(super) fn read(found: &Found, options: &LoadOptions) -> Result<Stored> {
    let (tensors, config) = (&found.tensors, found.config.as_ref());
    if found.any(|_, role| onetrainer::is_own(role)) {
        let reason = "it has the keys of OneTrainer and of PEFT together";
        return refused(tensors.file(), reason);
    }
    let mut warnings = Vec::new();
    match config {
        None => {
            let map = match recognises_full_matrices(found) {
                true => "",
                false => " as the series of five terms, last coefficient 1,",
            };
            let message = format!("no {CONFIG} beside it: read{map} without COFT");
            warnings.push(Warning::new(CONFIG, message));
        }
        Some(config) if !config.exact && config.terms < 2 => {
            let message = format!("{} terms rotate nothing", config.terms);
            warnings.push(Warning::new("num_cayley_neumann_terms", message));
        }
        Some(_) => {}
    }
    let Grouped {
        groups,
        extras,
        unannounced,
    } = grouped(tensors, config, options, &mut warnings)?;
    let mut layers = BTreeMap::new();
    for (module, roles) in &groups {
        let group = Group {
            tensors,
            module,
            roles,
        };
        let layer = match group.has("oft_r") || group.has("oft_s") {
            true => full_matrices(&group, config, options)?,
            false => packed_rows(&group, config, options)?,
        };
        layers.insert(module.clone(), layer);
    }
    let mut stored = stored(tensors.file(), layers, extras, warnings)?;
    stored.unannounced = unannounced;
    Ok(stored)
}

fn bare(module: &str) -> &str {
    module.strip_prefix(PEFT_PREFIX).unwrap_or(module)
}

/// The keys of a file, sorted into what they are.
#[derive(Default)]
struct Grouped {
    groups: Groups,
    extras: BTreeMap<String, Tensor>,
    /// Extras that the configuration does not announce: true of a base that has them.
    unannounced: BTreeSet<String>,
}

fn grouped(
    tensors: &Tensors,
    config: Option<&Config>,
    options: &LoadOptions,
    warnings: &mut Vec<Warning>,
) -> Result<Grouped> {
    let mut found = Grouped::default();
    let mut unknown = Vec::new();
    let mut names = BTreeSet::new();
    let bias = config.is_some_and(|config| config.bias != "none");
    for key in tensors.names() {
        let clean = keys::unwrapped(key);
        let clean = clean.as_ref();
        let (extra, announced) = match keys::parse_named(clean) {
            Some((module, role, name)) if role.starts_with("oft_") => {
                names.extend(name.map(str::to_string));
                let module = bare(&module).to_string();
                keys::insert(tensors.file(), &mut found.groups, (module, role), key)?;
                continue;
            }
            Some((module, "base_layer.weight", _)) => (format!("{}.weight", bare(&module)), true),
            Some((module, "base_layer.bias", _)) if bias => {
                (format!("{}.bias", bare(&module)), true)
            }
            _ => {
                let name = saved(bare(clean));
                let announced = bias && name.ends_with("bias")
                    || config.is_some_and(|config| config.saves(&name));
                // PEFT saves whole embeddings of its own accord, among others.
                let other = clean.starts_with(PEFT_PREFIX) && keys::plain(clean);
                if !announced && !other {
                    unknown.push(shown(key));
                    continue;
                }
                (name, announced)
            }
        };
        if !announced {
            let message =
                "the configuration does not announce this whole tensor; it replaces the base's";
            warnings.push(Warning::new(&extra, message));
            found.unannounced.insert(extra.clone());
        }
        if found.extras.insert(extra, tensors.read(key)?).is_some() {
            let reason = format!("`{}` and another key are the same tensor", shown(key));
            return refused(tensors.file(), reason);
        }
    }
    if names.len() > 1 {
        let names: Vec<String> = names.iter().map(|name| shown(name)).collect();
        let reason = format!(
            "it holds the adapters `{}` together; save one of them with `save_pretrained`",
            names.join("`, `")
        );
        return refused(tensors.file(), reason);
    }
    unknown_keys(tensors, unknown, options, warnings)?;
    Ok(found)
}

/// The name in the base of a tensor that was trained whole: without the layer that PEFT puts around it.
fn saved(name: &str) -> String {
    let name = name.replace(".base_layer.", ".");
    let Some((before, after)) = name.split_once(".modules_to_save.") else {
        return name;
    };
    // The name of the adapter, where it was not removed.
    let after = after.strip_prefix("default.").unwrap_or(after);
    format!("{before}.{after}")
}

fn packed_rows(
    group: &Group,
    config: Option<&Config>,
    options: &LoadOptions,
) -> Result<StoredLayer> {
    let embedding = group.has("oft_embedding_R.weight");
    if group.roles.len() != 1 {
        return group.refuse("it has keys of several tools");
    }
    if config.is_some_and(|config| !config.has_block_size) {
        let reason = "its config lacks `oft_block_size`: PEFT 0.13 or older, which rotates outputs";
        return group.refuse(reason);
    }
    let packed = match embedding {
        true => group.packed("oft_embedding_R.weight")?,
        false => group.packed("oft_R.weight")?,
    };
    let description = Description {
        kind: embedding.then_some(LayerKind::Embedding),
        shared: shared(group, config, packed.0.dim(0)?)?,
        // PEFT's exact map is the inverse of what its series approximates.
        inverse: config.is_some_and(|config| config.exact),
        coft: config.and_then(|config| config.coft),
        ..Description::new(config.map_or(Map::SERIES, Config::map), packed)
    };
    description.layer(group, options)
}

/// Whether the configuration says that one row stands for all blocks.
fn shared(group: &Group, config: Option<&Config>, rows: usize) -> Result<Option<bool>> {
    let shared = config.map(|config| config.block_share);
    match shared == Some(true) && rows != 1 {
        true => group.refuse(format!("`block_share` is true, but it has {rows} rows")),
        false => Ok(shared),
    }
}

/// `R = (I - S)(I + S)^-1` of `S = (A - A^T) / 2`: Cayley of `-S`; and a factor of any sign.
fn full_matrices(
    group: &Group,
    config: Option<&Config>,
    options: &LoadOptions,
) -> Result<StoredLayer> {
    if !(group.has("oft_r") && group.has("oft_s")) {
        return group.refuse("it has only one of `oft_r` and `oft_s`");
    }
    let factor = group.outputs("oft_s")?;
    let a = group
        .tensors
        .read(group.key("oft_r")?)?
        .to_dtype(DType::F64)?;
    let (rows, b) = match *a.dims() {
        [rows, b, columns] if rows > 0 && b > 0 && b == columns => (rows, b),
        _ => return group.refuse("its `oft_r` is not (D, b, b)"),
    };
    let shared = shared(group, config, rows)?;
    let mut matrices: Vec<Vec<Vec<f64>>> = a.to_vec3()?;
    if let Some(eps) = config.and_then(|config| config.coft) {
        if shared == Some(true) {
            let reason = "its limit of COFT depends on the number of blocks, which a shared one \
                          does not tell; merge it in PEFT";
            return group.refuse(reason);
        }
        let spread = factor.elem_count().div_ceil(rows) as f64;
        let limit = eps * spread * spread / (rows as f64).sqrt();
        for matrix in &mut matrices {
            let norm = matrix.iter().flatten().map(|v| v * v).sum::<f64>().sqrt();
            if norm > limit {
                matrix.iter_mut().flatten().for_each(|v| *v *= limit / norm);
            }
        }
    }
    let mut theta = Vec::new();
    for matrix in &matrices {
        let upper = (0..b).flat_map(|i| (i + 1..b).map(move |j| (i, j)));
        theta.extend(upper.map(|(i, j)| -(matrix[i][j] - matrix[j][i]) / 2.));
    }
    let packed = Tensor::from_vec(theta, (rows, b * (b - 1) / 2), &Device::Cpu)?;
    let description = Description {
        shared,
        magnitude: Magnitude::Factor,
        value: Some(factor),
        ..Description::new(Map::Cayley, (packed, b))
    };
    description.layer(group, options)
}
