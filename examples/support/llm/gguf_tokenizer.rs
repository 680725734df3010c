//! The tokenizer that a GGUF file describes.

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::quantized::gguf_file::Value;
use std::collections::HashMap;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
};

/// Splits of Llama 3's and Qwen2's tokenizers, as their `tokenizer.json` files have them.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Whether a text begins with a token of its own where a file does not say so: llama.cpp puts one before
/// texts of Llama 3 and of SentencePiece's tokenizers.
pub fn begins(metadata: &HashMap<String, Value>) -> bool {
    let is = |key: &str, names: &[&str]| match metadata.get(&format!("tokenizer.ggml.{key}")) {
        Some(Value::String(found)) => names.contains(&found.as_str()),
        _ => false,
    };
    is("model", &["llama"]) || is("pre", &["llama-bpe", "llama3", "llama-v3"])
}

/// The tokenizer that a GGUF file describes. candle reads such files too, but takes every split it does
/// not know for that of GPT-2: SmolLM's digits then come out as other tokens.
pub fn read(metadata: &HashMap<String, Value>) -> Result<Tokenizer> {
    let get = |key: &str| {
        let key = format!("tokenizer.ggml.{key}");
        metadata
            .get(&key)
            .with_context(|| format!("the GGUF file lacks `{key}`"))
    };
    let model = get("model")?.to_string()?;
    ensure!(
        model == "gpt2",
        "the GGUF file has a tokenizer of the kind `{model}`, which is not supported: put the model's \
         tokenizer.json beside it"
    );
    let strings = |key: &str| -> Result<Vec<String>> {
        let list = get(key)?.to_vec()?;
        list.iter().map(|v| Ok(v.to_string()?.clone())).collect()
    };
    let tokens = strings("tokens")?;
    let vocabulary: Vocab = tokens.iter().cloned().zip(0u32..).collect();
    let merges = strings("merges")?;
    let merges = merges.iter().map(|merge| match merge.split_once(' ') {
        Some((a, b)) => Ok((a.to_string(), b.to_string())),
        None => bail!("the GGUF file has a merge `{merge}`"),
    });
    let merges = merges.collect::<Result<Vec<_>>>()?;
    let pre = get("pre")?.to_string()?.as_str();
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        // Llama 3 takes a whole word that is a token before it merges.
        .ignore_merges(matches!(pre, "llama-bpe" | "llama3" | "llama-v3"))
        .build()
        .map_err(|e| anyhow!("the GGUF file's tokenizer: {e}"))?;
    let mut tokenizer = Tokenizer::new(bpe);
    let (normalizer, split) = pre_tokenizer(pre)?;
    let failed = |e| anyhow!("the GGUF file's tokenizer: {e}");
    tokenizer.with_normalizer(normalizer).map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(split));
    tokenizer.with_decoder(Some(ByteLevelDecoder::default()));
    if let Ok(kinds) = get("token_type") {
        // 3 is a control token, 4 one that a user defined.
        let kinds = kinds.to_vec()?;
        let added = tokens.iter().zip(kinds).filter_map(|(token, kind)| {
            let kind = match kind {
                Value::I32(kind) => *kind,
                Value::U32(kind) => *kind as i32,
                _ => 0,
            };
            let special = kind == 3;
            (special || kind == 4).then(|| AddedToken::from(token.clone(), special))
        });
        tokenizer.add_tokens(added).map_err(failed)?;
    }
    Ok(tokenizer)
}

/// How a tokenizer cuts text before it merges, by the name that GGUF files have for it.
fn pre_tokenizer(name: &str) -> Result<(Option<NormalizerWrapper>, PreTokenizerWrapper)> {
    let split = |regex: &str| -> Result<PreTokenizerWrapper> {
        let pattern = SplitPattern::Regex(regex.to_string());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        let split = split.map_err(|e| anyhow!("a split: {e}"))?;
        let bytes = ByteLevel::new(false, true, false);
        Ok(Sequence::new(vec![split.into(), bytes.into()]).into())
    };
    let plain = ByteLevel::new(false, true, true);
    Ok(match name {
        // Each digit stands alone, then GPT-2's split.
        "smollm" => {
            let parts = vec![Digits::new(true).into(), plain.into()];
            (None, Sequence::new(parts).into())
        }
        "gpt-2" | "gpt2" => (None, plain.into()),
        "llama-bpe" | "llama3" | "llama-v3" => (None, split(LLAMA3)?),
        "qwen2" => (Some(NFC.into()), split(QWEN2)?),
        other => bail!(
            "the GGUF file cuts text by `{other}`, which is not known here: put the model's \
             tokenizer.json beside it"
        ),
    })
}
