//! The canonical dialect: [`Stored`] to bytes and back.

use super::group::Group;
use super::keys::{self, EXTRA, Groups, unknown_keys};
use super::layer::with_config;
use super::metadata::{self, LayerEntry};
use super::options::LoadOptions;
use super::read::Found;
use super::tensors::{Marker, check_finite, refused};
use super::write;
use crate::adapter::{Stored, StoredLayer, StoredLowRank, Warning};
use crate::config::{DoftConfig, LayerKind, LowRank, Magnitude, Map};
use crate::error::{Result, shown};
use crate::params::names;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

const INITIAL_NORM: &str = "initial_norm";

/// Markers of a rotation, behind its name without `weight`.
const SCALED: &str = "scaled_oft";
const CAP: &str = "clipped_oft";

/// The markers of a layer with these settings: name, value and shape.
fn markers(
    scaled: bool,
    map: Map,
    max_norm: Option<f64>,
) -> Vec<(&'static str, f64, &'static [usize])> {
    let scaled = scaled.then_some((SCALED, 1., &[][..]));
    let map = match map {
        Map::Cayley => Some(("cans_oft", 1., &[][..])),
        // As the tool that had this map wrote it.
        Map::Exponential => Some(("cans_exp", 1., &[0][..])),
        Map::CayleyNeumann { .. } => None,
    };
    let cap = max_norm.map(|cap| (CAP, cap, &[][..]));
    [scaled, map, cap].into_iter().flatten().collect()
}

/// A width that no layer has. What a file says of a base is believed only below it.
const WIDEST: usize = 1 << 24;

/// The file, and what its readers should know.
pub(super) fn to_bytes(stored: &Stored) -> Result<(Vec<u8>, Vec<Warning>)> {
    let mut tensors = BTreeMap::new();
    let mut warnings = Vec::new();
    let stored = &settled(stored, &mut warnings)?;
    for (path, layer) in &stored.layers {
        for (name, tensor) in layer_tensors(path, layer, &mut warnings)? {
            let key = format!("{path}.{name}");
            let found = keys::parse_exactly(&key).filter(|_| !key.starts_with(EXTRA));
            if found.is_none_or(|(module, _)| module != *path) {
                let reason = format!("a layer of path `{}` cannot be read back", shown(path));
                return refused(&stored.file, reason + "; give it another path");
            }
            tensors.insert(key, tensor);
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

/// The same adapter with what the format asks for.
fn settled(stored: &Stored, warnings: &mut Vec<Warning>) -> Result<Stored> {
    for (path, layer) in &stored.layers {
        if layer.low_rank.as_ref().is_some_and(|l| l.transposed) {
            let reason = format!(
                "layer `{}` is of a weight that is stored `(in, out)`, which a file of this crate does not say",
                shown(path)
            );
            return refused(&stored.file, reason);
        }
        if layer.magnitude == Magnitude::Absolute && layer.norms.is_none() {
            let reason = format!("layer `{}` has no `initial_norm` to write", shown(path));
            return refused(&stored.file, reason + "; load it onto its base and save it");
        }
    }
    in_onetrainers_convention(stored, warnings)
}

/// The packed values of kernels have the other sign, so a layer that may be one and has another rule must
/// have a kind.
pub(super) fn in_onetrainers_convention(
    stored: &Stored,
    warnings: &mut Vec<Warning>,
) -> Result<Stored> {
    let mut stored = stored.clone();
    for (path, layer) in &mut stored.layers {
        if let Some(low_rank) = &layer.low_rank {
            let rank = layer.shape.as_ref().map_or(low_rank.a.rank(), Vec::len);
            layer.kind = layer.kind.or(LayerKind::of_rank(rank));
            continue;
        }
        if layer.kernel_factor == -1. {
            continue;
        }
        match layer.kind {
            Some(kind) if kind.is_kernel() => layer.packed = layer.theta(kind)?.neg()?,
            Some(_) => {}
            None => {
                layer.kind = Some(LayerKind::Linear);
                let message = "taken as a linear layer; give the base if it is a convolution";
                warnings.push(Warning::new(path, message));
            }
        }
        layer.kernel_factor = -1.;
    }
    Ok(stored)
}

/// The tensors of one layer under the names behind its path.
fn layer_tensors(
    path: &str,
    layer: &StoredLayer,
    warnings: &mut Vec<Warning>,
) -> Result<Vec<(String, Tensor)>> {
    if let Some(low_rank) = &layer.low_rank {
        let (a, b) = names::low_rank(layer.kind.unwrap_or(LayerKind::Linear));
        let mut tensors = vec![
            (a.to_string(), low_rank.a.clone()),
            (b.to_string(), low_rank.b.clone()),
        ];
        let magnitude = low_rank.magnitude.clone();
        tensors.extend(magnitude.map(|m| (names::DORA.to_string(), m)));
        return Ok(tensors);
    }
    let rotation = names::rotation(layer.kind.unwrap_or(LayerKind::Linear));
    let prefix = rotation.trim_end_matches("weight");
    let mut tensors = vec![(rotation.to_string(), layer.packed.clone())];
    for (name, value, shape) in markers(layer.scaled, layer.map, layer.max_norm) {
        let tensor = Tensor::full(value as f32, shape, &Device::Cpu)?;
        tensors.push((format!("{prefix}{name}"), tensor));
    }
    if matches!(layer.map, Map::CayleyNeumann { .. }) && layer.map != Map::SERIES {
        let message =
            "a series of other terms than OneTrainer's five reads right in this crate alone";
        warnings.push(Warning::new(path, message));
    }
    tensors.extend(magnitude_tensors(path, layer, warnings)?);
    Ok(tensors)
}

fn magnitude_tensors(
    path: &str,
    layer: &StoredLayer,
    warnings: &mut Vec<Warning>,
) -> Result<Vec<(String, Tensor)>> {
    let Some(value) = &layer.value else {
        return Ok(Vec::new());
    };
    Ok(match layer.magnitude {
        Magnitude::Factor => {
            let wide: Vec<f64> = value.to_dtype(DType::F64)?.to_vec1()?;
            if wide.iter().any(|f| *f <= 0.) {
                let message =
                    "a factor of 0 or below has no logarithm; some readers skip `dora_multiplier`";
                warnings.push(Warning::new(path, message));
                return Ok(vec![(names::FACTOR.into(), value.clone())]);
            }
            let logs: Vec<f64> = wide.iter().map(|f| f.ln()).collect();
            let logs = Tensor::from_vec(logs, value.shape(), &Device::Cpu)?;
            vec![(names::LOG.into(), logs.to_dtype(value.dtype())?)]
        }
        Magnitude::Absolute => {
            let rank = match (&layer.shape, layer.kind) {
                (Some(shape), _) => shape.len(),
                (None, kind) => kind.map_or(2, LayerKind::rank),
            };
            let mut shape = vec![value.elem_count()];
            shape.resize(rank, 1);
            let mut tensors = vec![(names::ABSOLUTE.into(), value.reshape(shape.as_slice())?)];
            if let Some(norms) = &layer.norms {
                tensors.push((INITIAL_NORM.into(), norms.reshape(shape)?));
            }
            tensors
        }
        Magnitude::Log | Magnitude::None => vec![(names::LOG.into(), value.clone())],
    })
}

pub(super) fn recognises(found: &Found) -> bool {
    metadata::has_format(found.tensors.metadata(), metadata::FORMAT)
}

/// Reads and checks a whole file.
pub(super) fn read(found: &Found, options: &LoadOptions) -> Result<Stored> {
    let tensors = &found.tensors;
    let file = tensors.file();
    let metadata::Read {
        config,
        layers: mut entries,
        mut warnings,
    } = metadata::read(file, tensors.metadata())?;
    let (mut groups, mut extras) = (Groups::new(), BTreeMap::new());
    let mut unknown = Vec::new();
    for key in tensors.names() {
        if let Some(name) = key.strip_prefix(EXTRA) {
            extras.insert(name.to_string(), tensors.read(key)?);
            continue;
        }
        match keys::parse_exactly(key).filter(|(_, role)| is_role(role)) {
            Some(found) => keys::insert(file, &mut groups, found, key)?,
            None => unknown.push(shown(key)),
        }
    }
    unknown_keys(tensors, unknown, options, &mut warnings)?;
    let mut layers = BTreeMap::new();
    for (path, roles) in &groups {
        let entry = entries.remove(path).unwrap_or_default();
        let settings = entry
            .settings(&config)
            .or_else(|e| refused(file, format!("`doft_layers` of `{}`: {e}", shown(path))))?;
        let group = Group {
            tensors,
            module: path,
            roles,
        };
        layers.insert(path.clone(), layer(&group, &settings, entry)?);
    }
    if let Some(path) = entries.keys().next() {
        let path = shown(path);
        let reason = format!("`doft_layers` names `{path}`, of which it holds no tensors");
        return refused(file, reason);
    }
    if layers.is_empty() && extras.is_empty() {
        return refused(file, "it holds no adapter tensors");
    }
    Ok(with_config(file, config, layers, extras, warnings))
}

/// Whether this crate writes a role.
fn is_role(role: &str) -> bool {
    let magnitudes = [names::LOG, names::FACTOR, names::ABSOLUTE, INITIAL_NORM];
    let rotation = role.starts_with("oft_R.") || role.starts_with("oft_embedding_R.");
    rotation || magnitudes.contains(&role) || is_low_rank(role)
}

/// Whether it is a role of a layer of low-rank matrices.
fn is_low_rank(role: &str) -> bool {
    let kinds = [LayerKind::Linear, LayerKind::Embedding];
    let names = kinds.map(names::low_rank);
    role == names::DORA || names.iter().any(|(a, b)| role == *a || role == *b)
}

fn low_rank(group: &Group, spec: LowRank, entry: LayerEntry) -> Result<StoredLayer> {
    let embedding = entry.kind == Some(LayerKind::Embedding);
    let kind = if embedding {
        LayerKind::Embedding
    } else {
        LayerKind::Linear
    };
    let (a, b) = names::low_rank(kind);
    let magnitude = match spec.dora {
        true => Some(group.outputs(names::DORA)?),
        false => None,
    };
    let expected = 2 + usize::from(spec.dora);
    if group.roles.len() != expected {
        let roles: Vec<&str> = group.roles.keys().copied().collect();
        return group.refuse(format!(
            "it has `{}`, expected {expected} of them",
            roles.join("`, `")
        ));
    }
    let stored = StoredLowRank {
        spec,
        a: group.tensors.read(group.key(a)?)?,
        b: group.tensors.read(group.key(b)?)?,
        magnitude,
        transposed: false,
    };
    let rank = stored.a.dims().first().copied();
    if rank != Some(spec.rank) {
        return group.refuse(format!(
            "its rank is {}, `{a}` has {:?} rows",
            spec.rank, rank
        ));
    }
    let layer = StoredLayer {
        shape: entry.shape,
        base: entry.base,
        ..stored.layer(entry.kind)?
    };
    check_record(group, &layer)?;
    Ok(layer)
}

fn layer(group: &Group, settings: &DoftConfig, entry: LayerEntry) -> Result<StoredLayer> {
    if let Some(spec) = entry.low_rank {
        return low_rank(group, spec, entry);
    }
    if let Some(role) = group.roles.keys().find(|role| is_low_rank(role)) {
        return group.refuse(format!("it has `{role}`, and `doft_layers` no `low_rank`"));
    }
    let (rotation, other) = (names::ROTATION, names::EMBEDDING_ROTATION);
    let (rotation, embedding) = match (group.has(rotation), group.has(other)) {
        (true, false) => (rotation, false),
        (false, true) => (other, true),
        _ => return group.refuse(format!("expected one rotation, `{rotation}` or `{other}`")),
    };
    if let Some(kind) = entry.kind
        && names::rotation(kind) != rotation
    {
        return group.refuse(format!(
            "`{rotation}` is not the rotation of a {kind:?} layer"
        ));
    }
    check_markers(group, rotation, settings)?;
    let (packed, block_size) = group.packed(rotation)?;
    let (value, norms) = magnitude(group, settings.magnitude)?;
    let layer = group.checked(StoredLayer {
        kind: entry.kind.or(embedding.then_some(LayerKind::Embedding)),
        shape: entry.shape,
        block_size,
        shared: None,
        map: settings.map,
        scaled: settings.scaled,
        max_norm: settings.max_norm,
        magnitude: settings.magnitude,
        packed,
        kernel_factor: -1.,
        value,
        norms,
        base: entry.base,
        low_rank: None,
    })?;
    check_record(group, &layer)?;
    Ok(layer)
}

/// The shape on record is one that such a layer has, and fits its tensors.
fn check_record(group: &Group, layer: &StoredLayer) -> Result<()> {
    let Some(shape) = &layer.shape else {
        return Ok(());
    };
    let inner = shape.iter().skip(1);
    let width = inner.fold(1, |n: usize, axis| n.saturating_mul(*axis));
    let rank = layer.kind.map_or(shape.len(), LayerKind::rank);
    let known = LayerKind::of_rank(rank).is_some() && rank == shape.len();
    if !known || width > WIDEST {
        return group.refuse(format!("its `shape` is {shape:?}, which no such layer has"));
    }
    layer.check_shape(group.tensors.file(), group.module, group.module, shape)
}

/// Settings and markers say the same.
fn check_markers(group: &Group, rotation: &str, settings: &DoftConfig) -> Result<()> {
    let prefix = rotation.trim_end_matches("weight");
    let expected = markers(settings.scaled, settings.map, settings.max_norm);
    for role in group.roles.keys().filter(|role| **role != rotation) {
        let name = match role.strip_prefix(prefix) {
            Some(name) => name,
            None if role.starts_with("oft_") => {
                return group.refuse(format!("it has `{role}` beside `{rotation}`"));
            }
            None => continue,
        };
        let Some((_, value, shape)) = expected.iter().find(|(known, ..)| *known == name) else {
            let field = field(name);
            return group.refuse(format!("the marker `{name}` contradicts its `{field}`"));
        };
        let found = group.marker(role)?.map_or(0., Marker::number);
        if shape.is_empty() && found <= 0. {
            return group.refuse(format!("the marker `{name}` is not one number above 0"));
        }
        if name == CAP && found as f32 != *value as f32 {
            return group.refuse(format!("`max_norm` is {value}, `{CAP}` is {found}"));
        }
    }
    for (name, ..) in expected {
        if !group.has(&format!("{prefix}{name}")) {
            let field = field(name);
            return group.refuse(format!("by its `{field}` it needs the marker `{name}`"));
        }
    }
    Ok(())
}

/// The field of the configuration that a marker goes with.
fn field(marker: &str) -> &'static str {
    match marker {
        SCALED => "scaled",
        CAP => "max_norm",
        _ => "map",
    }
}

fn magnitude(group: &Group, kind: Magnitude) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let all = [names::LOG, names::FACTOR, names::ABSOLUTE, INITIAL_NORM];
    let there: Vec<&str> = all.into_iter().filter(|name| group.has(name)).collect();
    Ok(match (kind, there.as_slice()) {
        (Magnitude::None, []) => (None, None),
        (Magnitude::Log, [role @ names::LOG]) | (Magnitude::Factor, [role @ names::FACTOR]) => {
            (Some(group.outputs(role)?), None)
        }
        (Magnitude::Factor, [names::LOG]) => {
            let log = group.outputs(names::LOG)?;
            let factor = log.to_dtype(DType::F64)?.exp()?.to_dtype(log.dtype())?;
            (Some(factor), None)
        }
        (Magnitude::Absolute, [names::ABSOLUTE, INITIAL_NORM]) => (
            Some(group.outputs(names::ABSOLUTE)?),
            Some(group.outputs(INITIAL_NORM)?),
        ),
        (kind, there) => {
            let there = there.join("`, `");
            return group.refuse(format!("its magnitude is {kind:?}, the file has `{there}`"));
        }
    })
}
