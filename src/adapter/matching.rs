//! Which module of a file is which layer of a model: exact names first, then flattened ones, then
//! those without their prefix.

/// Prefixes of known writers with the component that they name, the longest that fits counts.
const PREFIXES: [(&str, Option<&str>); 22] = [
    ("model.diffusion_model.", DENOISER),
    ("diffusion_model.", DENOISER),
    ("transformer.", DENOISER),
    ("unet.", DENOISER),
    ("prior.", DENOISER),
    ("lora_unet_", DENOISER),
    ("lora_unet.", DENOISER),
    ("lora_transformer_", DENOISER),
    ("lora_transformer.", DENOISER),
    ("lora_prior_unet_", DENOISER),
    ("lora_prior_unet.", DENOISER),
    ("lycoris_", DENOISER),
    ("text_encoder.", TEXT),
    ("lora_te_", TEXT),
    ("lora_te1_", TEXT),
    ("text_encoder_2.", Some("text_encoder_2")),
    ("lora_te2_", Some("text_encoder_2")),
    ("text_encoder_3.", Some("text_encoder_3")),
    ("lora_te3_", Some("text_encoder_3")),
    ("text_encoder_4.", Some("text_encoder_4")),
    ("lora_te4_", Some("text_encoder_4")),
    ("lora_prior_te_", Some("prior_text_encoder")),
];

const DENOISER: Option<&str> = Some("denoiser");
const TEXT: Option<&str> = Some("text_encoder");

/// What PEFT puts before every path.
pub(crate) const PEFT_PREFIX: &str = "base_model.model.";

/// `.` and `_` are one.
pub(crate) fn flat(name: &str) -> String {
    name.replace('.', "_")
}

/// A name cut at its prefix.
struct Cut<'a> {
    component: Option<&'a str>,
    bare: &'a str,
}

fn cut(name: &str) -> Cut<'_> {
    let named = name.strip_prefix("text_encoders.").and_then(|rest| {
        let (component, inner) = rest.split_once('.')?;
        Some((component, inner.strip_prefix("transformer.")?))
    });
    if let Some((component, bare)) = named {
        return Cut {
            component: Some(component),
            bare,
        };
    }
    let fits = PREFIXES
        .iter()
        .filter(|(prefix, _)| name.starts_with(prefix));
    match fits.max_by_key(|(prefix, _)| prefix.len()) {
        Some((prefix, component)) => Cut {
            component: *component,
            bare: &name[prefix.len()..],
        },
        None => Cut {
            component: None,
            bare: name,
        },
    }
}

/// The component that the prefix of a module names.
pub(crate) fn component(module: &str) -> Option<&str> {
    cut(module.strip_prefix(PEFT_PREFIX).unwrap_or(module)).component
}

/// The component that a name means: as adapter files call it (`te1`, `unet`), as the folders of a pipeline
/// do (`text_encoder_2`, `transformer`), or its own.
pub(crate) fn component_named(name: &str) -> &str {
    match name {
        "unet" | "transformer" | "prior" | "diffusion_model" => "denoiser",
        "te" | "te1" | "text_encoder_1" => "text_encoder",
        "te2" => "text_encoder_2",
        "te3" => "text_encoder_3",
        "te4" => "text_encoder_4",
        "prior_te" => "prior_text_encoder",
        other => other,
    }
}

/// The rule under which a module means a path: 0 the same name, 1 the same but for dots, 2 without
/// the module's prefix, 3 without the path's as well. None when it does not.
pub(crate) fn rule(module: &str, path: &str) -> Option<u8> {
    let inner = module.strip_prefix(PEFT_PREFIX).unwrap_or(module);
    if module == path || inner == path {
        return Some(0);
    }
    if same(module, path) || same(inner, path) {
        return Some(1);
    }
    let of_module = cut(inner);
    if same(of_module.bare, path) {
        return Some(2);
    }
    let of_path = cut(path);
    let of_one = of_path.component.is_some() && of_path.component == of_module.component;
    (of_one && same(of_module.bare, of_path.bare)).then_some(3)
}

/// Whether two names are the same flattened. Every module is compared with every path: nothing is copied.
fn same(a: &str, b: &str) -> bool {
    let letter = |byte: u8| if byte == b'.' { b'_' } else { byte };
    a.len() == b.len()
        && a.bytes()
            .zip(b.bytes())
            .all(|(a, b)| letter(a) == letter(b))
}

/// The same for a name of a table, which is no path of the model: numbered behind those rules, and with
/// one more for a module without a prefix.
pub(crate) fn translated(module: &str, name: &str) -> Option<u8> {
    let inner = module.strip_prefix(PEFT_PREFIX).unwrap_or(module);
    let plain = || cut(inner).component.is_none() && same(inner, cut(name).bare);
    let found = rule(module, name).or_else(|| plain().then_some(4));
    found.map(|rule| TRANSLATED + rule)
}

/// The first number of [`translated`].
pub(crate) const TRANSLATED: u8 = 4;

/// Two names that mean the same under some rule have one of these in common.
pub(crate) fn keys(name: &str) -> [String; 2] {
    let inner = name.strip_prefix(PEFT_PREFIX).unwrap_or(name);
    [flat(inner), flat(cut(inner).bare)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_meet_by_the_first_rule_that_fits() {
        for (module, path, expected) in [
            ("blocks.0.q", "blocks.0.q", Some(0)),
            ("base_model.model.blocks.0.q", "blocks.0.q", Some(0)),
            ("blocks_0_q", "blocks.0.q", Some(1)),
            ("lora_unet_mid_to_q", "mid.to_q", Some(2)),
            ("transformer.blocks.0.q", "blocks.0.q", Some(2)),
            (
                "lora_unet_mid_to_q",
                "model.diffusion_model.mid.to_q",
                Some(3),
            ),
            ("lora_te2_layers_0_q", "text_encoder_2.layers.0.q", Some(3)),
            ("lora_te2_layers_0_q", "text_encoder.layers.0.q", None),
            ("text_encoders.clip_l.transformer.a.b", "a.b", Some(2)),
            ("blocks.0.q", "blocks.0.k", None),
        ] {
            assert_eq!(rule(module, path), expected, "{module} and {path}");
            let common = keys(module).iter().any(|key| keys(path).contains(key));
            assert_eq!(
                common,
                rule(module, path).is_some() || module.contains("te2")
            );
        }
        assert_eq!(translated("mid.to_q", "unet.mid.to_q"), Some(8));
        assert_eq!(translated("lora_te_mid_to_q", "unet.mid.to_q"), None);
        assert_eq!(
            component("base_model.model.text_encoder.a"),
            Some("text_encoder")
        );
    }
}
