//! Constant tensors of the composed path, made once for each device and shape: a new one would be an upload
//! in every step.

use candle_core::{Device, Result, Tensor};
use std::sync::{Mutex, PoisonError};

/// What a constant is, for blocks of a size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Constant {
    /// Where each entry of a skew block lies among the packed entries, their negatives and a 0.
    SkewEntries(usize),
    /// Where each packed entry lies in its block, above the diagonal.
    Above(usize),
    /// The same below the diagonal.
    Below(usize),
}

/// Kept for as long as the program runs; one of each kind, block size and device.
static MADE: Mutex<Vec<(Constant, Tensor)>> = Mutex::new(Vec::new());

impl Constant {
    pub(crate) fn on(self, device: &Device) -> Result<Tensor> {
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |(constant, tensor): &&(Self, Tensor)| {
            *constant == self && tensor.device().same_device(device)
        };
        if let Some((_, tensor)) = made.iter().find(is_it) {
            return Ok(tensor.clone());
        }
        let values = self.values();
        let tensor = Tensor::from_vec(values.clone(), values.len(), device)?;
        made.push((self, tensor.clone()));
        Ok(tensor)
    }

    fn values(self) -> Vec<u32> {
        let (Self::SkewEntries(b) | Self::Above(b) | Self::Below(b)) = self;
        let pairs = (0..b).flat_map(|i| (i + 1..b).map(move |j| (i, j)));
        match self {
            Self::Above(_) => pairs.map(|(i, j)| (i * b + j) as u32).collect(),
            Self::Below(_) => pairs.map(|(i, j)| (j * b + i) as u32).collect(),
            Self::SkewEntries(_) => {
                let n = b * (b - 1) / 2;
                let mut places = vec![2 * n as u32; b * b];
                for (entry, (i, j)) in pairs.enumerate() {
                    places[i * b + j] = entry as u32;
                    places[j * b + i] = (n + entry) as u32;
                }
                places
            }
        }
    }
}
