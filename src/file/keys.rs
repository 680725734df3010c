//! Keys of adapter files: which module, which role; and modules in two spellings made one.

use super::options::LoadOptions;
use super::tensors::{Tensors, refused};
use crate::adapter::{PEFT_PREFIX, Warning, flat};
use crate::error::{Result, shown};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// What this crate puts before the names of extra tensors.
pub(super) const EXTRA: &str = "doft_extra.";

/// Roles whose separator and inner dots may each be `.` or `_`.
const LOOSE: [&str; 9] = [
    "oft_R.weight",
    "oft_R.scaled_oft",
    "oft_R.clipped_oft",
    "oft_R.cans_oft",
    "oft_R.cans_exp",
    "dora_scale",
    "initial_norm",
    "dora_multiplier",
    "dora_log_multiplier",
];

/// Roles that stand behind a dot.
const DOTTED: [&str; 16] = [
    "oft_embedding_R.weight",
    "oft_embedding_R.scaled_oft",
    "oft_embedding_R.clipped_oft",
    "oft_embedding_R.cans_oft",
    "oft_embedding_R.cans_exp",
    "lora_magnitude_vector.weight",
    "oft_r",
    "oft_s",
    "alpha",
    "oft_block_size_metadata",
    "oft_block_share_metadata",
    "oft_coft_metadata",
    "coft_eps_metadata",
    "scaled_oft_metadata",
    "base_layer.bias",
    "base_layer.weight",
];

/// Families that this crate cannot express, by the segments of their keys; `_` at the end stands for
/// any rest.
const REFUSED: [(&[&str], &str); 6] = [
    (
        &[
            "dora_log_multiplier_row",
            "dora_log_multiplier_col",
            "capped_oft",
        ],
        "is of OneTrainer's fourth generation (`dora_log_multiplier_row` and `_col`, `capped_oft`), with a \
         magnitude of the input as well; this crate does not read it yet",
    ),
    (
        &["oft_blocks", "oft_diag"],
        "is LyCORIS or kohya OFT, which rotates the output side of a weight; this crate rotates the \
         input side and cannot express it",
    ),
    (
        &["boft_R", "boft_s"],
        "is BOFT, whose butterfly factors permute; this crate's rotation is block-diagonal",
    ),
    (
        &[
            "lora_A",
            "lora_B",
            "lora_up",
            "lora_down",
            "lora_embedding_",
        ],
        "is LoRA or DoRA, not an OFT adapter; merge it with the program that made it",
    ),
    (&["hada_"], "is LoHa, not an OFT adapter"),
    (&["lokr_"], "is LoKr, not an OFT adapter"),
];

/// The reason why a key belongs to a family that is refused.
pub(super) fn refused_family(key: &str) -> Option<&'static str> {
    let is = |segment: &str, name: &str| {
        segment == name
            || name.ends_with('_') && segment.starts_with(name)
            || segment.ends_with(&format!("_{name}"))
    };
    let named = |name: &&str| key.split('.').any(|segment| is(segment, name));
    let found = REFUSED.iter().find(|(names, _)| names.iter().any(named));
    found.map(|(_, reason)| *reason)
}

/// Segments that programs put into paths around a model: torch.compile, FSDP, activation checkpointing.
const WRAPPERS: [&str; 3] = [
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
];

/// A key without what wraps a model, and `module.` in front, of data parallel training.
pub(super) fn unwrapped(key: &str) -> Cow<'_, str> {
    let mut rest = key;
    while let Some(inner) = rest.strip_prefix("module.") {
        // The wrapper is around all of PEFT's model; elsewhere it may be a layer of that name.
        match inner.contains(PEFT_PREFIX) {
            true => rest = inner,
            false => break,
        }
    }
    match rest.split('.').any(|segment| WRAPPERS.contains(&segment)) {
        false => Cow::Borrowed(rest),
        true => {
            let kept = rest
                .split('.')
                .filter(|segment| !WRAPPERS.contains(segment));
            Cow::Owned(kept.collect::<Vec<_>>().join("."))
        }
    }
}

/// Roles of PEFT that carry the name of the adapter before `weight`, where it was not removed.
const NAMED: [&str; 2] = ["oft_R", "oft_embedding_R"];

/// Module and role of a key, and the name of the adapter in it.
pub(super) fn parse_named(key: &str) -> Option<(String, &'static str, Option<&str>)> {
    if let Some((before, name)) = key.strip_suffix(".weight").and_then(|k| k.rsplit_once('.'))
        && NAMED
            .iter()
            .any(|role| before.ends_with(&format!(".{role}")))
        && let Some((module, role)) = cut(&format!("{before}.weight"))
    {
        return Some((module, role, Some(name)));
    }
    parse(key).map(|(module, role)| (module, role, None))
}

/// Whether no segment of a key has the look of an adapter's own tensor.
pub(super) fn plain(key: &str) -> bool {
    !key.split('.').any(|segment| {
        ["oft_", "dora_", "lora_", "boft_"]
            .iter()
            .any(|start| segment.starts_with(start))
    })
}

/// Module and role of a key.
pub(super) fn parse(key: &str) -> Option<(String, &'static str)> {
    // `oft_R.default.weight` and `oft_r.default` carry the name that PEFT gave the adapter; before
    // the role, `default` is a part of the path.
    if let Some((before, end)) = key.rsplit_once(".default")
        && (end.is_empty() || end.starts_with('.'))
        && let Some((module, role)) = cut(&format!("{before}{end}"))
        && role.ends_with(end)
    {
        return Some((module, role));
    }
    cut(key)
}

/// Module and role of a key of this crate, which spells both in one way.
pub(super) fn parse_exactly(key: &str) -> Option<(String, &'static str)> {
    cut(key).filter(|(module, role)| *key == format!("{module}.{role}"))
}

fn cut(key: &str) -> Option<(String, &'static str)> {
    let dotted = DOTTED.into_iter().filter_map(|role| {
        let module = key.strip_suffix(role)?.strip_suffix('.')?;
        Some((module, role))
    });
    let loose = LOOSE.into_iter().filter_map(|role| {
        let start = key.len().checked_sub(role.len())?;
        let (module, end) = (key.get(..start)?, key.get(start..)?);
        let same = end == role || role.contains('.') && end == role.replace('.', "_");
        let module = module.strip_suffix(['.', '_'])?;
        same.then_some((module, role))
    });
    let fits = dotted.chain(loose).filter(|(module, _)| !module.is_empty());
    // `dora_scale` ends no other role, but the longest is the one that is meant all the same.
    let (module, role) = fits.max_by_key(|(_, role)| role.len())?;
    Some((module.to_string(), role))
}

/// Keys of one module by role.
pub(super) type Roles = BTreeMap<&'static str, String>;

/// Keys by module and role.
pub(super) type Groups = BTreeMap<String, Roles>;

/// Puts a key into its group.
pub(super) fn insert(
    file: &Path,
    groups: &mut Groups,
    (module, role): (String, &'static str),
    key: &str,
) -> Result<()> {
    let group = groups.entry(module).or_default();
    if let Some(other) = group.insert(role, key.to_string()) {
        let (key, other) = (shown(key), shown(&other));
        return refused(
            file,
            format!("`{other}` and `{key}` are the same tensor of one layer"),
        );
    }
    Ok(())
}

/// Joins groups without a rotation to the one of the same flattened name that has one.
pub(super) fn join(file: &Path, groups: Groups, is_rotation: fn(&str) -> bool) -> Result<Groups> {
    let (mut whole, parts): (Groups, Groups) = groups
        .into_iter()
        .partition(|(_, roles)| roles.keys().any(|role| is_rotation(role)));
    let mut by_flat: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for module in whole.keys() {
        by_flat
            .entry(flat(module))
            .or_default()
            .push(module.clone());
    }
    for (module, roles) in parts {
        let key = roles.values().next().map_or("", String::as_str);
        let found = by_flat.get(&flat(&module)).map_or(&[][..], Vec::as_slice);
        let [to] = found else {
            let (key, count) = (shown(key), found.len());
            return refused(
                file,
                match count {
                    0 => format!("`{key}` belongs to no rotation in the file"),
                    _ => format!("`{key}` belongs to one of {count} rotations of that name"),
                },
            );
        };
        for (role, key) in roles {
            insert(file, &mut whole, (to.clone(), role), &key)?;
        }
    }
    Ok(whole)
}

/// Refuses keys that no role fits, or warns of them.
pub(super) fn unknown_keys(
    tensors: &Tensors,
    unknown: Vec<String>,
    options: &LoadOptions,
    warnings: &mut Vec<Warning>,
) -> Result<()> {
    if unknown.is_empty() {
        return Ok(());
    }
    let count = unknown.len();
    let first = unknown[..count.min(5)].join("`, `");
    if options.allow_unknown {
        let message = match count {
            1 => "this unknown key was skipped".to_string(),
            _ => format!("{count} unknown keys were skipped, the first are `{first}`"),
        };
        warnings.push(Warning::new(&unknown[0], message));
        return Ok(());
    }
    let reason = format!(
        "{count} unexpected keys, the first are `{first}`; `allow_unknown` (--allow-unknown) skips them"
    );
    refused(tensors.file(), reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_cut_at_their_role() {
        for (key, module, role) in [
            ("a.b.oft_R.weight", "a.b", "oft_R.weight"),
            (
                "base_model.model.a.oft_R.default.weight",
                "base_model.model.a",
                "oft_R.weight",
            ),
            ("lora_unet_a_oft_R_weight", "lora_unet_a", "oft_R.weight"),
            (
                "lora_unet_a_dora_log_multiplier",
                "lora_unet_a",
                "dora_log_multiplier",
            ),
            (
                "a.oft_embedding_R.scaled_oft",
                "a",
                "oft_embedding_R.scaled_oft",
            ),
            ("a.oft_r.default", "a", "oft_r"),
            ("a.default.b.oft_R.weight", "a.default.b", "oft_R.weight"),
            (
                "a.default.oft_R.default.weight",
                "a.default",
                "oft_R.weight",
            ),
            ("a.default.alpha", "a.default", "alpha"),
        ] {
            assert_eq!(parse(key), Some((module.to_string(), role)), "{key}");
        }
        for key in [
            "oft_R.weight",
            "a.dora_log_multiplier_row",
            "a.oft_R.other",
            "a.weight",
            "",
        ] {
            assert_eq!(parse(key), None, "{key}");
        }
    }
}
