//! From what a user names a model by to its files: a folder, a GGUF file, or a name on the Hugging Face
//! hub.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// The folder or file of a model, fetched from the hub where it is a hub name.
pub fn locate(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let hub_name = model.split('/').count() == 2 && !model.ends_with(".gguf");
    if !hub_name || model.starts_with('.') || model.starts_with('/') {
        bail!("{model}: no such file or folder, and no name on the hub (owner/model)");
    }
    fetch(model).with_context(|| format!("cannot fetch `{model}` from the hub"))
}

fn fetch(model: &str) -> Result<PathBuf> {
    let api = hf_hub::api::sync::ApiBuilder::from_env()
        .with_progress(true)
        .build()?;
    let repository = api.model(model.to_string());
    let info = repository.info()?;
    let names: Vec<&str> = info.siblings.iter().map(|f| f.rfilename.as_str()).collect();
    let wanted = |name: &&&str| {
        let top = !name.contains('/');
        let kinds = [".safetensors", ".json", ".jinja"];
        top && kinds.iter().any(|kind| name.ends_with(kind))
    };
    let mut folder = None;
    for name in names.iter().filter(wanted) {
        let file = repository.get(name)?;
        folder = file.parent().map(Path::to_path_buf);
    }
    folder.context("it holds no safetensors files")
}
