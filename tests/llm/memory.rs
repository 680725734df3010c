//! What a program takes in memory.

use crate::programs::{Ended, Home};
use crate::small::configurations;
use anyhow::Result;

/// Wide enough that a graph over 400 tokens would show, and without a token that ends a text.
fn wide() -> serde_json::Value {
    let mut config = configurations()[0].clone();
    for (key, value) in [
        ("hidden_size", 256),
        ("intermediate_size", 1024),
        ("max_position_embeddings", 1024),
    ] {
        config[key] = value.into();
    }
    config["eos_token_id"] = serde_json::Value::Null;
    config
}

/// Keys and values are kept for each token, and nothing else: not even with an adapter, whose layers
/// build a graph outside an inference scope.
#[test]
fn a_long_answer_takes_no_more_than_its_keys_and_values() -> Result<()> {
    if !cfg!(target_os = "linux") {
        println!("SKIPPED: the peak of the memory is read on Linux");
        return Ok(());
    }
    let Some(home) = Home::with_model(&wide())? else {
        return Ok(());
    };
    home.finetune(&["--out", &home.at("out"), "--steps", "2"]);
    let adapter = home.path("out").join("adapter.safetensors");
    let adapter = adapter.display().to_string();
    let peak = |tokens: &str| -> u64 {
        let flags = ["--prompt", "say 3", "--max-tokens", tokens, "--adapter"];
        let model = home.at("model");
        let flags = [flags.as_slice(), &[&adapter, "--model", &model]].concat();
        // The allocator keeps pages for each thread, more or less of them from run to run.
        let mut command = home.command("generate");
        let output = command.args(flags).env("RAYON_NUM_THREADS", "1").output();
        let ended = Ended::from(output.unwrap());
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let told = ended.err.split(", ").last().unwrap();
        let megabytes = told.strip_suffix(" MB at most\n").expect(&ended.err);
        (megabytes.parse::<f64>().unwrap() * 1e6) as u64
    };
    let (short, long) = (peak("100"), peak("500"));
    // 2 blocks, 2 heads of 64, keys and values in f32; a longer one is made beside that which it replaces.
    let cache = 400 * 2 * 2 * 64 * 2 * 4;
    // A graph would hold more than 20 kB of activations for each token and block, 16 MB in all.
    let room = 6 << 20;
    assert!(
        long < short + 2 * cache + room,
        "{short} bytes at 100 tokens, {long} at 500"
    );
    Ok(())
}
