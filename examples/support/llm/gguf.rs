//! GGUF files: what candle's reader takes for granted is checked before it reads.

use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::gguf_file::{Content, Value};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};

/// Types of stored blocks that candle reads: number, values and bytes of a block.
const READ: [(u32, u64, u64); 15] = [
    (0, 1, 4),
    (1, 1, 2),
    (2, 32, 18),
    (3, 32, 20),
    (6, 32, 22),
    (7, 32, 24),
    (8, 32, 34),
    (9, 32, 36),
    (10, 256, 84),
    (11, 256, 110),
    (12, 256, 144),
    (13, 256, 176),
    (14, 256, 210),
    (15, 256, 292),
    (30, 1, 2),
];

/// Names of those that it does not read.
const UNREAD: [(u32, &str); 14] = [
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// Opens a file and reads all but its tensors.
///
/// # Errors
///
/// A file that is no GGUF file, one that is cut short, and one with what cannot be read, which is named.
pub fn open(path: &Path) -> Result<(File, Content)> {
    let mut file = File::open(path)?;
    let mut magic = [0; 4];
    let long = file.read_exact(&mut magic).is_ok();
    ensure!(
        !long || &magic == b"GGUF",
        "not a GGUF file; --model takes one, or a folder in Hugging Face layout: config.json, \
         tokenizer.json and safetensors files"
    );
    file.rewind()?;
    check(&file)?;
    file.rewind()?;
    let content = Content::read(&mut BufReader::new(&file));
    let content = content.context("not a whole GGUF file; fetch it again")?;
    Ok((file, content))
}

/// The files of a model that was split, in order; the file itself where it was not.
pub fn parts(path: &Path, metadata: &HashMap<String, Value>) -> Result<Vec<PathBuf>> {
    let count = match metadata.get("split.count").map(integer) {
        None => return Ok(vec![path.to_path_buf()]),
        Some(count) => count.context("its split.count is no number")?,
    };
    if count <= 1 {
        return Ok(vec![path.to_path_buf()]);
    }
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let ending = |part: usize| format!("-{part:05}-of-{count:05}.gguf");
    let stem = (1..=count.min(99_999)).find_map(|part| name.strip_suffix(&ending(part)));
    let stem = stem.with_context(|| {
        format!(
            "it is a part of {count} and expected to be named NAME{}",
            ending(1)
        )
    })?;
    let parts = (1..=count).map(|part| path.with_file_name(format!("{stem}{}", ending(part))));
    let parts: Vec<PathBuf> = parts.collect();
    let missing = parts.iter().find(|part| !part.is_file());
    if let Some(missing) = missing {
        bail!(
            "it is a part of {count}, and {} is missing; all of them belong into one folder",
            missing.display()
        );
    }
    Ok(parts)
}

/// A number of any integer type.
pub fn integer(value: &Value) -> Option<usize> {
    match value {
        Value::U8(n) => Some(usize::from(*n)),
        Value::U16(n) => Some(usize::from(*n)),
        Value::U32(n) => Some(*n as usize),
        Value::U64(n) => usize::try_from(*n).ok(),
        Value::I8(n) => usize::try_from(*n).ok(),
        Value::I16(n) => usize::try_from(*n).ok(),
        Value::I32(n) => usize::try_from(*n).ok(),
        Value::I64(n) => usize::try_from(*n).ok(),
        _ => None,
    }
}

/// Walks over the header of a file and sees that every tensor lies in it.
fn check(file: &File) -> Result<()> {
    let length = file.metadata()?.len();
    let mut walk = Walk {
        reader: BufReader::new(file),
        length,
    };
    match walk.header() {
        Err(error) if cut_short(&error) => bail!("not a whole GGUF file; fetch it again"),
        checked => checked,
    }
}

fn cut_short(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|e| e.kind() == ErrorKind::UnexpectedEof)
}

struct Walk<'a> {
    reader: BufReader<&'a File>,
    length: u64,
}

impl Walk<'_> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn skip(&mut self, count: u64) -> Result<()> {
        let left = self.length.saturating_sub(self.reader.stream_position()?);
        if count > left {
            return Err(std::io::Error::from(ErrorKind::UnexpectedEof).into());
        }
        Ok(self.reader.seek_relative(count as i64)?)
    }

    fn text(&mut self) -> Result<String> {
        let count = self.u64()?;
        let left = self.length.saturating_sub(self.reader.stream_position()?);
        if count > left {
            return Err(std::io::Error::from(ErrorKind::UnexpectedEof).into());
        }
        let mut bytes = vec![0; count as usize];
        self.reader.read_exact(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn header(&mut self) -> Result<()> {
        self.skip(4)?;
        let version = self.u32()?;
        ensure!(
            version == 2 || version == 3,
            "GGUF version {version}, expected 2 or 3; convert the model anew"
        );
        let (tensors, values) = (self.u64()?, self.u64()?);
        let mut alignment = 32;
        let mut keys = HashSet::new();
        for _ in 0..values {
            let key = self.text()?;
            let kind = self.u32()?;
            if key == "general.alignment" {
                ensure!(
                    kind == 4,
                    "general.alignment is of type {kind}, expected 4, an unsigned number"
                );
                alignment = u64::from(self.u32()?);
                ensure!(
                    alignment > 0 && alignment.is_multiple_of(8),
                    "general.alignment is {alignment}, expected a multiple of 8"
                );
            } else {
                self.value(kind, 0)?;
            }
            ensure!(!keys.contains(&key), "`{key}` stands there twice");
            keys.insert(key);
        }
        let mut ends = Vec::new();
        let mut names = HashSet::new();
        for _ in 0..tensors {
            let (name, end) = self.tensor(alignment)?;
            ensure!(!names.contains(&name), "tensor `{name}` stands there twice");
            names.insert(name.clone());
            ends.push((name, end));
        }
        let start = self.reader.stream_position()?.next_multiple_of(alignment);
        for (name, end) in ends {
            ensure!(
                start.checked_add(end).is_some_and(|end| end <= self.length),
                "tensor `{name}` cannot be read, the file is cut short; fetch it again"
            );
        }
        Ok(())
    }

    /// Name of a tensor and where its data ends, behind the header.
    fn tensor(&mut self, alignment: u64) -> Result<(String, u64)> {
        let name = self.text()?;
        let axes = self.u32()?;
        ensure!(
            axes <= 4,
            "tensor `{name}` has {axes} axes, expected at most 4"
        );
        let mut count = Some(1u64);
        for _ in 0..axes {
            let axis = self.u64()?;
            // candle makes an unaligned slice of what is empty.
            ensure!(axis > 0, "tensor `{name}` is empty; fetch the file again");
            count = count.and_then(|count| count.checked_mul(axis));
        }
        let kind = self.u32()?;
        let Some((_, block, bytes)) = READ.iter().find(|(read, ..)| *read == kind) else {
            let known = UNREAD.iter().find(|(unread, _)| *unread == kind);
            let shown = known.map_or(format!("type {kind}"), |(_, name)| name.to_string());
            bail!(
                "tensor `{name}` is stored as {shown}, which candle does not read; take the model in another \
                 quantization, such as Q4_K or Q8_0"
            );
        };
        let offset = self.u64()?;
        let count = count.with_context(|| format!("tensor `{name}` is too large"))?;
        ensure!(
            count.is_multiple_of(*block) && offset.is_multiple_of(alignment),
            "tensor `{name}` has {count} values at {offset}, expected whole blocks of {block} at a multiple of \
             {alignment}; fetch the file again"
        );
        let end = (count / block).checked_mul(*bytes);
        let end = end.and_then(|size| offset.checked_add(size));
        Ok((
            name.clone(),
            end.with_context(|| format!("tensor `{name}` is too large"))?,
        ))
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<()> {
        match kind {
            0 | 1 | 7 => self.skip(1),
            2 | 3 => self.skip(2),
            4..=6 => self.skip(4),
            10..=12 => self.skip(8),
            8 => {
                let count = self.u64()?;
                self.skip(count)
            }
            9 if depth < 4 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                for _ in 0..count {
                    self.value(kind, depth + 1)?;
                }
                Ok(())
            }
            other => bail!("a value of type {other} at depth {depth}; fetch the file again"),
        }
    }
}
