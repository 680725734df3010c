//! GGUF files in parts, of types that are not read, and laid out otherwise.

use crate::common::tensors::CPU;
use crate::foreign::error;
use crate::small::{configurations, frozen, ids, logits, write_gguf};
use crate::support::llm::config::Config;
use crate::support::llm::gguf;
use crate::support::llm::weights::Weights;
use anyhow::Result;
use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

/// The tensors and metadata of a file.
type Metadata = HashMap<String, Value>;

fn parts(file: &Path) -> Result<(Metadata, Vec<(String, QTensor)>)> {
    let mut reader = File::open(file)?;
    let content = Content::read(&mut reader)?;
    let mut names: Vec<String> = content.tensor_infos.keys().cloned().collect();
    names.sort();
    let tensors = names
        .into_iter()
        .map(|name| Ok((name.clone(), content.tensor(&mut reader, &name, &CPU)?)));
    Ok((content.metadata.clone(), tensors.collect::<Result<_>>()?))
}

fn write(
    file: &Path,
    metadata: &HashMap<String, Value>,
    tensors: &[(String, QTensor)],
) -> Result<()> {
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    Ok(gguf_file::write(
        &mut File::create(file)?,
        &metadata,
        &tensors,
    )?)
}

#[test]
fn a_model_in_parts_is_read_whole_by_any_of_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    write_gguf(&at("whole.gguf"), &configurations()[2], GgmlDType::Q8_0)?;
    let (metadata, tensors) = parts(&at("whole.gguf"))?;
    let (count, part) = (Value::U16(3), |n| Value::U16(n));
    let own = |n: u16| {
        HashMap::from([
            ("split.count".to_string(), count.clone()),
            ("split.no".to_string(), part(n)),
        ])
    };
    let mut first = metadata.clone();
    first.extend(own(0));
    let third = tensors.len() / 3;
    let names = [1, 2, 3].map(|n| at(&format!("m-0000{n}-of-00003.gguf")));
    write(&names[0], &first, &tensors[..third])?;
    write(&names[1], &own(1), &tensors[third..2 * third])?;
    write(&names[2], &own(2), &tensors[2 * third..])?;
    let whole = logits(
        &frozen(&Weights::open(&at("whole.gguf"), false, &CPU)?)?,
        &ids()?,
    )?;
    for name in &names {
        let found = logits(&frozen(&Weights::open(name, false, &CPU)?)?, &ids()?)?;
        assert_eq!(found.to_vec3::<f32>()?, whole.to_vec3::<f32>()?);
    }
    std::fs::rename(&names[1], at("elsewhere"))?;
    let missing = error(Weights::open(&names[0], false, &CPU));
    assert!(
        missing.contains("a part of 3, and")
            && missing.contains("m-00002-of-00003.gguf is missing"),
        "{missing}"
    );
    std::fs::rename(&names[0], at("renamed.gguf"))?;
    let renamed = error(Weights::open(&at("renamed.gguf"), false, &CPU));
    assert!(renamed.contains("NAME-00001-of-00003.gguf"), "{renamed}");
    Ok(())
}

/// Replaces the first occurrence.
fn edited(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes
        .windows(from.len())
        .position(|w| w == from)
        .expect("it is there");
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

/// A text as a file has it.
fn text(content: &str) -> Vec<u8> {
    [&(content.len() as u64).to_le_bytes(), content.as_bytes()].concat()
}

#[test]
fn what_is_whole_is_not_called_damaged_and_what_is_damaged_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.gguf");
    write_gguf(&file, &configurations()[0], GgmlDType::Q8_0)?;
    let (mut metadata, tensors) = parts(&file)?;
    metadata.insert("general.alignment".into(), Value::U32(32));
    write(&file, &metadata, &tensors)?;
    let good = std::fs::read(&file)?;
    Weights::open(&file, false, &CPU)?;
    let refused = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        error(Weights::open(&file, false, &CPU))
    };
    // Name, two axes, type 8.
    let start = [text("blk.0.ffn_up.weight"), 2u32.to_le_bytes().to_vec()].concat();
    let at = good.windows(start.len()).position(|w| w == start).unwrap() + start.len() + 16;
    let mut other = good.clone();
    other[at] = 23;
    let unread = refused(&other);
    assert!(
        unread.contains("`blk.0.ffn_up.weight` is stored as IQ4_XS"),
        "{unread}"
    );
    assert!(!unread.contains("fetch"), "{unread}");
    other[at] = 99;
    assert!(refused(&other).contains("stored as type 99"));
    for (alignment, found) in [(0u32, "0"), (12, "12")] {
        let key = [text("general.alignment"), 4u32.to_le_bytes().to_vec()].concat();
        let from = [key.clone(), 32u32.to_le_bytes().to_vec()].concat();
        let to = [key, alignment.to_le_bytes().to_vec()].concat();
        let error = refused(&edited(&good, &from, &to));
        assert!(
            error.contains(&format!("general.alignment is {found}")),
            "{error}"
        );
    }
    let mut old = good.clone();
    old[4] = 1;
    assert!(refused(&old).contains("GGUF version 1, expected 2 or 3"));
    for length in [0, 3, 4, 20, 200, good.len() / 2, good.len() - 33] {
        let error = refused(&good[..length]);
        assert!(error.contains("fetch it again"), "{length}: {error}");
    }
    let twice = refused(&edited(
        &good,
        &text("blk.1.ffn_up.weight"),
        &text("blk.0.ffn_up.weight"),
    ));
    assert!(
        twice.contains("`blk.0.ffn_up.weight` stands there twice"),
        "{twice}"
    );
    Ok(())
}

#[test]
fn keys_of_a_gguf_file_that_change_what_it_computes_are_read_or_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.gguf");
    write_gguf(&file, &configurations()[0], GgmlDType::F32)?;
    let (_, content) = gguf::open(&file)?;
    for (key, value, part) in [
        ("llama.expert_count", Value::U32(8), "`llama.expert_count`"),
        (
            "llama.attention.sliding_window",
            Value::U32(8),
            "sliding_window",
        ),
        (
            "llama.rope.dimension_count",
            Value::U32(8),
            "expected 16, the size of a head",
        ),
        (
            "llama.rope.scaling.type",
            Value::String("yarn".into()),
            "yarn",
        ),
        (
            "llama.block_count",
            Value::String("2".into()),
            "not one whole number",
        ),
        ("llama.rope.freq_base", Value::U32(10000), "no number"),
        ("llama.attention.head_count", Value::U32(0), "heads"),
    ] {
        let mut metadata = content.metadata.clone();
        metadata.insert(key.into(), value);
        let error = error(Config::from_gguf(&metadata));
        assert!(error.contains(part), "{key}: {error}");
    }
    let mut metadata = content.metadata.clone();
    metadata.insert("llama.rope.dimension_count".into(), Value::U32(16));
    metadata.insert(
        "llama.rope.scaling.type".into(),
        Value::String("none".into()),
    );
    Config::from_gguf(&metadata)?;
    Ok(())
}
