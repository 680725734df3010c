//! Names and rows of GGUF files and of Hugging Face's: the two have other names for the same tensors, and those of
//! Llama models hold the rows of q and k in another order (pairs side by side instead of half a head apart).

use anyhow::{Result, ensure};
use candle_core::Device;
use candle_core::quantized::{QStorage, QTensor};

/// `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.
pub fn hugging_face_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let path = PARTS.iter().find(|(gguf, _)| *gguf == part)?.1;
    Some(format!("model.layers.{layer}.{path}.{kind}"))
}

/// The way back.
pub fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (path, kind) = rest.rsplit_once('.')?;
    let part = PARTS
        .iter()
        .find(|(_, huggingface)| *huggingface == path)?
        .0;
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// The parts of a block, GGUF's name and Hugging Face's.
const PARTS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Where row `row` of a Hugging Face head of `size` rows lies in a GGUF file: pair `i`, which is rows
/// `i` and `i + size/2` there, is rows `2i` and `2i + 1` here.
pub fn to_hugging_face(row: usize, size: usize) -> usize {
    let half = size / 2;
    row % half * 2 + row / half
}

/// The way back: where row `row` of a GGUF head lies in Hugging Face's.
pub fn to_gguf(row: usize, size: usize) -> usize {
    row / 2 + row % 2 * (size / 2)
}

/// A tensor with the rows of each head taken from `source(row, size of a head)`, nothing requantized.
pub fn reordered(
    tensor: &QTensor,
    heads: usize,
    device: &Device,
    source: fn(usize, usize) -> usize,
) -> Result<QTensor> {
    let rows = tensor.shape().dims()[0];
    ensure!(
        rows.is_multiple_of(heads),
        "{rows} rows do not make {heads} heads"
    );
    let size = rows / heads;
    let data = tensor.data()?;
    let width = data.len() / rows;
    let mut moved = Vec::with_capacity(data.len());
    for row in 0..rows {
        let from = row / size * size + source(row % size, size);
        moved.extend_from_slice(&data[from * width..(from + 1) * width]);
    }
    let storage = QStorage::from_data(moved.into(), device, tensor.dtype())?;
    Ok(QTensor::new(storage, tensor.shape().clone())?)
}
