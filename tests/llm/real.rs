//! The real SmolLM2, where its file is at hand (`CANDLE_DOFT_SMOLLM2`).

use crate::common::tensors::CPU;
use crate::small::frozen;
use crate::support::llm::sample::{Sampling, answer};
use crate::support::llm::tokenizer::Text;
use crate::support::llm::weights::Weights;
use anyhow::Result;
use candle_core::Tensor;
use std::path::Path;

/// The file that `tests/llm/reference.py` made with transformers.
fn reference() -> serde_json::Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/smollm2.json");
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

#[test]
fn the_real_model_has_the_tokens_loss_and_logits_of_transformers() -> Result<()> {
    let Some(file) = std::env::var_os("CANDLE_DOFT_SMOLLM2") else {
        println!("SKIPPED: CANDLE_DOFT_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf");
        return Ok(());
    };
    let reference = reference();
    let weights = Weights::open(Path::new(&file), false, &CPU)?;
    let text = Text::open(&weights)?;
    let list =
        |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    for (line, expected) in reference["tokens"].as_object().unwrap() {
        assert_eq!(text.encode(line)?, list(expected), "{line:?}");
        assert!(!text.decode(&text.encode(line)?)?.contains("<|"));
    }
    let start = list(&reference["prompt"]);
    assert_eq!(text.prompt("Define Happiness.")?, start);
    let ids = list(&reference["ids"]);
    let model = frozen(&weights)?;
    let input = Tensor::new(ids.as_slice(), &CPU)?.unsqueeze(0)?;
    let hidden = model.hidden(&model.embed(&input)?, false)?;
    let learned = ids.len() - start.len();
    let rows = hidden.get(0)?.narrow(0, start.len() - 1, learned)?;
    let targets = Tensor::new(&ids[start.len()..], &CPU)?;
    let loss = model.loss(&rows, &targets)?.to_scalar::<f32>()?;
    let expected = reference["loss"].as_f64().unwrap();
    assert!(
        (f64::from(loss) - expected).abs() < 1e-3,
        "{loss}, expected {expected}"
    );
    let last = model.logits(&hidden.get(0)?.narrow(0, ids.len() - 1, 1)?)?;
    let last = last.flatten_all()?.to_vec1::<f32>()?;
    let largest = reference["largest_logit"].as_f64().unwrap();
    let logits = reference["last_logits"].as_array().unwrap();
    for (i, expected) in logits.iter().enumerate() {
        let off = (f64::from(last[64 * i]) - expected.as_f64().unwrap()).abs();
        assert!(off < 1e-3 * largest, "logit {} is off by {off:e}", 64 * i);
    }
    let sampling = Sampling {
        temperature: 0.,
        seed: 0,
        max_tokens: 8,
    };
    assert!(!answer(&model, &text, &start, sampling, |_| Ok(()))?.is_empty());
    Ok(())
}
