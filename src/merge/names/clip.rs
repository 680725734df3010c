//! Text encoders: those of OpenCLIP, with q, k and v in one weight and names that do not end in `weight`,
//! and those that have the names of transformers behind a prefix.

use super::{Layers, each, number, one};

/// The layers of transformers in one tensor of OpenCLIP, and whether it is stored the other way round,
/// `(in, out)`.
pub(super) fn open(tensor: &str, rows: usize, columns: usize) -> Option<(Layers, bool)> {
    let path: Vec<&str> = tensor.split('.').collect();
    let embeddings = "text_model.embeddings";
    let layers = match path.as_slice() {
        ["text_projection"] => return Some((one("text_projection", columns)?, true)),
        ["text_projection", "weight"] => one("text_projection", rows),
        ["positional_embedding"] => one(format!("{embeddings}.position_embedding"), rows),
        ["token_embedding", "weight"] => one(format!("{embeddings}.token_embedding"), rows),
        ["transformer", "resblocks", i, rest @ ..] => {
            let layer = format!("text_model.encoder.layers.{}", number(i)?);
            match rest {
                ["attn", "in_proj_weight"] => {
                    let names = ["q_proj", "k_proj", "v_proj"];
                    each(&format!("{layer}.self_attn"), names, rows)
                }
                ["attn", "out_proj", "weight"] => one(format!("{layer}.self_attn.out_proj"), rows),
                ["mlp", "c_fc", "weight"] => one(format!("{layer}.mlp.fc1"), rows),
                ["mlp", "c_proj", "weight"] => one(format!("{layer}.mlp.fc2"), rows),
                _ => None,
            }
        }
        _ => None,
    };
    Some((layers?, false))
}

/// A layer that has its name already, but for what is missing before it.
pub(super) fn transformers(tensor: &str, before: &str, rows: usize) -> Option<Layers> {
    let path = tensor.strip_suffix(".weight")?;
    one(format!("{before}{path}"), rows)
}
