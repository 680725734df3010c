//! Text to train on: sequences of tokens, and which of them the loss is of.

use super::template::Message;
use super::tokenizer::Text;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use candle_doft::rng::SplitMix64;
use flate2::read::GzDecoder;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeSet;
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
    /// What was not taken as it was given: text that was cut off, fields that are not read, examples without
    /// a token to learn.
    pub notes: Vec<String>,
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

/// A record of a file of JSON.
enum Record {
    Pair { prompt: String, completion: String },
    Conversation(Vec<Message>),
    Text(String),
}

/// What a record is told by, one of the three.
const KINDS: [&str; 3] = ["text", "completion", "messages"];

impl Record {
    /// Reads a record; what it holds beside its text goes into `others`.
    fn read(value: Value, others: &mut BTreeSet<String>) -> Result<Self> {
        const EXPECTED: &str = "expected an object on each line, of `text`, of `prompt` and `completion`, or \
                                of `messages`";
        let Value::Object(mut fields) = value else {
            bail!(EXPECTED);
        };
        let found: Vec<&str> = KINDS
            .into_iter()
            .filter(|kind| fields.contains_key(*kind))
            .collect();
        let [kind] = found[..] else {
            match found.len() {
                0 => bail!(EXPECTED),
                _ => bail!("it has `{}`, {EXPECTED}", found.join("` and `")),
            }
        };
        let mut text = |key: &str| match fields.remove(key) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => bail!("`{key}` is no text, {EXPECTED}"),
            None => bail!(EXPECTED),
        };
        let record = match kind {
            "text" => Self::Text(text("text")?),
            "completion" => Self::Pair {
                prompt: text("prompt")?,
                completion: text("completion")?,
            },
            _ => {
                let messages = fields.remove("messages").unwrap_or_default();
                let messages = serde_json::from_value::<Vec<Whole>>(messages);
                let messages = messages.context(
                    "`messages`: expected a list of objects with `role` and `content`, both text, and no more",
                )?;
                Self::Conversation(messages.into_iter().map(Message::from).collect())
            }
        };
        ensure!(
            kind == "completion" || !fields.contains_key("prompt"),
            "it has `{kind}` and `prompt`, {EXPECTED}"
        );
        others.extend(fields.into_iter().map(|(name, _)| name));
        Ok(record)
    }
}

/// A message with nothing beside its text: a call of a tool, a picture or a name would be lost.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Whole {
    role: String,
    content: String,
}

impl From<Whole> for Message {
    fn from(Whole { role, content }: Whole) -> Self {
        Self { role, content }
    }
}

/// The JSON that a file is made of, each value with the line that it begins on: a value on each line, values
/// over several lines, or one list of all. Nothing where it is plain text.
fn values(content: &str, named: bool) -> Result<Option<Vec<(usize, Value)>>> {
    let starts = |c| content.trim_start().starts_with(c);
    if !(named || starts('{') || starts('[')) {
        return Ok(None);
    }
    let mut stream = serde_json::Deserializer::from_str(content).into_iter::<Value>();
    let (mut found, mut line, mut before) = (Vec::new(), 1, 0);
    loop {
        let blank = content[before..].len() - content[before..].trim_start().len();
        let start = before + blank;
        line += content[before..start].matches('\n').count();
        match stream.next() {
            None => return Ok(Some(found)),
            Some(Ok(Value::Array(values))) if found.is_empty() && starts('[') => {
                if !named && !values.iter().all(Value::is_object) {
                    return Ok(None);
                }
                found.extend(values.into_iter().map(|value| (line, value)));
            }
            Some(Ok(value)) => found.push((line, value)),
            // Text may begin with a brace too.
            Some(Err(_)) if found.is_empty() && !named => return Ok(None),
            Some(Err(error)) => {
                let text = error.to_string();
                let text = text.split(" at line ").next().unwrap_or_default();
                bail!("line {}: no JSON: {text}", error.line());
            }
        }
        before = stream.byte_offset();
        line += content[start..before].matches('\n').count();
    }
}

impl Data {
    /// Reads a file, plain text or JSON, or the default. JSON is told by what is in the file; one that is
    /// named as JSON has to be some.
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
                (name, plain(content))
            }
        };
        let named = file.is_none_or(|f| {
            let ending = f.extension().unwrap_or_default().to_ascii_lowercase();
            ["jsonl", "ndjson", "json"].iter().any(|e| ending == *e)
        });
        let data = match values(&content, named).with_context(|| name.clone())? {
            Some(values) => Self::from_values(values, text, length, seed),
            None => Self::from_text(&content, text, length),
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

    fn from_values(
        values: Vec<(usize, Value)>,
        text: &Text,
        length: usize,
        seed: u64,
    ) -> Result<Self> {
        let mut examples = Vec::new();
        let mut others = BTreeSet::new();
        let mut cut = Cut::default();
        let given = values.len();
        for (line, value) in values {
            let read = || -> Result<(Vec<Sequence>, Option<String>)> {
                Ok(match Record::read(value, &mut others)? {
                    Record::Pair { prompt, completion } => {
                        let (ids, learned) = pair(&prompt, &completion, text)?;
                        (vec![cut.one(ids, learned, length)], Some(prompt))
                    }
                    Record::Conversation(messages) => {
                        let (ids, learned) = text.conversation(&messages)?;
                        let asked = messages.into_iter().find(|m| m.role == "user");
                        let asked = asked.map(|message| message.content);
                        (vec![cut.one(ids, learned, length)], asked)
                    }
                    Record::Text(line) => (windows(&line, text, length)?, None),
                })
            };
            let (mut sequences, prompt) = read().with_context(|| format!("line {line}"))?;
            sequences.retain(|sequence| sequence.learned.iter().any(|learned| *learned));
            if !sequences.is_empty() {
                examples.push((sequences, prompt));
            }
        }
        ensure!(
            examples.len() >= 2,
            "{} usable examples of {given}, expected at least 2, one to train on and one to hold out, \
             each with a completion that begins within --seq {length}",
            examples.len()
        );
        let left_out = given - examples.len();
        SplitMix64::new(seed).shuffle(&mut examples);
        // All of a text is on one side.
        let held = ((examples.len() as f64 * HELD_OUT) as usize).max(1);
        let train = examples.split_off(held);
        let prompt = examples.iter().find_map(|(_, prompt)| prompt.clone());
        let sequences =
            |examples: Vec<(Vec<Sequence>, _)>| examples.into_iter().flat_map(|(s, _)| s).collect();
        let mut notes = cut.notes(length);
        if !others.is_empty() {
            let others: Vec<String> = others.into_iter().collect();
            notes.push(format!(
                "`{}` of the data are not read",
                others.join("`, `")
            ));
        }
        if left_out > 0 {
            notes.push(format!(
                "{left_out} examples have nothing to learn within --seq {length} and are left out"
            ));
        }
        Ok(Self {
            prompt,
            train: sequences(train),
            validation: sequences(examples),
            notes,
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
            notes: Vec::new(),
            prompt: None,
        })
    }
}

fn pair(prompt: &str, completion: &str, text: &Text) -> Result<(Vec<u32>, Vec<bool>)> {
    let mut ids = text.prompt(prompt)?;
    let start = ids.len();
    ids.extend(text.encode(completion)?);
    ids.extend(text.end_of_turn());
    let learned = (0..ids.len()).map(|i| i >= start).collect();
    Ok((ids, learned))
}

/// A text as sequences, one behind the other; a short one is one.
fn windows(line: &str, text: &Text, length: usize) -> Result<Vec<Sequence>> {
    let mut ids = text.begin.clone();
    ids.extend(text.encode(line)?);
    ids.extend(text.ends.first());
    let parts = ids.chunks(length).map(|ids| Sequence {
        learned: (0..ids.len()).map(|i| i > 0).collect(),
        ids: ids.to_vec(),
    });
    Ok(parts.collect())
}

/// What does not fit into a sequence, counted.
#[derive(Default)]
struct Cut {
    examples: usize,
    tokens: usize,
    all: usize,
}

impl Cut {
    fn one(&mut self, mut ids: Vec<u32>, mut learned: Vec<bool>, length: usize) -> Sequence {
        self.all += ids.len();
        if ids.len() > length {
            self.examples += 1;
            self.tokens += ids.len() - length;
        }
        ids.truncate(length);
        learned.truncate(length);
        Sequence { ids, learned }
    }

    fn notes(&self, length: usize) -> Vec<String> {
        let Self {
            examples,
            tokens,
            all,
        } = self;
        match examples {
            0 => Vec::new(),
            _ => vec![format!(
                "{examples} examples are longer than --seq {length}: {tokens} of {all} tokens are cut off"
            )],
        }
    }
}

/// A text without the marks of other systems, which no model has to learn: a byte order mark at its start, and
/// carriage returns at the ends of lines.
fn plain(content: String) -> String {
    let content = match content.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_string(),
        None => content,
    };
    match content.contains('\r') {
        true => content.replace("\r\n", "\n").replace('\r', "\n"),
        false => content,
    }
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
