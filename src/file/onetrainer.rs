//! OneTrainer's OFT and DOFT files, of all three generations of magnitude, and the third-party
//! writers that use its keys with `*_metadata` scalars.

use super::group::Group;
use super::keys::{self, EXTRA, Groups, unknown_keys};
use super::layer::{Description, stored};
use super::options::{Divisor, LoadOptions};
use super::read::Found;
use super::tensors::Marker;
use crate::adapter::{Stored, StoredLayer, Warning};
use crate::config::{LayerKind, Magnitude, Map};
use crate::error::{Result, shown};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// The cap that a marker of type BOOL means.
const BOOL_CAP: f64 = 0.999;

/// Keys that accompany OneTrainer's backups and are no adapter tensors.
const SIDE_DATA: [&str; 2] = ["bundle_emb.", "_aux."];

pub(super) fn recognises(found: &Found) -> bool {
    found.has("oft_R.weight")
}

/// Whether no other tool writes a role.
pub(super) fn is_own(role: &str) -> bool {
    role.starts_with("dora_")
        || role.starts_with("lora_magnitude")
        || role == "initial_norm"
        || role.ends_with("_metadata")
        || role.starts_with("oft_R.") && role != "oft_R.weight"
}

pub(super) fn read(found: &Found, options: &LoadOptions) -> Result<Stored> {
    let tensors = &found.tensors;
    let mut warnings = Vec::new();
    let mut extras = BTreeMap::new();
    // A file of this crate that was saved again elsewhere has lost its metadata, not its extras.
    for key in tensors.names() {
        if let Some(name) = key.strip_prefix(EXTRA) {
            extras.insert(name.to_string(), tensors.read(key)?);
        }
    }
    let groups = grouped(found, options, &mut warnings)?;
    let mut layers = BTreeMap::new();
    for (module, roles) in &groups {
        let group = Group {
            tensors,
            module,
            roles,
        };
        layers.insert(module.clone(), layer(&group, options, &mut warnings)?);
    }
    stored(tensors.file(), layers, extras, warnings)
}

fn grouped(found: &Found, options: &LoadOptions, warnings: &mut Vec<Warning>) -> Result<Groups> {
    let (tensors, file) = (&found.tensors, found.tensors.file());
    let third_party = found.any(|_, role| role.ends_with("_metadata"));
    let mut groups = Groups::new();
    let (mut unknown, mut side) = (Vec::new(), 0);
    for key in tensors.names() {
        if SIDE_DATA.iter().any(|prefix| key.starts_with(prefix)) {
            side += 1;
            continue;
        }
        match keys::parse(key) {
            _ if key.starts_with(EXTRA) => {}
            Some((_, "alpha")) if !third_party => unknown.push(shown(key)),
            Some(parsed) => keys::insert(file, &mut groups, parsed, key)?,
            None => unknown.push(shown(key)),
        }
    }
    if side > 0 {
        let message = format!("{side} tensors of side data were skipped");
        warnings.push(Warning::new("bundle_emb", message));
    }
    unknown_keys(tensors, unknown, options, warnings)?;
    keys::join(file, groups, |role| role == "oft_R.weight")
}

fn layer(group: &Group, options: &LoadOptions, warnings: &mut Vec<Warning>) -> Result<StoredLayer> {
    for (role, key) in group.roles {
        if ["oft_embedding_R.", "oft_r", "oft_s", "base_layer."]
            .iter()
            .any(|r| role.starts_with(r))
        {
            let key = shown(key);
            return group.refuse(format!(
                "`{key}` is of another tool than its `oft_R.weight`"
            ));
        }
    }
    let (packed, b) = group.packed("oft_R.weight")?;
    let rows = packed.dim(0)?;
    let map = map(group)?;
    let (shared, coft) = third_party(group, (rows, b), warnings)?;
    let divisor = divisor(group, b, options, warnings)?;
    let exponential = map == Map::Exponential && divisor != Divisor::None;
    let max_norm = cap(group, warnings)?;
    let (magnitude, value, norms) = magnitude(group, warnings)?;
    let description = Description {
        kind: kind(group)?,
        shared,
        kernels_turned: true,
        divisor: if exponential { Divisor::Sqrt } else { divisor },
        kernel_divisor: exponential.then_some(Divisor::TwoSqrt),
        max_norm,
        coft,
        magnitude,
        value,
        norms,
        ..Description::new(map, (packed, b))
    };
    description.layer(group, options)
}

/// The axes of the first two generations of magnitude are those of the weight.
fn kind(group: &Group) -> Result<Option<LayerKind>> {
    let roles = ["dora_scale", "dora_multiplier"];
    let Some(role) = roles.into_iter().find(|role| group.has(role)) else {
        return Ok(None);
    };
    let rank = group.tensors.read(group.key(role)?)?.rank();
    Ok(LayerKind::of_rank(rank))
}

fn map(group: &Group) -> Result<Map> {
    let cayley = match group.marker("oft_R.cans_oft")? {
        None => false,
        Some(marker) if marker.number() != 0. => true,
        Some(_) => return group.refuse("its marker `cans_oft` is false or 0"),
    };
    match (cayley, group.marker("oft_R.cans_exp")?.is_some()) {
        (true, true) => group.refuse("it has both markers `cans_oft` and `cans_exp`"),
        (true, false) => Ok(Map::Cayley),
        (false, true) => Ok(Map::Exponential),
        (false, false) => Ok(Map::SERIES),
    }
}

fn divisor(
    group: &Group,
    b: usize,
    options: &LoadOptions,
    warnings: &mut Vec<Warning>,
) -> Result<Divisor> {
    if let Some(scaled) = group.marker("scaled_oft_metadata")? {
        let there = group.has("oft_R.scaled_oft");
        return match scaled.number() {
            1. if there => Ok(Divisor::TwoSqrt),
            0. if !there => Ok(Divisor::None),
            _ => group.refuse("`scaled_oft_metadata` contradicts `scaled_oft`"),
        };
    }
    let Some(marker) = group.marker("oft_R.scaled_oft")? else {
        return Ok(Divisor::None);
    };
    let mut warn = |message: String| warnings.push(Warning::new(group.module, message));
    match marker {
        Marker::Bool(true) => Ok(Divisor::TwoSqrt),
        Marker::Int(1) => Ok(Divisor::SqrtEntries),
        Marker::Int(_) | Marker::Float(_) if marker.number() > 1. => {
            let found = marker.number();
            if found != b as f64 {
                warn(format!("`scaled_oft` is {found}, not its block size {b}"));
            }
            Ok(Divisor::TwoSqrt)
        }
        Marker::Float(1.) => {
            let date = group.tensors.metadata().get("modelspec.date");
            let day = date.and_then(|date| date.get(..10)).unwrap_or_default();
            if ("2026-02-14"..="2026-03-03").contains(&day) {
                warn(format!(
                    "exported on {day}: its divisor is taken as sqrt(b(b-1)/2)"
                ));
                return Ok(Divisor::SqrtEntries);
            }
            if day == "2026-03-04" {
                warn(format!(
                    "exported on {day}: its divisor may be sqrt(b(b-1)/2)"
                ));
            }
            if options.divisor.is_none() && group.has("dora_scale") {
                let message = "an adapter of February 2026 exported later has the divisor \
                               sqrt(b(b-1)/2) and cannot be told from this one";
                warn(message.into());
            }
            Ok(Divisor::TwoSqrt)
        }
        _ => group.refuse(format!("its marker `scaled_oft` is {marker:?}")),
    }
}

fn cap(group: &Group, warnings: &mut Vec<Warning>) -> Result<Option<f64>> {
    match group.marker("oft_R.clipped_oft")? {
        None => Ok(None),
        Some(Marker::Bool(true)) => {
            let message = format!("`clipped_oft` is true, read as a cap of {BOOL_CAP}");
            warnings.push(Warning::new(group.module, message));
            Ok(Some(BOOL_CAP))
        }
        Some(Marker::Float(cap)) if cap > 0. => Ok(Some(cap)),
        Some(other) => group.refuse(format!("its marker `clipped_oft` is {other:?}")),
    }
}

/// Checks the scalars of third-party writers against rows and block size; answers whether the row is
/// shared, and the `eps` of COFT.
fn third_party(
    group: &Group,
    (rows, b): (usize, usize),
    warnings: &mut Vec<Warning>,
) -> Result<(Option<bool>, Option<f64>)> {
    let number =
        |role: &str| -> Result<Option<f64>> { Ok(group.marker(role)?.map(Marker::number)) };
    for role in ["alpha", "oft_block_size_metadata"] {
        if let Some(size) = number(role)?
            && size != b as f64
        {
            return group.refuse(format!("`{role}` is {size}, its blocks are of size {b}"));
        }
    }
    let flag = |role: &str| match number(role)? {
        None => Ok(None),
        Some(0.) => Ok(Some(false)),
        Some(1.) => Ok(Some(true)),
        Some(found) => group.refuse(format!("`{role}` is {found}, expected 0 or 1")),
    };
    let shared = flag("oft_block_share_metadata")?;
    if shared == Some(true) && rows != 1 {
        return group.refuse(format!(
            "`oft_block_share_metadata` is 1, but it has {rows} rows"
        ));
    }
    if flag("oft_coft_metadata")? != Some(true) {
        return Ok((shared, None));
    }
    match number("coft_eps_metadata")? {
        Some(eps) if eps >= 0. => {
            let message = "its values are projected by COFT before use";
            warnings.push(Warning::new(group.module, message));
            Ok((shared, Some(eps)))
        }
        _ => group.refuse("`oft_coft_metadata` is 1 without a usable `coft_eps_metadata`"),
    }
}

#[allow(clippy::type_complexity, reason = "kind, value and norms, used once")]
fn magnitude(
    group: &Group,
    warnings: &mut Vec<Warning>,
) -> Result<(Magnitude, Option<Tensor>, Option<Tensor>)> {
    let all = [
        ("dora_scale", Magnitude::Absolute),
        ("lora_magnitude_vector.weight", Magnitude::Absolute),
        ("dora_multiplier", Magnitude::Factor),
        ("dora_log_multiplier", Magnitude::Log),
    ];
    let there = all.into_iter().filter(|(role, _)| group.has(role));
    let there: Vec<(&str, Magnitude)> = there.collect();
    let norms = group.has("initial_norm");
    match there.as_slice() {
        [] if norms => group.refuse("it has `initial_norm` without `dora_scale`"),
        [] => Ok((Magnitude::None, None, None)),
        [(role, Magnitude::Absolute)] => {
            let value = group.outputs(role)?;
            if norms {
                let norms = group.outputs("initial_norm")?;
                return Ok((Magnitude::Absolute, Some(value), Some(norms)));
            }
            let message = "it has no `initial_norm`; the norms of the base weight stand in for it";
            warnings.push(Warning::new(group.module, message));
            Ok((Magnitude::Absolute, Some(value), None))
        }
        [(role, _)] if norms => group.refuse(format!("it has `initial_norm` beside `{role}`")),
        [(role, kind)] => Ok((*kind, Some(group.outputs(role)?), None)),
        several => {
            let roles: Vec<&str> = several.iter().map(|(role, _)| *role).collect();
            group.refuse(format!(
                "it has several magnitudes, `{}`",
                roles.join("`, `")
            ))
        }
    }
}
