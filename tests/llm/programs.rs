//! The examples as programs, on a small model in a folder of its own.

use crate::common::programs::example;
use crate::small::{configurations, write_folder};
use anyhow::Result;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

/// How a program ended.
pub struct Ended {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// A folder that holds `model` and `data.jsonl`, and the programs that run there.
pub struct Home {
    folder: tempfile::TempDir,
}

impl Home {
    /// Nothing where the examples are not built; `cargo test` builds them.
    pub fn new() -> Result<Option<Self>> {
        Self::with_model(&configurations()[1])
    }

    pub fn with_model(config: &Value) -> Result<Option<Self>> {
        if ["finetune", "generate"]
            .iter()
            .any(|name| example(name).is_none())
        {
            return Ok(None);
        }
        let folder = tempfile::tempdir()?;
        let home = Self { folder };
        write_folder(&home.path("model"), config);
        let lines: String = (0..40)
            .map(|i| format!("{{\"prompt\": \"say {i}\", \"completion\": \"it is {i}\"}}\n"))
            .collect();
        std::fs::write(home.path("data.jsonl"), lines)?;
        Ok(Some(home))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// A program that knows nothing of the hub of whoever runs the tests.
    pub fn command(&self, program: &str) -> Command {
        let mut command = example(program).expect("it was there");
        command
            .env("HF_HOME", self.path("hub_home"))
            .env("HF_ENDPOINT", "http://127.0.0.1:9");
        command
    }

    pub fn run(&self, program: &str, arguments: &[&str]) -> Ended {
        let mut command = self.command(program);
        command.args(arguments).output().unwrap().into()
    }

    /// The flags of a short run of `finetune` and `more`, which win.
    pub fn training(&self, more: &[&str]) -> Vec<String> {
        let (model, data) = (self.at("model"), self.at("data.jsonl"));
        let usual = [
            ("--model", model.as_str()),
            ("--data", &data),
            ("--steps", "6"),
            ("--batch", "2"),
            ("--accumulate", "2"),
            ("--seq", "32"),
            ("--block-size", "8"),
            ("--lr", "0.02"),
            ("--warmup", "2"),
            ("--every", "2"),
            ("--sample-tokens", "4"),
            ("--held-out", "4"),
        ];
        let usual = usual.iter().filter(|(flag, _)| !more.contains(flag));
        let usual = usual.flat_map(|(flag, value)| [*flag, *value]);
        usual
            .chain(more.iter().copied())
            .map(str::to_string)
            .collect()
    }

    /// Runs `finetune` to its end with these flags as well.
    pub fn finetune(&self, more: &[&str]) -> String {
        let ended = self.try_finetune(more);
        assert_eq!(ended.code, Some(0), "{more:?}: {} {}", ended.out, ended.err);
        ended.out
    }

    pub fn try_finetune(&self, more: &[&str]) -> Ended {
        let mut command = self.command("finetune");
        let command = command.args(self.training(more));
        command.output().unwrap().into()
    }

    /// The answer of `generate` with these flags.
    pub fn generate(&self, arguments: &[&str]) -> String {
        let ended = self.run("generate", arguments);
        assert_eq!(ended.code, Some(0), "{} {}", ended.out, ended.err);
        ended.out
    }

    /// The adapter that a run left.
    pub fn adapter(&self, out: &str) -> Vec<u8> {
        std::fs::read(self.path(out).join("adapter.safetensors")).unwrap()
    }

    /// The lines of a run's metrics.
    pub fn metrics(&self, out: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(out).join("metrics.jsonl")).unwrap();
        let lines = text.lines();
        lines.map(|l| serde_json::from_str(l).unwrap()).collect()
    }
}
