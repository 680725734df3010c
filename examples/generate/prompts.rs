//! A file of prompts, each with the name of the adapter that answers it.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One line of the file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prompt {
    /// Counted from 1.
    #[serde(skip)]
    pub line: usize,
    pub prompt: String,
    /// None is the base.
    #[serde(default)]
    pub adapter: Option<String>,
}

impl Prompt {
    /// The line of its answer.
    pub fn answered(&self, answer: &str) -> Result<String> {
        Ok(serde_json::to_string(&Answered {
            prompt: &self.prompt,
            adapter: self.adapter.as_deref(),
            answer,
        })?)
    }
}

/// The same with its answer, in the order in which it is written.
#[derive(Serialize)]
struct Answered<'a> {
    prompt: &'a str,
    adapter: Option<&'a str>,
    answer: &'a str,
}

/// Reads a file; `names` are those of the adapters. Empty lines are skipped.
pub fn read(file: &Path, names: &[&str]) -> Result<Vec<Prompt>> {
    let content = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let mut prompts = Vec::new();
    for (line, text) in (1..).zip(content.lines()) {
        if !text.trim().is_empty() {
            let read = || parsed(line, text, names);
            prompts.push(read().with_context(|| format!("{}: line {line}", file.display()))?);
        }
    }
    ensure!(
        !prompts.is_empty(),
        "{}: it holds no prompts; write one JSON object a line, of `prompt` and `adapter`",
        file.display()
    );
    Ok(prompts)
}

fn parsed(line: usize, text: &str, names: &[&str]) -> Result<Prompt> {
    let prompt: Prompt = match serde_json::from_str(text) {
        Ok(prompt) => prompt,
        Err(error) => {
            // The place within the line, without the line that serde counts itself.
            let reason = error.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            bail!("expected an object of `prompt` and `adapter`, both texts: {reason}");
        }
    };
    if let Some(name) = prompt.adapter.as_deref()
        && !names.contains(&name)
    {
        match names {
            [] => bail!("no adapter is called `{name}`: give it by --adapter {name}=FILE"),
            _ => bail!(
                "no adapter is called `{name}`; those of --adapter are `{}`",
                names.join("`, `")
            ),
        }
    }
    Ok(Prompt { line, ..prompt })
}
