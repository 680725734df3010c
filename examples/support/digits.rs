//! The UCI handwritten digits, 1,797 images of 8 by 8 pixels, shipped with the examples.

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use candle_doft::rng::SplitMix64;
use std::io::Read;

/// Pixels on a side.
pub const SIDE: usize = 8;

/// Number of digits.
pub const CLASSES: usize = 10;

const PIXELS: usize = SIDE * SIDE;
const DATA: &[u8] = include_bytes!("../data/digits.csv.gz");

/// One image, values from 0 to 1, row by row.
pub type Image = [f32; PIXELS];

/// Images and what they show.
#[derive(Clone, Debug, Default)]
pub struct Digits {
    pub images: Vec<Image>,
    pub labels: Vec<u32>,
}

/// A part to train on, one to choose by, and one to report.
#[derive(Clone, Debug)]
pub struct Split {
    pub train: Digits,
    pub validation: Digits,
    pub test: Digits,
}

impl Split {
    /// Every part, turned by a quarter anticlockwise.
    pub fn turned(&self) -> Self {
        Self {
            train: self.train.turned(),
            validation: self.validation.turned(),
            test: self.test.turned(),
        }
    }
}

impl Digits {
    /// All of them, in the order of the file.
    pub fn load() -> Result<Self> {
        let mut text = String::new();
        let mut reader = flate2::read::GzDecoder::new(DATA);
        reader
            .read_to_string(&mut text)
            .context("the digits cannot be unpacked")?;
        let mut digits = Self::default();
        for (line, row) in text.lines().enumerate() {
            let values: Vec<f32> = row
                .split(',')
                .map(str::parse)
                .collect::<Result<_, _>>()
                .with_context(|| format!("line {} of the digits", line + 1))?;
            let Some((label, pixels)) = values.split_last() else {
                bail!("line {} of the digits is empty", line + 1);
            };
            let mut image = [0.; PIXELS];
            if pixels.len() != PIXELS {
                bail!(
                    "line {} of the digits has {} pixels",
                    line + 1,
                    pixels.len()
                );
            }
            image
                .iter_mut()
                .zip(pixels)
                .for_each(|(to, from)| *to = from / 16.);
            digits.images.push(image);
            digits.labels.push(*label as u32);
        }
        Ok(digits)
    }

    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// The same images, turned by a quarter anticlockwise.
    pub fn turned(&self) -> Self {
        let turn = |image: &Image| {
            let mut turned = [0.; PIXELS];
            for row in 0..SIDE {
                for column in 0..SIDE {
                    turned[(SIDE - 1 - column) * SIDE + row] = image[row * SIDE + column];
                }
            }
            turned
        };
        Self {
            images: self.images.iter().map(turn).collect(),
            labels: self.labels.clone(),
        }
    }

    /// 60 % to train on, 20 % to validate, 20 % to test, shuffled by the seed.
    pub fn split(&self, seed: u64) -> Split {
        let mut order: Vec<usize> = (0..self.len()).collect();
        SplitMix64::new(seed).shuffle(&mut order);
        let fifth = self.len() / 5;
        let (test, rest) = order.split_at(fifth);
        let (validation, train) = rest.split_at(fifth);
        Split {
            train: self.pick(train),
            validation: self.pick(validation),
            test: self.pick(test),
        }
    }

    fn pick(&self, places: &[usize]) -> Self {
        Self {
            images: places.iter().map(|i| self.images[*i]).collect(),
            labels: places.iter().map(|i| self.labels[*i]).collect(),
        }
    }

    pub fn examples(&self, device: &Device) -> candle_core::Result<Examples> {
        let pixels = self.images.iter().flatten().copied().collect();
        Examples::new(pixels, self.labels.clone(), device)
    }
}

/// Images `(count, pixels)`, values from 0 to 1, and labels `(count)`.
#[derive(Clone, Debug)]
pub struct Examples {
    pub images: Tensor,
    pub labels: Tensor,
}

impl Examples {
    pub fn new(pixels: Vec<f32>, labels: Vec<u32>, device: &Device) -> candle_core::Result<Self> {
        let count = labels.len();
        Ok(Self {
            images: Tensor::from_vec(pixels, (count, ()), device)?,
            labels: Tensor::from_vec(labels, count, device)?,
        })
    }
}

/// Batches without end: each pass takes every example once, in a new order.
pub struct Batches<'a> {
    examples: &'a Examples,
    size: usize,
    rng: SplitMix64,
    rest: Vec<u32>,
}

impl<'a> Batches<'a> {
    pub fn new(examples: &'a Examples, size: usize, seed: u64) -> Self {
        Self {
            examples,
            size: size.min(examples.labels.elem_count()),
            rng: SplitMix64::new(seed),
            rest: Vec::new(),
        }
    }

    /// Images and labels of the next batch; what a pass leaves over is dropped.
    pub fn next_batch(&mut self) -> candle_core::Result<(Tensor, Tensor)> {
        let Examples { images, labels } = self.examples;
        if self.rest.len() < self.size {
            self.rest = (0..labels.elem_count() as u32).collect();
            self.rng.shuffle(&mut self.rest);
        }
        let chosen = self.rest.split_off(self.rest.len() - self.size);
        let chosen = Tensor::new(chosen, images.device())?;
        Ok((
            images.index_select(&chosen, 0)?,
            labels.index_select(&chosen, 0)?,
        ))
    }
}
