//! What command lines have in common: devices, numbers, flags to read an adapter by, and exit codes: 0 done,
//! 1 an error of data or files, 2 wrong arguments (clap's own).

use candle_core::Device;
use candle_doft::Map;
use candle_doft::file::{Divisor, LoadOptions};
use std::process::ExitCode;

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceName {
    Cpu,
    Cuda,
    Metal,
}

impl DeviceName {
    pub fn open(self) -> candle_core::Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => Device::new_cuda(0),
            Self::Metal => Device::new_metal(0),
        }
    }
}

/// What an adapter file is read by, whatever it says itself.
#[derive(clap::Args, Clone, Debug)]
pub struct ReadAs {
    /// The map of every layer, against what a file says: cayley, exponential, neumann:T, neumann:T:2
    #[arg(long)]
    map: Option<Map>,
    /// The divisor of every layer, against what a file says: none, 2sqrt, sqrt, sqrtn
    #[arg(long)]
    divisor: Option<Divisor>,
}

impl ReadAs {
    pub fn options(&self) -> LoadOptions {
        let mut options = LoadOptions::default();
        options.map = self.map;
        options.divisor = self.divisor;
        options
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

/// Arguments that are right each for itself, but not together.
pub fn wrong_arguments(what: &str) -> ExitCode {
    eprintln!("error: {what}");
    ExitCode::from(2)
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
