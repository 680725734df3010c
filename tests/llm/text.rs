//! What is read: rows of GGUF files, tokenizers, and text that becomes sequences.

use crate::common::tensors::{CPU, seeded};
use crate::small::{configurations, model_folder, write_gguf};
use crate::support::llm::config::{Config, Scaling};
use crate::support::llm::data::{Batch, Data, Order};
use crate::support::llm::gguf_names::{reordered, to_gguf, to_hugging_face};
use crate::support::llm::tokenizer::Text;
use crate::support::llm::weights::Weights;
use anyhow::Result;
use candle_core::DType;
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use std::path::PathBuf;

#[test]
fn the_orders_of_rows_undo_each_other() -> Result<()> {
    for size in [2, 8, 64] {
        for row in 0..size {
            assert_eq!(to_gguf(to_hugging_face(row, size), size), row);
        }
    }
    // Row 5 of a head of 8 is the second half of pair 1.
    assert_eq!(to_hugging_face(5, 8), 3);
    let tensor = QTensor::quantize(&seeded((16, 32), 1).to_dtype(DType::F32)?, GgmlDType::Q4_0)?;
    let there = reordered(&tensor, 2, &CPU, to_gguf)?;
    let back = reordered(&there, 2, &CPU, to_hugging_face)?;
    assert_eq!(tensor.data()?, back.data()?);
    assert_ne!(tensor.data()?, there.data()?);
    Ok(())
}

#[test]
fn text_becomes_sequences_and_unusable_text_an_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (_, text) = model_folder(folder.path())?;
    assert_eq!(text.decode(&text.encode("a 7é\n")?)?, "a 7é\n");
    let write = |name: &str, content: &str| {
        let file = folder.path().join(name);
        std::fs::write(&file, content).unwrap();
        file
    };
    let error = |file: PathBuf| {
        let error = Data::open(Some(&file), &text, 16, 0)
            .err()
            .expect("an error");
        format!("{error:#}")
    };
    let short = error(write("short.txt", "too short"));
    assert!(
        short.contains("short.txt") && short.contains("9 tokens"),
        "{short}"
    );
    assert!(error(write("empty.jsonl", "\n\n")).contains("0 usable examples"));
    assert!(error(write("bad.jsonl", "{\"text\": 3}")).contains("line 1"));
    let typo = error(write(
        "typo.jsonl",
        "{\"prompt\": \"a\", \"answer\": \"b\"}",
    ));
    assert!(typo.contains("line 1"), "{typo}");
    assert!(error(folder.path().join("none.txt")).contains("none.txt"));

    let long = write("long.txt", &"abcdefgh ".repeat(40));
    let data = Data::open(Some(&long), &text, 16, 0)?;
    assert!(data.train.iter().all(|s| s.ids.len() == 16));
    assert_eq!(data.train.len() + data.validation.len(), 23);
    // Without a prompt the model goes on from where a held-out sequence begins.
    let prompt = data.prompt(&text)?;
    assert_eq!(prompt.ids, data.validation[0].ids[..8]);
    assert_eq!(prompt.shown, text.decode(&prompt.ids)?);

    // The loss is of the completion and of the token that ends it.
    let lines: String = (0..20)
        .map(|i| format!("{{\"prompt\": \"p{i}\", \"completion\": \"yes\"}}\n"))
        .collect();
    let data = Data::open(Some(&write("pairs.jsonl", &lines)), &text, 64, 0)?;
    assert_eq!((data.train.len(), data.validation.len()), (18, 2));
    // JSON lines are what they are under any name.
    let unnamed = Data::open(Some(&write("pairs.txt", &lines)), &text, 64, 0)?;
    assert_eq!(unnamed.checksum(), data.checksum());
    let prompt = data.prompt(&text)?;
    assert!(prompt.shown.starts_with('p'), "{}", prompt.shown);
    assert_eq!(prompt.ids, text.prompt(&prompt.shown)?);
    let sequence = &data.train[0];
    let learned: Vec<u32> = sequence
        .ids
        .iter()
        .zip(&sequence.learned)
        .filter_map(|(id, learned)| learned.then_some(*id))
        .collect();
    let mut expected = text.encode("yes")?;
    expected.extend(text.end_of_turn());
    assert_eq!(learned, expected);
    let batch = Batch::new(&[&data.train[0], &data.train[1]], &CPU)?;
    assert_eq!(batch.tokens, 8);
    let picked = batch
        .ids
        .flatten_all()?
        .index_select(&batch.rows, 0)?
        .to_vec1::<u32>()?;
    // Each row holds the token before its target.
    let targets = batch.targets.to_vec1::<u32>()?;
    assert_eq!(picked[1..4], targets[..3]);
    Ok(())
}

#[test]
fn an_order_goes_by_the_number_drawn_and_an_epoch_takes_all() {
    let mut order = Order::new(3, 5);
    let first: Vec<usize> = (0..10).map(|i| order.at(i)).collect();
    let again: Vec<usize> = (0..10).rev().map(|i| order.at(i)).collect();
    assert!(again.into_iter().rev().eq(first.iter().copied()));
    let mut epoch = first[..5].to_vec();
    epoch.sort_unstable();
    assert_eq!(epoch, [0, 1, 2, 3, 4]);
    assert_ne!(first[..5], first[5..]);
}

#[test]
fn an_unknown_split_of_a_gguf_file_is_an_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.gguf");
    write_gguf(&file, &configurations()[0], GgmlDType::F32)?;
    let mut weights = Weights::open(&file, false, &CPU)?;
    let mut set = |key: &str, value: Value| {
        weights
            .metadata
            .insert(format!("tokenizer.ggml.{key}"), value);
        Text::open(&weights).err().map(|error| format!("{error:#}"))
    };
    let llama = set("model", Value::String("llama".into())).unwrap();
    assert!(
        llama.contains("`llama`") && llama.contains("tokenizer.json"),
        "{llama}"
    );
    set("model", Value::String("gpt2".into()));
    set("merges", Value::Array(Vec::new()));
    let unknown = set("pre", Value::String("tekken".into())).unwrap();
    assert!(unknown.contains("`tekken`"), "{unknown}");
    assert_eq!(set("pre", Value::String("smollm".into())), None);
    Ok(())
}

#[test]
fn the_factors_of_a_gguf_file_say_which_scaling_they_are() -> Result<()> {
    let mut config = Config::from_json(&configurations()[1].to_string())?;
    for (head_dim, theta, factor, original) in [(16, 1e4, 8., 32), (64, 5e5, 32., 8192)] {
        (config.head_dim, config.theta) = (head_dim, theta);
        let scaling = Scaling {
            factor,
            low: 1.,
            high: 4.,
            original,
        };
        config.scaling = None;
        let plain = config.frequencies();
        config.scaling = Some(scaling);
        let scaled = config.frequencies();
        let factors = plain.iter().zip(&scaled).map(|(p, s)| (p / s) as f32);
        let mut factors: Vec<f32> = factors.collect();
        assert_eq!(config.scaling_behind(&factors), Some(scaling));
        factors[0] = 1.1;
        assert_eq!(config.scaling_behind(&factors), None);
    }
    assert_eq!(config.scaling_behind(&[1.; 32]), None);
    Ok(())
}
