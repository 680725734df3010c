//! The canonical dialect: [`Stored`] to bytes and back.

use super::keys::EXTRA;
use super::layer;
use super::metadata::{self, LayerEntry};
use super::tensors::{Tensors, check_finite, refused, shown};
use super::write;
use crate::adapter::{Stored, StoredLayer, Warning};
use crate::config::{DoftConfig, LayerKind, Magnitude, Map};
use crate::error::{Error, Result};
use crate::params::names;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

const INITIAL_NORM: &str = "initial_norm";

/// Markers of a rotation, behind its name without `weight`.
const SCALED: &str = "scaled_oft";
const CAYLEY: &str = "cans_oft";
const EXPONENTIAL: &str = "cans_exp";
const CAP: &str = "clipped_oft";

/// The file, and what its readers should know.
pub(super) fn to_bytes(stored: &Stored) -> Result<(Vec<u8>, Vec<Warning>)> {
    let mut tensors = BTreeMap::new();
    let mut warnings = Vec::new();
    let stored = &settled(stored, &mut warnings)?;
    for (path, layer) in &stored.layers {
        for (name, tensor) in layer_tensors(path, layer, &mut warnings)? {
            tensors.insert(format!("{path}.{name}"), tensor);
        }
    }
    for (name, tensor) in &stored.extras {
        tensors.insert(format!("{EXTRA}{name}"), tensor.clone());
    }
    check_finite(&tensors)?;
    Ok((
        write::safetensors(&tensors, &metadata::write(stored)?)?,
        warnings,
    ))
}

/// The same adapter with what the format asks for: the packed values of kernels have the other sign,
/// so a layer that may be one and has another rule must have a kind.
fn settled(stored: &Stored, warnings: &mut Vec<Warning>) -> Result<Stored> {
    let mut stored = stored.clone();
    for (path, layer) in &mut stored.layers {
        if layer.magnitude == Magnitude::Absolute && layer.norms.is_none() {
            let path = shown(path);
            return refused(
                &stored.file,
                format!("layer `{path}` has no `initial_norm` to write"),
            );
        }
        if layer.kernel_factor == -1. {
            continue;
        }
        match layer.kind {
            Some(kind) if kind.is_kernel() => layer.packed = layer.theta(kind)?.neg()?,
            Some(_) => {}
            None => {
                layer.kind = Some(LayerKind::Linear);
                warnings.push(Warning {
                    subject: shown(path),
                    message: "taken as a linear layer; give the base if it is a convolution".into(),
                });
            }
        }
        layer.kernel_factor = -1.;
    }
    Ok(stored)
}

fn layer_tensors(
    path: &str,
    layer: &StoredLayer,
    warnings: &mut Vec<Warning>,
) -> Result<Vec<(String, Tensor)>> {
    let mut warn = |message: &str| {
        warnings.push(Warning {
            subject: path.to_string(),
            message: message.into(),
        });
    };
    let rotation = names::rotation(layer.kind.unwrap_or(LayerKind::Linear));
    let prefix = rotation.trim_end_matches("weight");
    let one = |value: f64| Tensor::new(value as f32, &Device::Cpu);
    let mut tensors = vec![(rotation.to_string(), layer.packed.clone())];
    let mut marker = |name: &str, tensor: Tensor| tensors.push((format!("{prefix}{name}"), tensor));
    if layer.scaled {
        marker(SCALED, one(1.)?);
    }
    match layer.map {
        Map::Cayley => marker(CAYLEY, one(1.)?),
        Map::Exponential => marker(EXPONENTIAL, Tensor::zeros(0, DType::F32, &Device::Cpu)?),
        Map::SERIES => {}
        Map::CayleyNeumann { .. } => {
            warn("a series of other terms than OneTrainer's five reads right in this crate alone");
        }
    }
    if let Some(cap) = layer.max_norm {
        marker(CAP, one(cap)?);
    }
    let Some(value) = &layer.value else {
        return Ok(tensors);
    };
    match layer.magnitude {
        Magnitude::Factor => {
            let wide: Vec<f64> = value.to_dtype(DType::F64)?.to_vec1()?;
            if wide.iter().all(|f| *f > 0.) {
                let logs: Vec<f64> = wide.iter().map(|f| f.ln()).collect();
                let logs = Tensor::from_vec(logs, value.shape(), &Device::Cpu)?;
                tensors.push((names::LOG.into(), logs.to_dtype(value.dtype())?));
            } else {
                warn(
                    "a factor of 0 or below has no logarithm; some readers skip `dora_multiplier`",
                );
                tensors.push((names::FACTOR.into(), value.clone()));
            }
        }
        Magnitude::Absolute => {
            let rank = match (&layer.shape, layer.kind) {
                (Some(shape), _) => shape.len(),
                (None, kind) => kind.map_or(2, LayerKind::rank),
            };
            let mut shape = vec![1; rank];
            shape[0] = value.elem_count();
            tensors.push((names::ABSOLUTE.into(), value.reshape(shape.as_slice())?));
            if let Some(norms) = &layer.norms {
                tensors.push((INITIAL_NORM.into(), norms.reshape(shape)?));
            }
        }
        _ => tensors.push((names::LOG.into(), value.clone())),
    }
    Ok(tensors)
}

/// Reads and checks a whole file.
pub(super) fn from_tensors(tensors: &Tensors) -> Result<Stored> {
    let file = tensors.file();
    let metadata::Read {
        config,
        layers: mut entries,
        warnings,
    } = metadata::read(file, tensors.metadata())?;
    let (groups, extras) = grouped(file, tensors.read_all()?)?;
    let mut layers = BTreeMap::new();
    for (path, roles) in groups {
        let entry = entries.remove(&path).unwrap_or_default();
        let group = Group {
            file,
            path: &path,
            roles,
        };
        layers.insert(path.clone(), group.layer(&config, entry)?);
    }
    if let Some(path) = entries.keys().next() {
        let path = shown(path);
        return refused(
            file,
            format!("`doft_layers` names `{path}`, of which it holds no tensors"),
        );
    }
    if layers.is_empty() && extras.is_empty() {
        return refused(file, "it holds no adapter tensors");
    }
    Ok(Stored {
        file: file.to_path_buf(),
        config,
        layers,
        extras,
        warnings,
        allow_partial: false,
    })
}

type Roles = BTreeMap<&'static str, Tensor>;

/// Every role, under the name that ends a key. No one is the end of another.
const ROLES: [&str; 14] = [
    "oft_R.weight",
    "oft_R.scaled_oft",
    "oft_R.cans_oft",
    "oft_R.cans_exp",
    "oft_R.clipped_oft",
    "oft_embedding_R.weight",
    "oft_embedding_R.scaled_oft",
    "oft_embedding_R.cans_oft",
    "oft_embedding_R.cans_exp",
    "oft_embedding_R.clipped_oft",
    names::LOG,
    names::FACTOR,
    names::ABSOLUTE,
    INITIAL_NORM,
];

/// Keys to layers and extras; an unknown key is an error.
#[allow(clippy::type_complexity, reason = "two maps, used once")]
fn grouped(
    file: &Path,
    tensors: BTreeMap<String, Tensor>,
) -> Result<(BTreeMap<String, Roles>, BTreeMap<String, Tensor>)> {
    let mut groups: BTreeMap<String, Roles> = BTreeMap::new();
    let mut extras = BTreeMap::new();
    let mut unknown = Vec::new();
    for (key, tensor) in tensors {
        if let Some(name) = key.strip_prefix(EXTRA) {
            extras.insert(name.to_string(), tensor);
            continue;
        }
        let role = ROLES.into_iter().find_map(|role| {
            let path = key.strip_suffix(role)?.strip_suffix('.')?;
            (!path.is_empty()).then(|| (path.to_string(), role))
        });
        match role {
            Some((path, role)) => {
                groups.entry(path).or_default().insert(role, tensor);
            }
            None => unknown.push(shown(&key)),
        }
    }
    if unknown.is_empty() {
        return Ok((groups, extras));
    }
    let first = unknown[..unknown.len().min(5)].join("`, `");
    refused(
        file,
        format!("{} unexpected keys, the first are `{first}`", unknown.len()),
    )
}

/// The tensors of one layer.
struct Group<'a> {
    file: &'a Path,
    path: &'a str,
    roles: Roles,
}

impl Group<'_> {
    fn layer(&self, config: &DoftConfig, entry: LayerEntry) -> Result<StoredLayer> {
        let rotations = [LayerKind::Embedding, LayerKind::Linear].map(names::rotation);
        let mut found = rotations
            .into_iter()
            .filter(|name| self.roles.contains_key(name));
        let (Some(name), None) = (found.next(), found.next()) else {
            return self
                .refuse("expected one rotation, `oft_R.weight` or `oft_embedding_R.weight`");
        };
        let packed = &self.roles[name];
        let block_size = self.block_size(name, packed)?;
        let embedding = name == names::EMBEDDING_ROTATION;
        if entry
            .kind
            .is_some_and(|kind| (kind == LayerKind::Embedding) != embedding)
        {
            return self.refuse(&format!(
                "`{name}` is not the rotation of a {:?} layer",
                entry.kind
            ));
        }
        let prefix = name.trim_end_matches("weight");
        let marker = |marker: &str| self.roles.get(format!("{prefix}{marker}").as_str());
        let map = entry.map.unwrap_or(config.map);
        self.agree("map", map == Map::Cayley, marker(CAYLEY), CAYLEY)?;
        self.agree(
            "map",
            map == Map::Exponential,
            marker(EXPONENTIAL),
            EXPONENTIAL,
        )?;
        let scaled = entry.scaled.unwrap_or(config.scaled);
        self.agree("scaled", scaled, marker(SCALED), SCALED)?;
        let max_norm = match entry.max_norm {
            Some(0.) => None,
            Some(cap) => Some(cap),
            None => config.max_norm,
        };
        self.agree("max_norm", max_norm.is_some(), marker(CAP), CAP)?;
        if let (Some(cap), Some(stored)) = (max_norm, marker(CAP)) {
            let stored = self.scalar(CAP, stored)?;
            if cap as f32 != stored as f32 {
                return self.refuse(&format!("`max_norm` is {cap}, `{CAP}` is {stored}"));
            }
        }
        let kind = entry.magnitude.unwrap_or(config.magnitude);
        let (value, norms) = self.magnitude(kind)?;
        Ok(StoredLayer {
            kind: entry.kind.or(embedding.then_some(LayerKind::Embedding)),
            shape: entry.shape,
            block_size,
            map,
            scaled,
            max_norm,
            magnitude: kind,
            packed: packed.clone(),
            kernel_factor: -1.,
            value,
            norms,
            base: entry.base,
        })
    }

    /// `b` from `n = b (b - 1) / 2` columns.
    fn block_size(&self, name: &str, packed: &Tensor) -> Result<usize> {
        let tensor = |found: String, expected: &str| {
            Err(Error::FileTensor {
                file: self.file.to_path_buf(),
                tensor: format!("{}.{name}", shown(self.path)),
                found,
                expected: expected.into(),
                fix: "the file is damaged or not an adapter",
            })
        };
        let &[rows, columns] = packed.dims() else {
            return tensor(format!("shape {:?}", packed.dims()), "two axes");
        };
        match layer::block_size(columns) {
            Some(b) if rows > 0 => Ok(b),
            _ => {
                let expected = "at least one row and b(b-1)/2 columns for a block size b";
                tensor(format!("shape {:?}", packed.dims()), expected)
            }
        }
    }

    /// A setting and its marker say the same.
    fn agree(&self, field: &str, set: bool, marker: Option<&Tensor>, name: &str) -> Result<()> {
        if let Some(marker) = marker
            && name != EXPONENTIAL
        {
            self.scalar(name, marker)?;
        }
        match (set, marker.is_some()) {
            (true, false) => self.refuse(&format!("by its `{field}` it needs the marker `{name}`")),
            (false, true) => self.refuse(&format!("the marker `{name}` contradicts its `{field}`")),
            _ => Ok(()),
        }
    }

    fn scalar(&self, name: &str, marker: &Tensor) -> Result<f64> {
        let values: Vec<f64> = marker.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
        match values.as_slice() {
            [value] if *value > 0. => Ok(*value),
            _ => self.refuse(&format!("the marker `{name}` is not one number above 0")),
        }
    }

    fn magnitude(&self, kind: Magnitude) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let get = |name: &str| self.roles.get(name);
        let there: Vec<&str> = [names::LOG, names::FACTOR, names::ABSOLUTE, INITIAL_NORM]
            .into_iter()
            .filter(|name| self.roles.contains_key(name))
            .collect();
        let value = match (kind, there.as_slice()) {
            (Magnitude::None, []) => return Ok((None, None)),
            (Magnitude::Log, [names::LOG]) => get(names::LOG).cloned(),
            (Magnitude::Factor, [names::FACTOR]) => get(names::FACTOR).cloned(),
            (Magnitude::Factor, [names::LOG]) => {
                let exp = |log: &Tensor| log.to_dtype(DType::F64)?.exp()?.to_dtype(log.dtype());
                get(names::LOG).map(exp).transpose()?
            }
            (Magnitude::Absolute, [names::ABSOLUTE, INITIAL_NORM]) => {
                let flat = |name| get(name).map(Tensor::flatten_all).transpose();
                let (value, norms) = (flat(names::ABSOLUTE)?, flat(INITIAL_NORM)?);
                let count = |t: &Option<Tensor>| t.as_ref().map(Tensor::elem_count);
                if count(&value) != count(&norms) {
                    return self.refuse("`dora_scale` and `initial_norm` differ in length");
                }
                return Ok((value, norms));
            }
            (kind, there) => {
                let there = there.join("`, `");
                return self.refuse(&format!(
                    "its magnitude is {kind:?}, the file has `{there}`"
                ));
            }
        };
        match value {
            Some(value) if value.rank() == 1 => Ok((Some(value), None)),
            _ => self.refuse("its magnitude has more than one axis"),
        }
    }

    fn refuse<T>(&self, reason: &str) -> Result<T> {
        refused(self.file, format!("layer `{}`: {reason}", shown(self.path)))
    }
}
