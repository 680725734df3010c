//! From what a user names a model by to its files: a folder, a GGUF file, or a name on the Hugging Face
//! hub.

use anyhow::{Context, Result, bail, ensure};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, CacheRepo};
use std::path::{Path, PathBuf};

/// The folder or file of a model. A name on the hub is looked for in the hub's cache folder, then fetched.
pub fn locate(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let hub_name = model.split('/').filter(|part| !part.is_empty()).count() == 2
        && model.matches('/').count() == 1
        && !model.ends_with(".gguf");
    if !hub_name || model.starts_with('.') {
        bail!("{model}: no such file or folder, and no name on the hub (owner/model)");
    }
    let cache = cache();
    if let Some(folder) = cached(&cache.model(model.to_string()))? {
        eprintln!("note: {model} is taken from {}", folder.display());
        return Ok(folder);
    }
    if offline() {
        bail!(
            "`{model}` is not whole in the cache {}, and HF_HUB_OFFLINE asks for no network; give its folder \
             or its GGUF file as --model, or set HF_HUB_CACHE or HF_HOME to where it is",
            cache.path().display()
        );
    }
    fetch(model, &cache).with_context(|| {
        format!(
            "`{model}` is not whole in the cache {} and cannot be fetched from the hub; give its folder \
             or its GGUF file as --model, or set HF_HUB_CACHE or HF_HOME to where it is",
            cache.path().display()
        )
    })
}

/// A variable that is set to something.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The cache where the hub's own library has it: HF_HUB_CACHE, an older name of it, or below HF_HOME.
fn cache() -> Cache {
    let named = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"];
    match named.into_iter().find_map(variable) {
        Some(folder) => Cache::new(folder.into()),
        None => Cache::from_env(),
    }
}

fn offline() -> bool {
    let set = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"];
    let on = |value: String| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str());
    set.into_iter().filter_map(variable).any(on)
}

/// The key to models that are not open to all, by the variables of the hub's own library.
fn token() -> Result<Option<String>> {
    if let Some(token) = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")) {
        return Ok(Some(token.trim().to_string()));
    }
    match variable("HF_TOKEN_PATH") {
        Some(path) => {
            let token = std::fs::read_to_string(&path);
            let token = token.with_context(|| format!("HF_TOKEN_PATH {path}"))?;
            Ok(Some(token.trim().to_string()))
        }
        None => Ok(Cache::from_env().token()),
    }
}

/// The folder of a model that is in the cache with all that it needs.
fn cached(repository: &CacheRepo) -> Result<Option<PathBuf>> {
    let needed = ["config.json", "tokenizer.json"];
    if needed.iter().any(|name| repository.get(name).is_none()) {
        return Ok(None);
    }
    let index = repository.get("model.safetensors.index.json");
    let weights = match &index {
        None => vec!["model.safetensors".to_string()],
        Some(index) => super::weights::shards(index)?,
    };
    let whole = weights.iter().all(|name| repository.get(name).is_some());
    let config = repository.get("config.json").filter(|_| whole);
    Ok(config.and_then(|file| file.parent().map(Path::to_path_buf)))
}

fn fetch(model: &str, cache: &Cache) -> Result<PathBuf> {
    let mut builder = ApiBuilder::from_cache(cache.clone())
        .with_progress(true)
        .with_token(token()?);
    if let Some(endpoint) = variable("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint);
    }
    let api = builder.build()?;
    let repository = api.model(model.to_string());
    let info = repository.info()?;
    let mut names: Vec<&str> = info.siblings.iter().map(|f| f.rfilename.as_str()).collect();
    let kinds = [".safetensors", ".json", ".jinja"];
    names.retain(|name| !name.contains('/') && kinds.iter().any(|kind| name.ends_with(kind)));
    // The weights last: a folder that has them has the rest.
    names.sort_by_key(|name| (name.ends_with(".safetensors"), *name));
    let weights = names.iter().any(|name| name.ends_with(".safetensors"));
    ensure!(weights, "it holds no safetensors files");
    every(&repository, &names)?;
    // What was in the cache before may belong to an older revision than what came now.
    every(&repository, &names)
}

/// Gets all files; answers the folder of the last one.
fn every(repository: &ApiRepo, names: &[&str]) -> Result<PathBuf> {
    let mut folder = None;
    for name in names {
        let file = repository.get(name).with_context(|| name.to_string())?;
        folder = file.parent().map(Path::to_path_buf);
    }
    folder.context("it holds no files")
}
