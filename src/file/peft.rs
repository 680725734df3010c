//! PEFT's OFT: folders of 0.16 and newer (`oft_R`), and files of 0.14 and 0.15 (`oft_r`, `oft_s`).

use super::keys::{self, Groups, unknown_keys};
use super::layer::{Description, Read, Values, magnitude, packed, warning};
use super::options::{Divisor, LoadOptions};
use super::tensors::{Tensors, refused, shown};
use crate::adapter::{PEFT_PREFIX, StoredLayer, Warning};
use crate::config::{LayerKind, Magnitude, Map};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";

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
            Error::file(file, format!("`{field}` is {found}, expected {expected}"))
        };
        let flag = |field: &str, absent: bool| match &json[field] {
            Value::Null => Ok(absent),
            Value::Bool(value) => Ok(*value),
            _ => Err(wrong(field, "true or false")),
        };
        match json["peft_type"].as_str() {
            Some("OFT") => {}
            _ => return Err(wrong("peft_type", "OFT")),
        }
        if flag("fan_in_fan_out", false)? {
            return Err(wrong(
                "fan_in_fan_out",
                "false: its base would be stored transposed",
            ));
        }
        let exact = !flag("use_cayley_neumann", true)?;
        let terms = match &json["num_cayley_neumann_terms"] {
            Value::Null => 5,
            value => match value.as_u64() {
                Some(terms) if terms <= 64 => terms as usize,
                _ => return Err(wrong("num_cayley_neumann_terms", "a whole number up to 64")),
            },
        };
        let version = json["peft_version"].as_str().unwrap_or_default();
        let mut parts = version
            .split('.')
            .map(|part| part.parse::<u32>().unwrap_or(0));
        let recent = (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (0, 18);
        let coft = match (flag("coft", false)?, &json["eps"]) {
            (false, _) => None,
            (true, Value::Null) => Some(6e-5),
            (true, value) => match value.as_f64() {
                Some(eps) if eps.is_finite() && eps >= 0. => Some(eps),
                _ => return Err(wrong("eps", "a finite number from 0")),
            },
        };
        let bias = json["bias"].as_str().unwrap_or("none").to_string();
        if !["none", "oft_only", "all"].contains(&bias.as_str()) {
            return Err(wrong("bias", "none, oft_only or all"));
        }
        let modules = json["modules_to_save"].as_array().into_iter().flatten();
        Ok(Self {
            block_share: flag("block_share", false)?,
            exact,
            terms,
            last_coefficient: if recent { 1 } else { 2 },
            coft,
            bias,
            modules_to_save: modules
                .filter_map(|m| m.as_str().map(String::from))
                .collect(),
            has_block_size: !json["oft_block_size"].is_null(),
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

pub(super) fn read(
    tensors: &Tensors,
    config: Option<&Config>,
    options: &LoadOptions,
) -> Result<Read> {
    let mut warnings = Vec::new();
    let (groups, extras) = grouped(tensors, config, options, &mut warnings)?;
    if config.is_none() {
        let message = "no adapter_config.json beside it: read as the series of five terms, last \
                       coefficient 1, without COFT";
        warnings.push(warning("adapter_config.json", message));
    }
    let mut layers = BTreeMap::new();
    for (module, roles) in &groups {
        let layer = match roles.contains_key("oft_r") || roles.contains_key("oft_s") {
            true => full_matrices(tensors, module, roles, config, options)?,
            false => packed_rows(tensors, module, roles, config, options)?,
        };
        layers.insert(module.clone(), layer);
    }
    if let Some(config) = config
        && !config.exact
        && config.terms < 2
    {
        let message = format!("{} terms rotate nothing", config.terms);
        warnings.push(warning("num_cayley_neumann_terms", message));
    }
    Ok((layers, extras, warnings))
}

fn bare(module: &str) -> &str {
    module.strip_prefix(PEFT_PREFIX).unwrap_or(module)
}

type Extras = BTreeMap<String, Tensor>;

fn grouped(
    tensors: &Tensors,
    config: Option<&Config>,
    options: &LoadOptions,
    warnings: &mut Vec<Warning>,
) -> Result<(Groups, Extras)> {
    let (mut groups, mut extras) = (Groups::new(), Extras::new());
    let mut unknown = Vec::new();
    for key in tensors.names() {
        let parsed = keys::parse(key);
        let bias = config.is_some_and(|config| config.bias != "none");
        let saved = |key: &str| {
            let listed = config.map_or(&[][..], |config| &config.modules_to_save);
            let module = bare(key).rsplit_once('.').map_or("", |(module, _)| module);
            listed.iter().any(|name| {
                let end = module.strip_suffix(name.as_str());
                end.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            })
        };
        match parsed {
            Some((module, "base_layer.bias")) if bias => {
                extras.insert(format!("{}.bias", bare(&module)), tensors.read(key)?);
            }
            Some((module, "base_layer.weight")) => {
                extras.insert(format!("{}.weight", bare(&module)), tensors.read(key)?);
            }
            Some((module, role)) if role.starts_with("oft_") && !role.ends_with("_metadata") => {
                let module = bare(&module).to_string();
                keys::insert(tensors.file(), &mut groups, (module, role), key)?;
            }
            _ if saved(key) || bias && key.ends_with("bias") => {
                let name = bare(key).replace(".base_layer.", ".");
                extras.insert(name.replace(".modules_to_save.", "."), tensors.read(key)?);
            }
            _ => unknown.push(shown(key)),
        }
    }
    unknown_keys(tensors, unknown, options, warnings)?;
    Ok((groups, extras))
}

fn packed_rows(
    tensors: &Tensors,
    module: &str,
    roles: &BTreeMap<&'static str, String>,
    config: Option<&Config>,
    options: &LoadOptions,
) -> Result<StoredLayer> {
    let refuse = |reason: &str| {
        refused(
            tensors.file(),
            format!("layer `{}`: {reason}", shown(module)),
        )
    };
    let (kind, key) = match (
        roles.get("oft_R.weight"),
        roles.get("oft_embedding_R.weight"),
    ) {
        (Some(key), None) if roles.len() == 1 => (None, key),
        (None, Some(key)) if roles.len() == 1 => (Some(LayerKind::Embedding), key),
        _ => return refuse("it has keys of several tools"),
    };
    if config.is_some_and(|config| !config.has_block_size) {
        return refuse(
            "its config lacks `oft_block_size`: PEFT 0.13 or older, which rotates outputs",
        );
    }
    let (values, b) = packed(tensors, key)?;
    let rows = values.dim(0)?;
    if config.is_some_and(|config| config.block_share) && rows != 1 {
        return refuse(&format!("`block_share` is true, but it has {rows} rows"));
    }
    // PEFT's exact map is the inverse of what its series approximates. A map that the caller gives
    // is that of +v.
    let exact = config.is_some_and(|config| config.exact) && options.map.is_none();
    let sign = if exact { -1. } else { 1. };
    let description = Description {
        kind,
        map: options
            .map
            .unwrap_or(config.map_or(Map::SERIES, Config::map)),
        divisor: options.divisor.filter(|divisor| *divisor != Divisor::None),
        kernel_divisor: None,
        sign,
        kernel_sign: sign,
        max_norm: None,
        coft: config.and_then(|config| config.coft),
    };
    let values = Values {
        packed: values,
        magnitude: Magnitude::None,
        value: None,
        norms: None,
    };
    description.layer(b, values)
}

/// `R = (I - S)(I + S)^-1` of `S = (A - A^T) / 2`: Cayley of `-S`; and a factor of any sign.
fn full_matrices(
    tensors: &Tensors,
    module: &str,
    roles: &BTreeMap<&'static str, String>,
    config: Option<&Config>,
    options: &LoadOptions,
) -> Result<StoredLayer> {
    let refuse = |reason: &str| {
        refused(
            tensors.file(),
            format!("layer `{}`: {reason}", shown(module)),
        )
    };
    let (Some(r), Some(s)) = (roles.get("oft_r"), roles.get("oft_s")) else {
        return refuse("it has only one of `oft_r` and `oft_s`");
    };
    let factor = magnitude(tensors, s)?;
    let a = tensors.read(r)?.to_dtype(DType::F64)?;
    let &[rows, b, columns] = a.dims() else {
        return refuse("its `oft_r` is not (D, b, b)");
    };
    if rows == 0 || b == 0 || b != columns {
        return refuse("its `oft_r` is not (D, b, b)");
    }
    let mut matrices: Vec<Vec<Vec<f64>>> = a.to_vec3()?;
    if let Some(eps) = config.and_then(|config| config.coft) {
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
        theta.extend(upper.map(|(i, j)| (matrix[i][j] - matrix[j][i]) / 2.));
    }
    let description = Description {
        kind: None,
        map: options.map.unwrap_or(Map::Cayley),
        divisor: options.divisor.filter(|divisor| *divisor != Divisor::None),
        kernel_divisor: None,
        sign: -1.,
        kernel_sign: -1.,
        max_norm: None,
        coft: None,
    };
    let values = Values {
        packed: Tensor::from_vec(theta, (rows, b * (b - 1) / 2), &Device::Cpu)?,
        magnitude: Magnitude::Factor,
        value: Some(factor),
        norms: None,
    };
    description.layer(b, values)
}
