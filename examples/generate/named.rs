//! Adapters by name, as flags have them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The name of an adapter that was given none.
const UNNAMED: &str = "adapter";

/// `NAME=FILE`, or a `FILE` alone.
#[derive(Clone, Debug)]
pub struct Named {
    pub name: String,
    pub file: PathBuf,
    /// Whether the flag has a name.
    named: bool,
}

impl Named {
    /// Reads the value of a flag. A path that is no Unicode has no name.
    pub fn parse(value: OsString) -> Result<Self, String> {
        let unnamed = || Self {
            name: UNNAMED.to_string(),
            file: value.clone().into(),
            named: false,
        };
        // A path may have an equals sign in it.
        let text = value.to_str().filter(|_| !Path::new(&value).exists());
        match text.and_then(|text| text.split_once('=')) {
            None => Ok(unnamed()),
            Some(("", _)) => Err("expected a name before `=`".to_string()),
            Some((_, "")) => Err("expected a file behind `=`".to_string()),
            Some((name, file)) => Ok(Self {
                name: name.to_string(),
                file: file.into(),
                named: true,
            }),
        }
    }
}

/// What several adapters have wrong together.
pub fn wrong(all: &[Named]) -> Option<String> {
    if let (Some(unnamed), 2..) = (all.iter().find(|adapter| !adapter.named), all.len()) {
        return Some(format!(
            "--adapter {} has no name; with several adapters each needs one: --adapter NAME=FILE",
            unnamed.file.display()
        ));
    }
    for (at, Named { name, file, .. }) in all.iter().enumerate() {
        if let Some(first) = all[..at].iter().find(|other| other.name == *name) {
            return Some(format!(
                "--adapter: {} and {} are both called `{name}`; give each a name of its own",
                first.file.display(),
                file.display()
            ));
        }
    }
    None
}

/// The names in one line.
pub fn listed(all: &[Named]) -> String {
    let names: Vec<String> = all
        .iter()
        .map(|adapter| format!("`{}`", adapter.name))
        .collect();
    names.join(", ")
}
