//! The models, written down from the side of their builders: loops over blocks, with the name that each
//! layer has in diffusers and in the original.

use super::spelling::{How, Spelling, plain, stacked};

/// Sizes of a transformer.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub hidden: usize,
    pub context: usize,
    pub pooled: usize,
    /// Channels of the input; those of the output follow.
    pub channels: usize,
    /// Width of the embedding of time.
    pub time: usize,
}

fn mlp(out: &mut Vec<Spelling>, [from, to]: [&str; 2], ends: [&str; 2], sizes: [usize; 2]) {
    for (end, name, width) in [
        (ends[0], "linear_1", sizes[0]),
        (ends[1], "linear_2", sizes[1]),
    ] {
        let tensor = format!("{from}.{end}.weight");
        let layer = format!("time_text_embed.{to}.{name}");
        out.push(plain(tensor, layer, &[sizes[1], width]));
    }
}

fn qkv(path: &str, names: [&str; 3], h: usize) -> Vec<(String, usize)> {
    names
        .iter()
        .map(|name| (format!("{path}.{name}"), h))
        .collect()
}

const IMAGE: [&str; 3] = ["to_q", "to_k", "to_v"];
const TEXT: [&str; 3] = ["add_q_proj", "add_k_proj", "add_v_proj"];

pub fn flux(doubles: usize, singles: usize, guidance: bool, sizes: Sizes) -> Vec<Spelling> {
    let (h, m) = (sizes.hidden, 4 * sizes.hidden);
    let mut out = vec![
        plain("img_in.weight", "x_embedder", &[h, sizes.channels]),
        plain("txt_in.weight", "context_embedder", &[h, sizes.context]),
        plain(
            "final_layer.linear.weight",
            "proj_out",
            &[sizes.channels, h],
        ),
        plain(
            "final_layer.adaLN_modulation.1.weight",
            "norm_out.linear",
            &[2 * h, h],
        )
        .with(How::Swapped),
    ];
    let ends = ["in_layer", "out_layer"];
    mlp(
        &mut out,
        ["time_in", "timestep_embedder"],
        ends,
        [sizes.time, h],
    );
    mlp(
        &mut out,
        ["vector_in", "text_embedder"],
        ends,
        [sizes.pooled, h],
    );
    if guidance {
        mlp(
            &mut out,
            ["guidance_in", "guidance_embedder"],
            ends,
            [sizes.time, h],
        );
    }
    for i in 0..doubles {
        let (old, new) = (
            format!("double_blocks.{i}"),
            format!("transformer_blocks.{i}"),
        );
        let attn = format!("{new}.attn");
        out.extend([
            stacked(
                format!("{old}.img_attn.qkv.weight"),
                &qkv(&attn, IMAGE, h),
                &[h],
            ),
            stacked(
                format!("{old}.txt_attn.qkv.weight"),
                &qkv(&attn, TEXT, h),
                &[h],
            ),
            plain(
                format!("{old}.img_attn.proj.weight"),
                format!("{attn}.to_out.0"),
                &[h, h],
            ),
            plain(
                format!("{old}.txt_attn.proj.weight"),
                format!("{attn}.to_add_out"),
                &[h, h],
            ),
            plain(
                format!("{old}.img_mod.lin.weight"),
                format!("{new}.norm1.linear"),
                &[6 * h, h],
            ),
            plain(
                format!("{old}.txt_mod.lin.weight"),
                format!("{new}.norm1_context.linear"),
                &[6 * h, h],
            ),
            plain(
                format!("{old}.img_mlp.0.weight"),
                format!("{new}.ff.net.0.proj"),
                &[m, h],
            ),
            plain(
                format!("{old}.img_mlp.2.weight"),
                format!("{new}.ff.net.2"),
                &[h, m],
            ),
            plain(
                format!("{old}.txt_mlp.0.weight"),
                format!("{new}.ff_context.net.0.proj"),
                &[m, h],
            ),
            plain(
                format!("{old}.txt_mlp.2.weight"),
                format!("{new}.ff_context.net.2"),
                &[h, m],
            ),
        ]);
    }
    for i in 0..singles {
        let (old, new) = (
            format!("single_blocks.{i}"),
            format!("single_transformer_blocks.{i}"),
        );
        let mut first = qkv(&format!("{new}.attn"), IMAGE, h);
        first.push((format!("{new}.proj_mlp"), m));
        out.extend([
            stacked(format!("{old}.linear1.weight"), &first, &[h]),
            plain(
                format!("{old}.linear2.weight"),
                format!("{new}.proj_out"),
                &[h, h + m],
            ),
            plain(
                format!("{old}.modulation.lin.weight"),
                format!("{new}.norm.linear"),
                &[3 * h, h],
            ),
        ]);
    }
    out
}

/// The first `dual` of the blocks have a second attention.
pub fn sd3(blocks: usize, dual: usize, sizes: Sizes) -> Vec<Spelling> {
    let (h, m) = (sizes.hidden, 4 * sizes.hidden);
    let mut out = vec![
        plain(
            "x_embedder.proj.weight",
            "pos_embed.proj",
            &[h, sizes.channels, 2, 2],
        ),
        plain(
            "context_embedder.weight",
            "context_embedder",
            &[h, sizes.context],
        ),
        plain(
            "final_layer.linear.weight",
            "proj_out",
            &[4 * sizes.channels, h],
        ),
        plain(
            "final_layer.adaLN_modulation.1.weight",
            "norm_out.linear",
            &[2 * h, h],
        )
        .with(How::Swapped),
    ];
    mlp(
        &mut out,
        ["t_embedder.mlp", "timestep_embedder"],
        ["0", "2"],
        [sizes.time, h],
    );
    mlp(
        &mut out,
        ["y_embedder.mlp", "text_embedder"],
        ["0", "2"],
        [sizes.pooled, h],
    );
    for i in 0..blocks {
        let (old, new) = (
            format!("joint_blocks.{i}"),
            format!("transformer_blocks.{i}"),
        );
        let (x, c) = (format!("{old}.x_block"), format!("{old}.context_block"));
        let chunks = if i < dual { 9 } else { 6 };
        let attn = format!("{new}.attn");
        out.extend([
            stacked(format!("{x}.attn.qkv.weight"), &qkv(&attn, IMAGE, h), &[h]),
            stacked(format!("{c}.attn.qkv.weight"), &qkv(&attn, TEXT, h), &[h]),
            plain(
                format!("{x}.attn.proj.weight"),
                format!("{attn}.to_out.0"),
                &[h, h],
            ),
            plain(
                format!("{x}.mlp.fc1.weight"),
                format!("{new}.ff.net.0.proj"),
                &[m, h],
            ),
            plain(
                format!("{x}.mlp.fc2.weight"),
                format!("{new}.ff.net.2"),
                &[h, m],
            ),
            plain(
                format!("{x}.adaLN_modulation.1.weight"),
                format!("{new}.norm1.linear"),
                &[chunks * h, h],
            ),
        ]);
        if i < dual {
            let attn = format!("{new}.attn2");
            out.push(stacked(
                format!("{x}.attn2.qkv.weight"),
                &qkv(&attn, IMAGE, h),
                &[h],
            ));
            out.push(plain(
                format!("{x}.attn2.proj.weight"),
                format!("{attn}.to_out.0"),
                &[h, h],
            ));
        }
        let norm = |chunks: usize| {
            let tensor = format!("{c}.adaLN_modulation.1.weight");
            plain(
                tensor,
                format!("{new}.norm1_context.linear"),
                &[chunks * h, h],
            )
        };
        // The last block does not go on with the text.
        if i + 1 == blocks {
            out.push(norm(2).with(How::Swapped));
            continue;
        }
        out.extend([
            norm(6),
            plain(
                format!("{c}.attn.proj.weight"),
                format!("{attn}.to_add_out"),
                &[h, h],
            ),
            plain(
                format!("{c}.mlp.fc1.weight"),
                format!("{new}.ff_context.net.0.proj"),
                &[m, h],
            ),
            plain(
                format!("{c}.mlp.fc2.weight"),
                format!("{new}.ff_context.net.2"),
                &[h, m],
            ),
        ]);
    }
    out
}

/// The names of a U-Net: that of diffusers, and that of the original. Each level has so many transformer
/// blocks (0: no attention) behind each of its `layers` residual blocks.
pub fn unet_names(levels: &[usize], layers: usize, conditioned: bool) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut add = |new: String, old: String| out.push((new, old));
    for (new, old) in [("linear_1", "0"), ("linear_2", "2")] {
        add(format!("time_embedding.{new}"), format!("time_embed.{old}"));
        if conditioned {
            add(format!("add_embedding.{new}"), format!("label_emb.0.{old}"));
        }
    }
    add("conv_in".into(), "input_blocks.0.0".into());
    add("conv_out".into(), "out.2".into());
    let residual = |new: &str, old: &str| {
        [
            ("conv1", "in_layers.2"),
            ("time_emb_proj", "emb_layers.1"),
            ("conv2", "out_layers.3"),
            ("conv_shortcut", "skip_connection"),
        ]
        .map(|(n, o)| (format!("{new}.{n}"), format!("{old}.{o}")))
    };
    let attention = |new: &str, old: &str, depth: usize| {
        let mut inner = vec!["proj_in".to_string(), "proj_out".to_string()];
        for i in 0..depth {
            for attn in ["attn1", "attn2"] {
                for layer in ["to_q", "to_k", "to_v", "to_out.0"] {
                    inner.push(format!("transformer_blocks.{i}.{attn}.{layer}"));
                }
            }
            inner.push(format!("transformer_blocks.{i}.ff.net.0.proj"));
            inner.push(format!("transformer_blocks.{i}.ff.net.2"));
        }
        let both = |name: &String| (format!("{new}.{name}"), format!("{old}.{name}"));
        inner.iter().map(both).collect::<Vec<_>>()
    };
    let (mut at, last) = (1, levels.len() - 1);
    for (level, depth) in levels.iter().enumerate() {
        for j in 0..layers {
            let new = format!("down_blocks.{level}");
            for (n, o) in residual(
                &format!("{new}.resnets.{j}"),
                &format!("input_blocks.{at}.0"),
            ) {
                add(n, o);
            }
            if *depth > 0 {
                let (new, old) = (
                    format!("{new}.attentions.{j}"),
                    format!("input_blocks.{at}.1"),
                );
                for (n, o) in attention(&new, &old, *depth) {
                    add(n, o);
                }
            }
            at += 1;
        }
        if level < last {
            add(
                format!("down_blocks.{level}.downsamplers.0.conv"),
                format!("input_blocks.{at}.0.op"),
            );
            at += 1;
        }
    }
    for (new, old) in [("resnets.0", "0"), ("resnets.1", "2")] {
        for (n, o) in residual(&format!("mid_block.{new}"), &format!("middle_block.{old}")) {
            add(n, o);
        }
    }
    let middle = levels[last].max(1);
    for (n, o) in attention("mid_block.attentions.0", "middle_block.1", middle) {
        add(n, o);
    }
    let mut at = 0;
    for (level, depth) in levels.iter().rev().enumerate() {
        for j in 0..=layers {
            let new = format!("up_blocks.{level}");
            for (n, o) in residual(
                &format!("{new}.resnets.{j}"),
                &format!("output_blocks.{at}.0"),
            ) {
                add(n, o);
            }
            if *depth > 0 {
                let (new, old) = (
                    format!("{new}.attentions.{j}"),
                    format!("output_blocks.{at}.1"),
                );
                for (n, o) in attention(&new, &old, *depth) {
                    add(n, o);
                }
            }
            if j == layers && level < last {
                let place = if *depth > 0 { 2 } else { 1 };
                add(
                    format!("{new}.upsamplers.0.conv"),
                    format!("output_blocks.{at}.{place}.conv"),
                );
            }
            at += 1;
        }
    }
    out
}

/// OpenCLIP's text encoder, with its projection or without.
pub fn open_clip(
    blocks: usize,
    h: usize,
    [words, places]: [usize; 2],
    projected: bool,
) -> Vec<Spelling> {
    let embeddings = "text_model.embeddings";
    let mut out = vec![
        plain(
            "token_embedding.weight",
            format!("{embeddings}.token_embedding"),
            &[words, h],
        ),
        plain(
            "positional_embedding",
            format!("{embeddings}.position_embedding"),
            &[places, h],
        ),
    ];
    if projected {
        out.push(plain("text_projection", "text_projection", &[h / 2, h]).with(How::Turned));
    }
    for i in 0..blocks {
        let old = format!("transformer.resblocks.{i}");
        let new = format!("text_model.encoder.layers.{i}");
        let parts = qkv(
            &format!("{new}.self_attn"),
            ["q_proj", "k_proj", "v_proj"],
            h,
        );
        out.extend([
            stacked(format!("{old}.attn.in_proj_weight"), &parts, &[h]),
            plain(
                format!("{old}.attn.out_proj.weight"),
                format!("{new}.self_attn.out_proj"),
                &[h, h],
            ),
            plain(
                format!("{old}.mlp.c_fc.weight"),
                format!("{new}.mlp.fc1"),
                &[4 * h, h],
            ),
            plain(
                format!("{old}.mlp.c_proj.weight"),
                format!("{new}.mlp.fc2"),
                &[h, 4 * h],
            ),
        ]);
    }
    out
}

/// CLIP's text encoder, which has the names of transformers everywhere.
pub fn clip(blocks: usize, h: usize, sizes: [usize; 2]) -> Vec<Spelling> {
    let mut out = Vec::new();
    for spelling in open_clip(blocks, h, sizes, false) {
        for (path, shape) in spelling.layers {
            out.push(plain(format!("{path}.weight"), path, &shape));
        }
    }
    out
}
