//! What command lines have in common: numbers, flags to read an adapter by, and exit codes: 0 done,
//! 1 an error of data or files, 2 wrong arguments (clap's own).

use anyhow::Context;
use candle_doft::Map;
use candle_doft::file::{Divisor, LoadOptions, components, is_component};
use candle_doft::merge::NameTable;
use candle_doft::train::parallel::{self, Processes};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What an adapter file is read by, whatever it says itself.
#[derive(clap::Args, Clone, Debug)]
pub struct ReadAs {
    /// The map of every layer, against what a file says: cayley, exponential, neumann:T, neumann:T:2
    #[arg(long)]
    map: Option<Map>,
    /// The divisor of every layer, against what a file says: none, 2sqrt, sqrt, sqrtn
    #[arg(long)]
    divisor: Option<Divisor>,
    /// Of a file with layers of several models, the one to read: denoiser, te1, te2 ..
    #[arg(long)]
    component: Option<String>,
    /// Skip keys of no known role
    #[arg(long)]
    allow_unknown: bool,
}

impl ReadAs {
    pub fn options(&self) -> LoadOptions {
        let mut options = LoadOptions::default();
        options.map = self.map;
        options.divisor = self.divisor;
        options.component = self.component.clone();
        options.allow_unknown = self.allow_unknown;
        options
    }

    /// The same for a base: where an adapter has layers of several models and none was chosen, the folder
    /// of the base says which, as in the folder of a pipeline.
    pub fn options_for(&self, adapter: &Path, base: &Path) -> candle_doft::Result<LoadOptions> {
        let options = self.options();
        if options.component.is_some() {
            return Ok(options);
        }
        let found = components(adapter, &options)?;
        let folder = base.canonicalize().unwrap_or_else(|_| base.to_path_buf());
        let folder = match folder.is_dir() {
            true => folder,
            false => folder.parent().map(Path::to_path_buf).unwrap_or_default(),
        };
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        match found.into_iter().find(|found| is_component(&name, found)) {
            Some(component) => {
                eprintln!(
                    "note: the base lies in a folder `{name}`, so only layers of `{component}` are read; \
                     --component chooses another"
                );
                Ok(options.with_component(component))
            }
            None => Ok(options),
        }
    }
}

/// Writes to standard output; where nobody reads it any more, as behind `| head`, the program ends.
pub fn print(text: std::fmt::Arguments) {
    let mut out = std::io::stdout().lock();
    match out.write_fmt(text).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            eprintln!("error: standard output: {error}");
            std::process::exit(1);
        }
    }
}

/// The same with the end of a line.
pub fn say(text: std::fmt::Arguments) {
    print(format_args!("{text}\n"));
}

/// Where a checkpoint has the layers that an adapter names.
#[derive(clap::Args, Clone, Debug)]
pub struct Names {
    /// A table from the layers of the adapter to the tensors of the base, as JSON: {"layers": {"to_k":
    /// {"tensor": "qkv.weight", "rows": [[64, 128]]}, "proj": "out.weight"}, "unnamed": ["vae."]}. Found without
    /// it: Stable Diffusion 1, 2, XL, 3 and 3.5, Flux, and their text encoders, in one file
    #[arg(long, value_name = "FILE")]
    names: Option<PathBuf>,
}

impl Names {
    pub fn table(&self) -> candle_doft::Result<Option<NameTable>> {
        self.names.as_ref().map(NameTable::load).transpose()
    }
}

/// A finite number above 0.
pub fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0. && value.is_finite() => Ok(value),
        _ => Err("expected a finite number above 0".to_string()),
    }
}

/// A finite number.
pub fn finite(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() => Ok(value),
        _ => Err("expected a finite number".to_string()),
    }
}

/// A finite number of 0 or more.
pub fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value >= 0. && value.is_finite() => Ok(value),
        _ => Err("expected a finite number, 0 or more".to_string()),
    }
}

/// A pattern of layers and their strength, `PATTERN=S`.
pub fn strength_for(text: &str) -> Result<(String, f64), String> {
    match text.rsplit_once('=') {
        Some((pattern, value)) if !pattern.is_empty() => Ok((pattern.to_string(), finite(value)?)),
        _ => Err("expected PATTERN=S, as in `layers.0.*=0.5`".to_string()),
    }
}

/// Becomes true on Ctrl-C, or when the system asks the program to end.
pub fn stop() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let set = stop.clone();
    ctrlc::set_handler(move || set.store(true, Ordering::SeqCst))
        .context("cannot listen for Ctrl-C")?;
    Ok(stop)
}

/// Arguments that are right each for itself, but not together.
pub fn wrong_arguments(what: &str) -> ExitCode {
    eprintln!("error: {what}");
    ExitCode::from(2)
}

/// Runs an example in the processes that the launcher started. An error on one ends them all; each tells its
/// own, and the first also those of others.
pub fn run_in_group(main: impl FnOnce(&dyn Processes) -> anyhow::Result<()>) -> ExitCode {
    let group = match parallel::open() {
        Ok(group) => group,
        Err(error) => return run(|| Err(error.into())),
    };
    match main(&*group) {
        Ok(()) => run(|| Ok(group.finish()?)),
        Err(error) => {
            let others = matches!(error.downcast_ref(), Some(candle_doft::Error::Rank { .. }));
            if group.rank() == 0 || !others {
                eprintln!("error: {}", one_line(&error));
            }
            ExitCode::FAILURE
        }
    }
}

/// Runs an example; an error becomes one line on standard error.
pub fn run(main: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    match main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes, each once. candle appends a backtrace to its texts where one is enabled.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        let text = text.lines().next().unwrap_or_default();
        if !line.ends_with(text) {
            line += if line.is_empty() { "" } else { ": " };
            line += text;
        }
    }
    line
}
