//! Flux: q, k and v of each stream in one weight, and in a single block the first half of its feed-forward
//! with them.

use super::{Layers, cut, each, number, one, swapped};

/// The layers of diffusers in one weight of the original.
pub(super) fn layers(path: &[&str], rows: usize, width: usize) -> Option<Layers> {
    match path {
        ["img_in"] => one("x_embedder", rows),
        ["txt_in"] => one("context_embedder", rows),
        ["final_layer", "linear"] => one("proj_out", rows),
        ["final_layer", "adaLN_modulation", "1"] => swapped("norm_out.linear", rows),
        [embedder, layer] => {
            let embedder = match *embedder {
                "time_in" => "timestep_embedder",
                "vector_in" => "text_embedder",
                "guidance_in" => "guidance_embedder",
                _ => return None,
            };
            let layer = match *layer {
                "in_layer" => "linear_1",
                "out_layer" => "linear_2",
                _ => return None,
            };
            one(format!("time_text_embed.{embedder}.{layer}"), rows)
        }
        ["double_blocks", i, rest @ ..] => double(number(i)?, rest, rows),
        ["single_blocks", i, rest @ ..] => single(number(i)?, rest, rows, width),
        _ => None,
    }
}

fn double(i: usize, path: &[&str], rows: usize) -> Option<Layers> {
    let block = format!("transformer_blocks.{i}");
    let (image, name) = path.split_first().and_then(|(first, rest)| {
        let (stream, name) = first.split_once('_')?;
        let image = match stream {
            "img" => true,
            "txt" => false,
            _ => return None,
        };
        Some((image, [&[name], rest].concat()))
    })?;
    let of = |image_name: &str, text_name: &str| match image {
        true => format!("{block}.{image_name}"),
        false => format!("{block}.{text_name}"),
    };
    match name.as_slice() {
        ["mod", "lin"] => one(of("norm1.linear", "norm1_context.linear"), rows),
        ["attn", "qkv"] => {
            let names = match image {
                true => ["to_q", "to_k", "to_v"],
                false => ["add_q_proj", "add_k_proj", "add_v_proj"],
            };
            each(&format!("{block}.attn"), names, rows)
        }
        ["attn", "proj"] => one(of("attn.to_out.0", "attn.to_add_out"), rows),
        ["mlp", "0"] => one(of("ff.net.0.proj", "ff_context.net.0.proj"), rows),
        ["mlp", "2"] => one(of("ff.net.2", "ff_context.net.2"), rows),
        _ => None,
    }
}

fn single(i: usize, path: &[&str], rows: usize, width: usize) -> Option<Layers> {
    let block = format!("single_transformer_blocks.{i}");
    match path {
        ["modulation", "lin"] => one(format!("{block}.norm.linear"), rows),
        ["linear2"] => one(format!("{block}.proj_out"), rows),
        // q, k and v are as wide as the block; what is left is of the feed-forward.
        ["linear1"] if rows > width.saturating_mul(3) => {
            let mut layers = each(
                &format!("{block}.attn"),
                ["to_q", "to_k", "to_v"],
                3 * width,
            )?;
            layers.push((format!("{block}.proj_mlp"), cut(3 * width, rows)));
            Some(layers)
        }
        _ => None,
    }
}
