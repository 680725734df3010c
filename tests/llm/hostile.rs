//! Models that are damaged: an error of one line each, and no panic, in candle's readers and in the tokenizer's either.

use crate::common::tensors::CPU;
use crate::small::{configurations, write_folder, write_gguf};
use crate::support::llm::tokenizer::Text;
use crate::support::llm::weights::Weights;
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_doft::rng::SplitMix64;
use std::path::Path;

/// Changes bytes as damage and bad tools do.
fn mutated(good: &[u8], rng: &mut SplitMix64, head: usize) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let reach = match rng.below(4) {
        0 => bytes.len(),
        _ => head.min(bytes.len()),
    };
    for _ in 0..1 + rng.below(3) {
        if bytes.is_empty() {
            break;
        }
        let at = rng.below(reach.min(bytes.len()).max(1));
        match rng.below(6) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.below(256) as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.splice(at..at, [b'0'; 3])),
            4 => drop(bytes.splice(at..(at + 1 + rng.below(8)).min(bytes.len()), [])),
            _ => {
                let end = (at + 8).min(bytes.len());
                let value = [0, u64::MAX, 1 << 63, 1 << 31, 1 << 40][rng.below(5)];
                bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            }
        }
    }
    bytes
}

fn open(model: &Path) -> Result<()> {
    let weights = Weights::open(model, false, &CPU)?;
    let text = Text::open(&weights)?;
    let ids = text.prompt("say 3")?;
    text.decode(&ids)?;
    Ok(())
}

/// How many of the changes were refused. A panic fails the test by itself.
fn refused(model: &Path, file: &Path, count: usize, head: usize) -> usize {
    let good = std::fs::read(file).unwrap();
    open(model).unwrap();
    let mut rng = SplitMix64::new(file.as_os_str().len() as u64);
    let mut refused = 0;
    for round in 0..count {
        std::fs::write(file, mutated(&good, &mut rng, head)).unwrap();
        let opened = std::panic::catch_unwind(|| open(model));
        match opened {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                refused += 1;
                assert!(!format!("{error:#}").trim().is_empty());
            }
            Err(_) => {
                let kept = std::env::temp_dir().join("candle-doft-panic");
                std::fs::copy(file, &kept).unwrap();
                panic!(
                    "round {round} of {} panics; the file is kept at {}",
                    file.display(),
                    kept.display()
                );
            }
        }
    }
    std::fs::write(file, good).unwrap();
    refused
}

#[test]
fn a_damaged_model_is_an_error_and_never_a_panic() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("model");
    write_folder(&model, &configurations()[1]);
    std::fs::write(
        model.join("tokenizer_config.json"),
        r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": true,
            "chat_template": "{% for m in messages %}{{ m.content.strip() }}{% endfor %}"}"#,
    )?;
    std::fs::write(
        model.join("generation_config.json"),
        r#"{"eos_token_id": [257, 258]}"#,
    )?;
    for (name, count, head, least) in [
        ("config.json", 1500, 10_000, 500),
        ("tokenizer.json", 2000, 100_000, 500),
        ("tokenizer_config.json", 1000, 10_000, 300),
        ("generation_config.json", 500, 10_000, 100),
        ("model.safetensors", 2000, 3_000, 1000),
    ] {
        let found = refused(&model, &model.join(name), count, head);
        assert!(
            found >= least,
            "{name}: only {found} of {count} were noticed"
        );
    }
    let file = folder.path().join("model.gguf");
    write_gguf(&file, &configurations()[0], GgmlDType::Q8_0)?;
    let found = refused_gguf(&file, 3000);
    assert!(found > 1500, "only {found} of 3000 were noticed");
    let left: Vec<_> = std::fs::read_dir(folder.path())?.collect();
    assert_eq!(left.len(), 2, "{left:?}");
    Ok(())
}

/// The small GGUF file has no tokenizer to speak of.
fn refused_gguf(file: &Path, count: usize) -> usize {
    let good = std::fs::read(file).unwrap();
    let mut rng = SplitMix64::new(3);
    let mut refused = 0;
    for round in 0..count {
        std::fs::write(file, mutated(&good, &mut rng, 10_000)).unwrap();
        let opened = std::panic::catch_unwind(|| {
            let weights = Weights::open(file, false, &CPU)?;
            crate::small::frozen(&weights).map(drop)
        });
        refused += usize::from(opened.unwrap_or_else(|_| panic!("round {round}")).is_err());
    }
    refused
}
