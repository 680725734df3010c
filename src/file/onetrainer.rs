//! OneTrainer's OFT and DOFT files, of all three generations of magnitude, and the third-party
//! writers that use its keys with `*_metadata` scalars.

use super::keys::{self, EXTRA, Groups, unknown_keys};
use super::layer::{Description, Read, Values, check_factor, magnitude, packed, warning};
use super::options::{Divisor, LoadOptions};
use super::tensors::{Marker, Tensors, refused, shown};
use crate::adapter::{StoredLayer, Warning};
use crate::config::{LayerKind, Magnitude, Map};
use crate::error::Result;
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;

/// The cap that a marker of type BOOL means.
const BOOL_CAP: f64 = 0.999;

/// Keys that accompany OneTrainer's backups and are no adapter tensors.
const SIDE_DATA: [&str; 2] = ["bundle_emb.", "_aux."];

pub(super) fn read(tensors: &Tensors, options: &LoadOptions) -> Result<Read> {
    let mut warnings = Vec::new();
    let mut extras = BTreeMap::new();
    // A file of this crate that was saved again elsewhere has lost its metadata, not its extras.
    for key in tensors.names() {
        if let Some(name) = key.strip_prefix(EXTRA) {
            extras.insert(name.to_string(), tensors.read(key)?);
        }
    }
    let groups = grouped(tensors, options, &mut warnings)?;
    let mut layers = BTreeMap::new();
    for (module, roles) in &groups {
        let group = Group {
            tensors,
            module,
            roles,
            options,
        };
        layers.insert(module.clone(), group.layer(&mut warnings)?);
    }
    Ok((layers, extras, warnings))
}

fn grouped(
    tensors: &Tensors,
    options: &LoadOptions,
    warnings: &mut Vec<Warning>,
) -> Result<Groups> {
    let file = tensors.file();
    let mut groups = Groups::new();
    let (mut unknown, mut side) = (Vec::new(), 0);
    for key in tensors.names() {
        if SIDE_DATA.iter().any(|prefix| key.starts_with(prefix)) {
            side += 1;
        } else if key.starts_with(EXTRA) {
            continue;
        } else if let Some(parsed) = keys::parse(key) {
            keys::insert(file, &mut groups, parsed, key)?;
        } else {
            unknown.push(shown(key));
        }
    }
    if side > 0 {
        let message = format!("{side} tensors of side data were skipped");
        warnings.push(warning("bundle_emb", message));
    }
    unknown_keys(tensors, unknown, options, warnings)?;
    keys::join(file, groups, |role| role == "oft_R.weight")
}

struct Group<'a> {
    tensors: &'a Tensors<'a>,
    module: &'a str,
    roles: &'a BTreeMap<&'static str, String>,
    options: &'a LoadOptions,
}

impl Group<'_> {
    fn layer(&self, warnings: &mut Vec<Warning>) -> Result<StoredLayer> {
        self.known_roles()?;
        let (values, b) = packed(self.tensors, self.key("oft_R.weight")?)?;
        if b == 1 {
            warnings.push(warning(
                self.module,
                "its blocks are of size 1 and rotate nothing",
            ));
        }
        let exponential = self.roles.contains_key("oft_R.cans_exp");
        let map = self.map(exponential)?;
        let coft = self.third_party(b, warnings)?;
        let (mut divisor, mut kernel_divisor) = (self.divisor(b, warnings)?, None);
        if exponential && divisor.is_some() {
            (divisor, kernel_divisor) = (Some(Divisor::Sqrt), Some(Divisor::TwoSqrt));
        }
        if let Some(given) = self.options.divisor {
            divisor = (given != Divisor::None).then_some(given);
            kernel_divisor = None;
        }
        let max_norm = self.cap(warnings)?;
        let (magnitude, value, norms) = self.magnitude(warnings)?;
        let description = Description {
            kind: self.kind()?,
            map: self.options.map.unwrap_or(map),
            divisor,
            kernel_divisor,
            sign: 1.,
            kernel_sign: -1.,
            max_norm,
            coft,
        };
        let values = Values {
            packed: values,
            magnitude,
            value,
            norms,
        };
        description.layer(b, values)
    }

    /// The axes of the first two generations of magnitude are those of the weight.
    fn kind(&self) -> Result<Option<LayerKind>> {
        let roles = ["dora_scale", "dora_multiplier"];
        let Some(key) = roles.iter().find_map(|role| self.roles.get(role)) else {
            return Ok(None);
        };
        Ok(LayerKind::of_rank(self.tensors.read(key)?.rank()))
    }

    fn key(&self, role: &str) -> Result<&str> {
        match self.roles.get(role) {
            Some(key) => Ok(key),
            None => self.refuse(&format!("it has no `{role}`")),
        }
    }

    fn known_roles(&self) -> Result<()> {
        for (role, key) in self.roles {
            let embedding = role.starts_with("oft_embedding_R");
            if embedding
                || ["oft_r", "oft_s", "base_layer.bias", "base_layer.weight"].contains(role)
            {
                let key = shown(key);
                return self.refuse(&format!(
                    "`{key}` is of another tool than its `oft_R.weight`"
                ));
            }
        }
        Ok(())
    }

    fn marker(&self, role: &str) -> Result<Option<Marker>> {
        match self.roles.get(role) {
            Some(key) => self.tensors.marker(key).map(Some),
            None => Ok(None),
        }
    }

    fn map(&self, exponential: bool) -> Result<Map> {
        let cayley = match self.marker("oft_R.cans_oft")? {
            None => false,
            Some(marker) if marker.number() != 0. => true,
            Some(_) => return self.refuse("its marker `cans_oft` is false or 0"),
        };
        match (cayley, exponential) {
            (true, true) => self.refuse("it has both markers `cans_oft` and `cans_exp`"),
            (true, false) => Ok(Map::Cayley),
            (false, true) => Ok(Map::Exponential),
            (false, false) => Ok(Map::SERIES),
        }
    }

    fn divisor(&self, b: usize, warnings: &mut Vec<Warning>) -> Result<Option<Divisor>> {
        if let Some(scaled) = self.marker("scaled_oft_metadata")? {
            let there = self.roles.contains_key("oft_R.scaled_oft");
            return match scaled.number() {
                1. if there => Ok(Some(Divisor::TwoSqrt)),
                0. if !there => Ok(None),
                _ => self.refuse("`scaled_oft_metadata` contradicts `scaled_oft`"),
            };
        }
        let Some(marker) = self.marker("oft_R.scaled_oft")? else {
            return Ok(None);
        };
        let mut warn = |message: String| warnings.push(warning(self.module, message));
        match marker {
            Marker::Bool(true) => Ok(Some(Divisor::TwoSqrt)),
            Marker::Int(1) => Ok(Some(Divisor::SqrtEntries)),
            Marker::Int(_) | Marker::Float(_) if marker.number() > 1. => {
                if marker.number() != b as f64 {
                    warn(format!(
                        "`scaled_oft` is {}, not its block size {b}",
                        marker.number()
                    ));
                }
                Ok(Some(Divisor::TwoSqrt))
            }
            Marker::Float(1.) => {
                let date = self.tensors.metadata().get("modelspec.date");
                let day = date.and_then(|date| date.get(..10)).unwrap_or_default();
                if ("2026-02-14"..="2026-03-03").contains(&day) {
                    warn(format!(
                        "exported on {day}: its divisor is taken as sqrt(b(b-1)/2)"
                    ));
                    return Ok(Some(Divisor::SqrtEntries));
                }
                if day == "2026-03-04" {
                    warn(format!(
                        "exported on {day}: its divisor may be sqrt(b(b-1)/2)"
                    ));
                }
                if self.options.divisor.is_none() && self.roles.contains_key("dora_scale") {
                    let message = "an adapter of February 2026 exported later has the divisor \
                                   sqrt(b(b-1)/2) and cannot be told from this one";
                    warn(message.into());
                }
                Ok(Some(Divisor::TwoSqrt))
            }
            _ => self.refuse(&format!("its marker `scaled_oft` is {marker:?}")),
        }
    }

    fn cap(&self, warnings: &mut Vec<Warning>) -> Result<Option<f64>> {
        match self.marker("oft_R.clipped_oft")? {
            None => Ok(None),
            Some(Marker::Bool(true)) => {
                let message = format!("`clipped_oft` is true, read as a cap of {BOOL_CAP}");
                warnings.push(warning(self.module, message));
                Ok(Some(BOOL_CAP))
            }
            Some(Marker::Float(cap)) if cap > 0. => Ok(Some(cap)),
            Some(other) => self.refuse(&format!("its marker `clipped_oft` is {other:?}")),
        }
    }

    /// Checks the scalars of third-party writers; answers the `eps` of COFT.
    fn third_party(&self, b: usize, warnings: &mut Vec<Warning>) -> Result<Option<f64>> {
        let meta =
            |name: &str| -> Result<Option<f64>> { Ok(self.marker(name)?.map(Marker::number)) };
        if let Some(alpha) = meta("alpha")? {
            let third_party = self.roles.keys().any(|role| role.ends_with("_metadata"));
            if !third_party || alpha != b as f64 {
                return self.refuse(&format!("`alpha` is {alpha}, which is no block size {b}"));
            }
        }
        if let Some(size) = meta("oft_block_size_metadata")?
            && size != b as f64
        {
            return self.refuse(&format!(
                "`oft_block_size_metadata` is {size}, its blocks {b}"
            ));
        }
        if let Some(share) = meta("oft_block_share_metadata")? {
            let rows = self.tensors.read(self.key("oft_R.weight")?)?.dim(0)?;
            if share == 1. && rows != 1 {
                return self.refuse("`oft_block_share_metadata` is 1, but it has several rows");
            }
        }
        match meta("oft_coft_metadata")? {
            Some(1.) => match meta("coft_eps_metadata")? {
                Some(eps) if eps.is_finite() && eps >= 0. => {
                    let message = "its values are projected by COFT before use";
                    warnings.push(warning(self.module, message));
                    Ok(Some(eps))
                }
                _ => self.refuse("`oft_coft_metadata` is 1 without a usable `coft_eps_metadata`"),
            },
            _ => Ok(None),
        }
    }

    #[allow(clippy::type_complexity, reason = "kind, value and norms, used once")]
    fn magnitude(
        &self,
        warnings: &mut Vec<Warning>,
    ) -> Result<(Magnitude, Option<Tensor>, Option<Tensor>)> {
        let scale = ["dora_scale", "lora_magnitude_vector.weight"];
        let all = [scale[0], scale[1], "dora_multiplier", "dora_log_multiplier"];
        let there: Vec<&str> = all
            .into_iter()
            .filter(|r| self.roles.contains_key(r))
            .collect();
        let initial = self.roles.get("initial_norm");
        let role = match there.as_slice() {
            [] if initial.is_some() => {
                return self.refuse("it has `initial_norm` without `dora_scale`");
            }
            [] => return Ok((Magnitude::None, None, None)),
            [role] => *role,
            several => {
                return self.refuse(&format!(
                    "it has several magnitudes, `{}`",
                    several.join("`, `")
                ));
            }
        };
        let key = self.key(role)?;
        let value = magnitude(self.tensors, key)?;
        if !scale.contains(&role) {
            if initial.is_some() {
                return self.refuse(&format!("it has `initial_norm` beside `{role}`"));
            }
            let kind = match role {
                "dora_multiplier" => Magnitude::Factor,
                _ => {
                    let factor = value.to_dtype(DType::F32)?.exp()?;
                    check_factor(self.tensors, key, &factor)?;
                    Magnitude::Log
                }
            };
            return Ok((kind, Some(value), None));
        }
        let Some(initial) = initial else {
            let message = "it has no `initial_norm`; the norms of the base weight stand in for it";
            warnings.push(warning(self.module, message));
            return Ok((Magnitude::Absolute, Some(value), None));
        };
        let norms = magnitude(self.tensors, initial)?;
        let lowest = norms
            .flatten_all()?
            .to_dtype(DType::F64)?
            .min(0)?
            .to_scalar::<f64>()?;
        if norms.elem_count() != value.elem_count() || lowest < 0. {
            return self
                .refuse("its `initial_norm` is negative or of another length than `dora_scale`");
        }
        Ok((Magnitude::Absolute, Some(value), Some(norms)))
    }

    fn refuse<T>(&self, reason: &str) -> Result<T> {
        refused(
            self.tensors.file(),
            format!("layer `{}`: {reason}", shown(self.module)),
        )
    }
}
