//! Where a program computes: the value of `--device`.

use anyhow::{Context, Result};
use candle_core::Device;
use std::fmt;
use std::str::FromStr;

/// A device as it is named on a command line: `cpu`, `cuda`, `cuda:N` or `metal`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceName {
    #[default]
    Cpu,
    /// The card's number, 0 where none is given.
    Cuda(usize),
    Metal,
}

impl DeviceName {
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(card) => Device::new_cuda(card),
            Self::Metal => Device::new_metal(0),
        }
        .with_context(|| format!("--device {self}: cannot be opened"))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(card) => write!(f, "cuda:{card}"),
            Self::Metal => write!(f, "metal"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    /// Refuses a device that this program was built without: before anything is read or written.
    fn from_str(text: &str) -> Result<Self, String> {
        let name = match text.split_once(':') {
            None if text == "cpu" => Self::Cpu,
            None if text == "metal" => Self::Metal,
            None if text == "cuda" => Self::Cuda(0),
            Some(("cuda", card)) => Self::Cuda(number(card)?),
            _ => return Err("expected cpu, cuda, cuda:N or metal".into()),
        };
        let lacks = match name {
            Self::Cuda(_) if !cfg!(feature = "cuda") => Some("cuda"),
            Self::Metal if !cfg!(feature = "metal") => Some("metal"),
            _ => None,
        };
        match lacks {
            None => Ok(name),
            Some(feature) => Err(format!(
                "this program was built without the feature `{feature}`; build it with \
                 `cargo build --release --features {feature} --examples`"
            )),
        }
    }
}

// Digits alone: a sign is no number of a card.
fn number(card: &str) -> Result<usize, String> {
    let digits = card.bytes().all(|byte| byte.is_ascii_digit());
    match card.parse() {
        Ok(number) if digits => Ok(number),
        _ => Err(format!(
            "expected the number of a card after `cuda:`, as in cuda:1, and found `{card}`"
        )),
    }
}
