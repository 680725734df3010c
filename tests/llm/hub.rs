//! Models by their name on the hub, out of its cache folder; nothing here reaches a network.

use crate::programs::Home;
use crate::small::{configurations, write_folder};
use anyhow::Result;

/// What the hub's own programs leave of `org/tiny` in their cache.
fn lay_cache(home: &Home) -> Result<std::path::PathBuf> {
    let repository = home.path("hub_home/hub/models--org--tiny");
    std::fs::create_dir_all(repository.join("refs"))?;
    std::fs::write(repository.join("refs/main"), "0123abcd")?;
    let snapshot = repository.join("snapshots/0123abcd");
    write_folder(&snapshot, &configurations()[1]);
    Ok(snapshot)
}

#[test]
fn a_model_in_the_cache_of_the_hub_needs_no_network() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    lay_cache(&home)?;
    let ask = ["--prompt", "say 3", "--max-tokens", "5", "--model"];
    let by_name = home.run("generate", &[ask.as_slice(), &["org/tiny"]].concat());
    assert_eq!(by_name.code, Some(0), "{}", by_name.err);
    let by_folder = home.generate(&[ask.as_slice(), &[&home.at("model")]].concat());
    assert_eq!(by_name.out, by_folder);
    assert!(by_name.err.contains("0123abcd"), "{}", by_name.err);

    let out = home.at("out");
    home.finetune(&["--model", "org/tiny", "--out", &out, "--steps", "1"]);
    assert!(home.path("out").join("adapter.safetensors").exists());
    Ok(())
}

#[test]
fn a_model_in_shards_is_whole_only_with_all_of_them() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let snapshot = lay_cache(&home)?;
    let tensors = candle_core::safetensors::load(
        snapshot.join("model.safetensors"),
        &candle_core::Device::Cpu,
    )?;
    std::fs::remove_file(snapshot.join("model.safetensors"))?;
    let mut map = serde_json::Map::new();
    let mut shards = [std::collections::HashMap::new(), Default::default()];
    for (name, tensor) in tensors {
        let shard = usize::from(name.contains("layers.1"));
        map.insert(name.clone(), format!("shard-{shard}.safetensors").into());
        shards[shard].insert(name, tensor);
    }
    for (number, shard) in shards.iter().enumerate() {
        let file = snapshot.join(format!("shard-{number}.safetensors"));
        candle_core::safetensors::save(shard, file)?;
    }
    let index = serde_json::json!({"weight_map": map}).to_string();
    std::fs::write(snapshot.join("model.safetensors.index.json"), index)?;
    let ask = [
        "--prompt",
        "say 3",
        "--max-tokens",
        "5",
        "--model",
        "org/tiny",
    ];
    let whole = home.generate(&ask);
    let plain = home.generate(&[
        "--prompt",
        "say 3",
        "--max-tokens",
        "5",
        "--model",
        &home.at("model"),
    ]);
    assert_eq!(whole, plain);
    std::fs::remove_file(snapshot.join("shard-1.safetensors"))?;
    let ended = home.run("generate", &ask);
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert!(ended.err.contains("`org/tiny`"), "{}", ended.err);
    Ok(())
}

#[test]
fn neither_cache_nor_hub_is_an_error_that_says_what_to_do() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let ended = home.run("generate", &["--model", "org/tiny", "--prompt", "x"]);
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert_eq!(ended.err.lines().count(), 1, "{}", ended.err);
    for part in ["`org/tiny`", "hub_home", "--model"] {
        assert!(ended.err.contains(part), "no {part} in {}", ended.err);
    }
    Ok(())
}
