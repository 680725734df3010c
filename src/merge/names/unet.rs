//! The U-Net of Stable Diffusion 1, 2 and XL: the original counts its blocks through all levels, diffusers
//! level by level.

use super::{Layers, number, one};

/// The most blocks that are looked for.
const BLOCKS: usize = 64;

/// How many pairs of residual and attention block a level has, by the names of the original; none for
/// another model.
pub(super) fn blocks_per_level(has: impl Fn(&str) -> bool) -> Option<usize> {
    let known = [
        "input_blocks.0.0.weight",
        "middle_block.0.in_layers.2.weight",
        "output_blocks.0.0.in_layers.2.weight",
    ];
    if !known.into_iter().all(&has) {
        return None;
    }
    let downsampler = |i: &usize| has(&format!("input_blocks.{i}.0.op.weight"));
    let residual = |i: &usize| has(&format!("input_blocks.{i}.0.in_layers.2.weight"));
    let blocks = match (1..BLOCKS).find(downsampler) {
        Some(first) => first - 1,
        None => (1..BLOCKS).take_while(residual).count(),
    };
    (blocks > 0).then_some(blocks)
}

/// The layer of diffusers that is a weight of the original.
pub(super) fn layers(path: &[&str], rows: usize, blocks: usize) -> Option<Layers> {
    let name = match path {
        ["time_embed", i] => format!("time_embedding.{}", embedding(i)?),
        ["label_emb", "0", i] => format!("add_embedding.{}", embedding(i)?),
        ["input_blocks", "0", "0"] => "conv_in".to_string(),
        ["out", "2"] => "conv_out".to_string(),
        ["input_blocks", i, rest @ ..] => {
            let (level, block) = place(number(i)?.checked_sub(1)?, blocks);
            match rest {
                ["0", "op"] if block == blocks => {
                    format!("down_blocks.{level}.downsamplers.0.conv")
                }
                ["0", "op"] => return None,
                _ if block == blocks => return None,
                _ => inner(&format!("down_blocks.{level}"), [block, block], rest)?,
            }
        }
        ["middle_block", i @ ("0" | "2"), rest @ ..] => {
            inner("mid_block", [number(i)? / 2, 0], &[&["0"], rest].concat())?
        }
        ["middle_block", "1", rest @ ..] => inner("mid_block", [0, 0], &[&["1"], rest].concat())?,
        ["output_blocks", i, rest @ ..] => {
            let (level, block) = place(number(i)?, blocks);
            match rest {
                ["1" | "2", "conv"] if block == blocks => {
                    format!("up_blocks.{level}.upsamplers.0.conv")
                }
                ["1" | "2", "conv"] => return None,
                _ => inner(&format!("up_blocks.{level}"), [block, block], rest)?,
            }
        }
        _ => return None,
    };
    one(name, rows)
}

fn embedding(i: &str) -> Option<&'static str> {
    match i {
        "0" => Some("linear_1"),
        "2" => Some("linear_2"),
        _ => None,
    }
}

/// Level and block of the `i`th entry: a level ends with one that changes the resolution, or, on the way
/// up, has one block more.
fn place(i: usize, blocks: usize) -> (usize, usize) {
    (i / (blocks + 1), i % (blocks + 1))
}

/// A layer of a residual block or of an attention block, with the number that each has in its level.
fn inner(level: &str, [residual, attention]: [usize; 2], path: &[&str]) -> Option<String> {
    match path {
        ["0", rest @ ..] => {
            let name = match rest {
                ["in_layers", "2"] => "conv1",
                ["emb_layers", "1"] => "time_emb_proj",
                ["out_layers", "3"] => "conv2",
                ["skip_connection"] => "conv_shortcut",
                _ => return None,
            };
            Some(format!("{level}.resnets.{residual}.{name}"))
        }
        ["1", rest @ ..] => {
            let known = match rest {
                ["proj_in" | "proj_out"] => true,
                ["transformer_blocks", i, rest @ ..] => {
                    number(i)?;
                    matches!(
                        rest,
                        ["attn1" | "attn2", "to_q" | "to_k" | "to_v"]
                            | ["attn1" | "attn2", "to_out", "0"]
                            | ["ff", "net", "0", "proj"]
                            | ["ff", "net", "2"]
                    )
                }
                _ => false,
            };
            known.then(|| format!("{level}.attentions.{attention}.{}", rest.join(".")))
        }
        _ => None,
    }
}
