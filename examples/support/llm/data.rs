//! Text to train on: sequences of tokens, and which of them the loss is of.

use super::tokenizer::Text;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use candle_doft::rng::SplitMix64;
use flate2::read::GzDecoder;
use serde::Deserialize;
use std::io::Read;
use std::path::Path;

/// *The Devil's Dictionary*; see `examples/data/README.md`.
const DEFAULT: &[u8] = include_bytes!("../../data/devil.jsonl.gz");

/// The share of the data that is held out.
const HELD_OUT: f64 = 0.1;

/// Tokens of a sequence that are shown where there is no prompt.
const START: usize = 16;

/// One sequence: `ids`, and for each whether it is to be predicted.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    pub ids: Vec<u32>,
    pub learned: Vec<bool>,
}

/// Training and held-out sequences.
pub struct Data {
    pub train: Vec<Sequence>,
    pub validation: Vec<Sequence>,
    /// Examples without a token to learn, such as one whose prompt fills the sequence.
    pub left_out: usize,
    /// A prompt of the held-out part.
    prompt: Option<String>,
}

/// What the model is shown, to see what it makes of it: as text and as tokens.
pub struct Prompt {
    pub shown: String,
    pub ids: Vec<u32>,
}

impl Prompt {
    /// A question, put to the model as it expects one.
    pub fn new(question: &str, text: &Text) -> Result<Self> {
        Ok(Self {
            shown: question.to_string(),
            ids: text.prompt(question)?,
        })
    }
}

/// A line of a JSON lines file.
#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Line {
    Pair { prompt: String, completion: String },
    Text { text: String },
}

impl Line {
    fn read(line: &str) -> Result<Self> {
        const EXPECTED: &str =
            "expected an object on each line, of `text` or of `prompt` and `completion`";
        match serde_json::from_str(line) {
            // Of JSON that is none of the two it says nothing that helps.
            Err(error) if error.is_data() => bail!(EXPECTED),
            read => read.context(EXPECTED),
        }
    }
}

impl Data {
    /// Reads a file, plain text or JSON lines, or the default. JSON lines are told by the file's name or
    /// by the first of them.
    pub fn open(file: Option<&Path>, text: &Text, length: usize, seed: u64) -> Result<Self> {
        let (name, content) = match file {
            None => {
                let mut content = String::new();
                GzDecoder::new(DEFAULT).read_to_string(&mut content)?;
                ("the default text".to_string(), content)
            }
            Some(file) => {
                let name = file.display().to_string();
                let bytes = std::fs::read(file).with_context(|| name.clone())?;
                let content = String::from_utf8(bytes);
                let content = content.with_context(|| format!("{name} is no UTF-8 text"))?;
                // Marks of other systems, which no model has to learn.
                let content = content.strip_prefix('\u{feff}').unwrap_or(&content);
                let content = content.replace("\r\n", "\n");
                (name, content)
            }
        };
        let named = file.is_some_and(|f| {
            f.extension()
                .is_some_and(|e| e == "jsonl" || e == "ndjson" || e == "json")
        });
        let first = content.lines().find(|line| !line.trim().is_empty());
        let object = |line: &str| {
            serde_json::from_str::<serde_json::Value>(line).is_ok_and(|value| value.is_object())
        };
        // JSON of any kind is read or refused, and never trained on as text.
        let lines = named || first.is_some_and(object);
        let data = match lines {
            true => Self::from_lines(&content, text, length, seed),
            false => Self::from_text(&content, text, length),
        };
        data.with_context(|| name)
    }

    /// A held-out prompt; where there is none, the start of a held-out sequence, for the model to go on
    /// from.
    pub fn prompt(&self, text: &Text) -> Result<Prompt> {
        if let Some(prompt) = &self.prompt {
            return Prompt::new(prompt, text);
        }
        let ids = self.validation.first().map_or(&[][..], |held| &held.ids);
        let ids = &ids[..START.min(ids.len().div_ceil(2))];
        Ok(Prompt {
            shown: text.decode(ids)?,
            ids: ids.to_vec(),
        })
    }

    /// Tells one set of sequences from another.
    pub fn checksum(&self) -> u32 {
        let mut sum = flate2::Crc::new();
        for sequence in self.train.iter().chain(&self.validation) {
            for (id, learned) in sequence.ids.iter().zip(&sequence.learned) {
                sum.update(&id.to_le_bytes());
                sum.update(&[u8::from(*learned)]);
            }
        }
        sum.sum()
    }

    fn from_lines(content: &str, text: &Text, length: usize, seed: u64) -> Result<Self> {
        let mut sequences = Vec::new();
        for (number, line) in content.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let line = Line::read(line).with_context(|| format!("line {}", number + 1))?;
            sequences.push(match line {
                Line::Pair { prompt, completion } => {
                    (pair(&prompt, &completion, text, length)?, Some(prompt))
                }
                Line::Text { text: line } => (whole(&line, text, length)?, None),
            });
        }
        let given = sequences.len();
        sequences.retain(|(sequence, _)| sequence.learned.iter().any(|learned| *learned));
        ensure!(
            sequences.len() >= 2,
            "{} usable examples of {given}, expected at least 2, one to train on and one to hold out, \
             each with a completion that begins within --seq {length}",
            sequences.len()
        );
        let left_out = given - sequences.len();
        SplitMix64::new(seed).shuffle(&mut sequences);
        let held = ((sequences.len() as f64 * HELD_OUT) as usize).max(1);
        let train = sequences.split_off(held);
        Ok(Self {
            prompt: sequences.iter().find_map(|(_, prompt)| prompt.clone()),
            train: train.into_iter().map(|(sequence, _)| sequence).collect(),
            validation: sequences.into_iter().map(|(s, _)| s).collect(),
            left_out,
        })
    }

    /// Plain text is one stream, cut into sequences; its end is held out.
    fn from_text(content: &str, text: &Text, length: usize) -> Result<Self> {
        let ids = text.encode(content.trim())?;
        ensure!(
            ids.len() > length,
            "{} tokens, expected more than one sequence of {length}: give more text or a smaller --seq",
            ids.len()
        );
        // One token more than the sequence: each but the first is predicted.
        let sequences = ids
            .chunks(length)
            .filter(|ids| ids.len() > 1)
            .map(|ids| Sequence {
                learned: (0..ids.len()).map(|i| i > 0).collect(),
                ids: ids.to_vec(),
            });
        let mut train: Vec<Sequence> = sequences.collect();
        if train.len() < 2 {
            bail!(
                "one sequence of {length} tokens, expected at least 2: give more text or a smaller --seq"
            );
        }
        let held = ((train.len() as f64 * HELD_OUT) as usize).max(1);
        let validation = train.split_off(train.len() - held);
        Ok(Self {
            train,
            validation,
            left_out: 0,
            prompt: None,
        })
    }
}

fn pair(prompt: &str, completion: &str, text: &Text, length: usize) -> Result<Sequence> {
    let mut ids = text.prompt(prompt)?;
    let start = ids.len();
    ids.extend(text.encode(completion)?);
    ids.extend(text.end_of_turn());
    ids.truncate(length);
    Ok(Sequence {
        learned: (0..ids.len()).map(|i| i >= start).collect(),
        ids,
    })
}

fn whole(line: &str, text: &Text, length: usize) -> Result<Sequence> {
    let mut ids: Vec<u32> = text.begin.into_iter().collect();
    ids.extend(text.encode(line)?);
    ids.extend(text.ends.first());
    ids.truncate(length);
    Ok(Sequence {
        learned: (0..ids.len()).map(|i| i > 0).collect(),
        ids,
    })
}

/// Sequences of one step, padded to the longest.
pub struct Batch {
    /// `(B, T)`; what is behind the end of a sequence is never looked at.
    pub ids: Tensor,
    /// Rows of the flattened hidden states that predict a learned token, and those tokens.
    pub rows: Tensor,
    pub targets: Tensor,
    pub tokens: usize,
}

impl Batch {
    pub fn new(sequences: &[&Sequence], device: &Device) -> Result<Self> {
        let longest = sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
        // The last token of a sequence predicts nothing.
        let width = longest.saturating_sub(1).max(1);
        let (mut ids, mut rows, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for (b, sequence) in sequences.iter().enumerate() {
            let inputs = sequence
                .ids
                .iter()
                .copied()
                .take(sequence.ids.len().max(1) - 1);
            ids.extend(inputs.chain(std::iter::repeat(0)).take(width));
            for (t, learned) in sequence.learned.iter().enumerate().skip(1) {
                if *learned {
                    rows.push((b * width + t - 1) as u32);
                    targets.push(sequence.ids[t]);
                }
            }
        }
        ensure!(!targets.is_empty(), "a batch without a token to learn");
        Ok(Self {
            ids: Tensor::from_vec(ids, (sequences.len(), width), device)?,
            tokens: targets.len(),
            rows: Tensor::new(rows, device)?,
            targets: Tensor::new(targets, device)?,
        })
    }
}

/// The order of the training data: epoch after epoch, each shuffled by seed and number, so that the
/// number of sequences that were drawn says it all.
pub struct Order {
    seed: u64,
    count: usize,
    epoch: u64,
    order: Vec<usize>,
}

impl Order {
    pub fn new(seed: u64, count: usize) -> Self {
        let mut order = Self {
            seed,
            count,
            epoch: 0,
            order: Vec::new(),
        };
        order.shuffle(0);
        order
    }

    fn shuffle(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.order = (0..self.count).collect();
        let mut rng = SplitMix64::new(self.seed.wrapping_mul(0x9E37_79B9).wrapping_add(epoch));
        rng.shuffle(&mut self.order);
    }

    /// The sequence that is drawn as number `position`.
    pub fn at(&mut self, position: u64) -> usize {
        let epoch = position / self.count as u64;
        if epoch != self.epoch {
            self.shuffle(epoch);
        }
        self.order[(position % self.count as u64) as usize]
    }
}
