//! [`Scope`]: the tensors of one model inside a checkpoint, and the rule for their names.

use super::{Layers, NamedRows, clip, flux, sd3, unet};

/// What may stand before the names of a denoiser.
const DENOISERS: [&str; 6] = [
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "transformer.",
    "unet.",
    "",
];

/// What stands before the names of a text encoder, which of the encoders that is, and what ComfyUI puts
/// before its names.
const CLIPS: [(&str, &str, Option<&str>); 8] = [
    ("cond_stage_model.transformer.", "text_encoder", CLIP_L),
    ("cond_stage_model.model.", "text_encoder", None),
    (
        "conditioner.embedders.0.transformer.",
        "text_encoder",
        CLIP_L,
    ),
    // The refiner of XL has the second encoder alone.
    ("conditioner.embedders.0.model.", "text_encoder_2", CLIP_G),
    ("conditioner.embedders.1.model.", "text_encoder_2", CLIP_G),
    (
        "conditioner.embedders.1.transformer.",
        "text_encoder_2",
        CLIP_G,
    ),
    ("text_encoders.clip_l.transformer.", "text_encoder", CLIP_L),
    (
        "text_encoders.clip_g.transformer.",
        "text_encoder_2",
        CLIP_G,
    ),
];

const CLIP_L: Option<&str> = Some("text_encoders.clip_l.transformer");
const CLIP_G: Option<&str> = Some("text_encoders.clip_g.transformer");

const T5: &str = "text_encoders.t5xxl.transformer.";

/// Parts of a checkpoint that are no denoiser, where that has no prefix of its own.
const OTHERS: [&str; 7] = [
    "cond_stage_model.",
    "conditioner.",
    "first_stage_model.",
    "model_ema.",
    "text_encoders.",
    "vae.",
    "control_model.",
];

/// The tensors of one model, and the rule for their names.
#[derive(Clone, Debug)]
pub(super) struct Scope {
    prefix: String,
    /// What adapters put before the names of diffusers.
    component: &'static str,
    /// What others put there.
    alias: Option<&'static str>,
    rule: Rule,
}

#[derive(Clone, Copy, Debug)]
enum Rule {
    Flux,
    Sd3,
    Unet {
        blocks: usize,
    },
    OpenClip,
    /// Names of transformers, behind what is missing before them.
    Transformers(&'static str),
}

/// The model that a tensor belongs to.
pub(super) fn of<'a>(scopes: &'a [Scope], tensor: &str) -> Option<&'a Scope> {
    let fits = scopes.iter().filter(|scope| scope.holds(tensor));
    fits.max_by_key(|scope| scope.prefix.len())
}

/// The models of a checkpoint that has tensors of some names, and what they are together.
pub(super) fn find(has: &impl Fn(&str) -> bool) -> Option<(&'static str, Vec<Scope>)> {
    let denoiser = DENOISERS.iter().find_map(|prefix| {
        let rule = denoiser(&|name| has(&format!("{prefix}{name}")))?;
        let component = match rule {
            Rule::Unet { .. } => "unet",
            _ => "transformer",
        };
        Some(scope(prefix, component, None, rule))
    });
    let rule = denoiser.as_ref().map(|scope| scope.rule);
    let mut scopes: Vec<Scope> = denoiser.into_iter().collect();
    for (prefix, component, alias) in CLIPS {
        let rule = clip(&|name| has(&format!("{prefix}{name}")));
        scopes.extend(rule.map(|rule| scope(prefix, component, alias, rule)));
    }
    let two = scopes.iter().any(|s| s.component == "text_encoder_2");
    if has(&format!(
        "{T5}encoder.block.0.layer.0.SelfAttention.q.weight"
    )) {
        // Flux has it in the second place, the others behind two encoders.
        let component = match matches!(rule, Some(Rule::Flux)) || rule.is_none() && !two {
            true => "text_encoder_2",
            false => "text_encoder_3",
        };
        let alias = Some("text_encoders.t5xxl.transformer");
        scopes.push(scope(T5, component, alias, Rule::Transformers("")));
    }
    let open = |s: &Scope| matches!(s.rule, Rule::OpenClip);
    let family = match rule {
        Some(Rule::Flux) => "Flux",
        Some(Rule::Sd3) => "Stable Diffusion 3",
        Some(_) if two => "Stable Diffusion XL",
        Some(_) if scopes.iter().any(open) => "Stable Diffusion 2",
        Some(_) => "Stable Diffusion",
        None if scopes.is_empty() => return None,
        None => "text encoders",
    };
    Some((family, scopes))
}

fn scope(prefix: &str, component: &'static str, alias: Option<&'static str>, rule: Rule) -> Scope {
    Scope {
        prefix: prefix.to_string(),
        component,
        alias,
        rule,
    }
}

fn denoiser(has: &impl Fn(&str) -> bool) -> Option<Rule> {
    let all = |names: &[&str]| names.iter().all(|name| has(name));
    // A modulation in each block tells it from later models with blocks of the same names.
    let flux = [
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mod.lin.weight",
        "single_blocks.0.linear1.weight",
    ];
    if all(&flux) {
        return Some(Rule::Flux);
    }
    if all(&["joint_blocks.0.x_block.attn.qkv.weight"]) {
        return Some(Rule::Sd3);
    }
    unet::blocks_per_level(has).map(|blocks| Rule::Unet { blocks })
}

fn clip(has: &impl Fn(&str) -> bool) -> Option<Rule> {
    if has("transformer.resblocks.0.attn.in_proj_weight") {
        return Some(Rule::OpenClip);
    }
    if has("text_model.encoder.layers.0.self_attn.q_proj.weight") {
        return Some(Rule::Transformers(""));
    }
    let bare = has("encoder.layers.0.self_attn.q_proj.weight");
    bare.then_some(Rule::Transformers("text_model."))
}

impl Scope {
    fn holds(&self, tensor: &str) -> bool {
        let other = || OTHERS.iter().any(|other| tensor.starts_with(other));
        tensor.starts_with(&self.prefix) && (!self.prefix.is_empty() || !other())
    }

    /// The layers in one of its tensors.
    pub(super) fn parts(&self, tensor: &str, shape: &[usize]) -> Option<Vec<NamedRows>> {
        let inner = tensor.strip_prefix(&self.prefix)?;
        // A shape of no elements may have axes of any length.
        let widths = shape.iter().skip(1);
        let width = widths.fold(1usize, |width, axis| width.saturating_mul(*axis));
        let rows = *shape.first()?;
        let path = inner.strip_suffix(".weight");
        let split = || Some(path?.split('.').collect::<Vec<&str>>());
        let mut transposed = false;
        let layers = match self.rule {
            Rule::Flux => flux::layers(&split()?, rows, width)?,
            Rule::Sd3 => sd3::layers(&split()?, rows, width)?,
            Rule::Unet { blocks } => unet::layers(&split()?, rows, blocks)?,
            Rule::Transformers(before) => clip::transformers(inner, before, rows)?,
            Rule::OpenClip => {
                let (layers, turned) = clip::open(inner, rows, width)?;
                if turned && shape.len() != 2 {
                    return None;
                }
                transposed = turned;
                layers
            }
        };
        Some(self.named(layers, path, transposed))
    }

    fn named(&self, layers: Layers, path: Option<&str>, transposed: bool) -> Vec<NamedRows> {
        let fused = layers.len() > 1;
        let named = |(i, (name, rows)): (usize, (String, _))| {
            let component = self.component;
            let mut aliases = Vec::new();
            // transformers 5 has lost a level.
            let short = name.strip_prefix("text_model.");
            aliases.extend(short.map(|short| format!("{component}.{short}")));
            aliases.extend(self.alias.map(|alias| format!("{alias}.{name}")));
            // Older backups of OneTrainer number the parts of a fused weight.
            let parts = path.filter(|_| fused);
            aliases.extend(parts.map(|path| format!("{component}.{path}.{i}")));
            NamedRows {
                module: format!("{component}.{name}"),
                aliases,
                rows,
                transposed,
            }
        };
        layers.into_iter().enumerate().map(named).collect()
    }
}
