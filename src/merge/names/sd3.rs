//! Stable Diffusion 3 and 3.5: q, k and v of each stream in one weight.

use super::{Layers, each, number, one, swapped};

/// The layers of diffusers in one weight of the original.
pub(super) fn layers(path: &[&str], rows: usize, width: usize) -> Option<Layers> {
    match path {
        ["x_embedder", "proj"] => one("pos_embed.proj", rows),
        ["context_embedder"] => one("context_embedder", rows),
        ["final_layer", "linear"] => one("proj_out", rows),
        ["final_layer", "adaLN_modulation", "1"] => swapped("norm_out.linear", rows),
        [embedder, "mlp", layer] => {
            let embedder = match *embedder {
                "t_embedder" => "timestep_embedder",
                "y_embedder" => "text_embedder",
                _ => return None,
            };
            let layer = match *layer {
                "0" => "linear_1",
                "2" => "linear_2",
                _ => return None,
            };
            one(format!("time_text_embed.{embedder}.{layer}"), rows)
        }
        ["joint_blocks", i, stream, rest @ ..] => {
            let block = format!("transformer_blocks.{}", number(i)?);
            match *stream {
                "x_block" => image(&block, rest, rows),
                "context_block" => context(&block, rest, rows, width),
                _ => None,
            }
        }
        _ => None,
    }
}

fn image(block: &str, path: &[&str], rows: usize) -> Option<Layers> {
    match path {
        [attn @ ("attn" | "attn2"), "qkv"] => {
            each(&format!("{block}.{attn}"), ["to_q", "to_k", "to_v"], rows)
        }
        [attn @ ("attn" | "attn2"), "proj"] => one(format!("{block}.{attn}.to_out.0"), rows),
        ["adaLN_modulation", "1"] => one(format!("{block}.norm1.linear"), rows),
        ["mlp", "fc1"] => one(format!("{block}.ff.net.0.proj"), rows),
        ["mlp", "fc2"] => one(format!("{block}.ff.net.2"), rows),
        _ => None,
    }
}

fn context(block: &str, path: &[&str], rows: usize, width: usize) -> Option<Layers> {
    match path {
        ["attn", "qkv"] => {
            let names = ["add_q_proj", "add_k_proj", "add_v_proj"];
            each(&format!("{block}.attn"), names, rows)
        }
        ["attn", "proj"] => one(format!("{block}.attn.to_add_out"), rows),
        ["adaLN_modulation", "1"] => {
            let name = format!("{block}.norm1_context.linear");
            // Shift and scale alone, where other blocks have gates as well: the last block.
            match rows == width.saturating_mul(2) {
                true => swapped(name, rows),
                false => one(name, rows),
            }
        }
        ["mlp", "fc1"] => one(format!("{block}.ff_context.net.0.proj"), rows),
        ["mlp", "fc2"] => one(format!("{block}.ff_context.net.2"), rows),
        _ => None,
    }
}
