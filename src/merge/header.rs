//! The header of a safetensors file on disk, and its tensors one by one.

use crate::error::{Error, Result, shown};
use crate::file::{float, head, instead, twice};
use candle_core::{Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The longest header that is read.
const LONGEST: u64 = 100_000_000;

const SUFFIX: &str = "safetensors";

/// The files of a checkpoint: itself, or those of a folder in order.
pub(super) fn checkpoints(base: &Path) -> Result<Vec<PathBuf>> {
    Ok(files(base, base)?.0)
}

/// The files of a checkpoint; and what else lies there, in folders
/// within it too. What is hidden is left out, and the folder `output`.
pub(super) fn files(base: &Path, output: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let failed = Error::io(base);
    if !std::fs::metadata(base).map_err(failed)?.is_dir() {
        return Ok((vec![base.to_path_buf()], Vec::new()));
    }
    let entries = entries(base)?;
    let (files, mut others): (Vec<_>, Vec<_>) =
        entries.into_iter().partition(|path| is_checkpoint(path));
    if files.is_empty() {
        return Err(Error::file(
            base,
            format!("a folder without .{SUFFIX} files"),
        ));
    }
    let output = output.canonicalize().ok();
    let mut folders: Vec<PathBuf> = Vec::new();
    others.retain(|path| path.is_file() || !sort(path, &output, &mut folders));
    while let Some(folder) = folders.pop() {
        for path in self::entries(&folder)? {
            if path.is_file() || !sort(&path, &output, &mut folders) {
                others.push(path);
            }
        }
    }
    others.sort();
    others.retain(|path| path.is_file());
    Ok((files, others))
}

/// Whether a path is a folder to look into, which is noted. A link to a folder may lead in a circle.
fn sort(path: &Path, output: &Option<PathBuf>, folders: &mut Vec<PathBuf>) -> bool {
    let own = output.is_some() && path.canonicalize().ok() == *output;
    if path.is_dir() && !path.is_symlink() && !own {
        folders.push(path.to_path_buf());
    }
    path.is_dir()
}

fn is_checkpoint(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|end| end == SUFFIX)
}

/// What lies in a folder, hidden entries left out, sorted.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = Error::io(folder);
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            entries.push(entry.path());
        }
    }
    entries.sort();
    Ok(entries)
}

/// Refuses an output folder that holds weights, or an index of them, that the merge would not replace:
/// a reader would take the old ones, or both.
pub(super) fn check_stale(output: &Path, targets: &BTreeSet<PathBuf>) -> Result<()> {
    if !output.is_dir() {
        return Ok(());
    }
    for path in entries(output)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let ends = [
            ".safetensors",
            ".safetensors.index.json",
            ".bin",
            ".bin.index.json",
            ".gguf",
        ];
        let weights = ends.iter().any(|end| name.ends_with(end));
        if weights && path.is_file() && !targets.contains(&path) {
            let reason = "it lies in the folder to write to and is not of this model: readers would take \
                          it for a part; choose another folder or remove it";
            return Err(Error::file(&path, reason));
        }
    }
    Ok(())
}

/// Tensors with their shapes, in the order of their names.
pub(super) type Shapes = BTreeMap<String, Vec<usize>>;

/// The shapes of all tensors of a checkpoint.
pub(super) fn shapes(sources: &[Source]) -> Result<Shapes> {
    let mut shapes = Shapes::new();
    for source in sources {
        for name in source.names() {
            let shape = source.info(&name)?.shape.clone();
            shapes.insert(name, shape);
        }
    }
    Ok(shapes)
}

/// An open file. Its tensors are read when they are asked for.
pub(super) struct Source {
    pub(super) path: PathBuf,
    file: File,
    /// Length and header, as they stand in the file.
    pub(super) head: Vec<u8>,
    metadata: Metadata,
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let failed = Error::io(path);
        let refused =
            |reason: String| Error::file(path, format!("not a whole safetensors file: {reason}"));
        let mut file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut head = vec![0; 8];
        if length < 8 {
            return Err(refused("it is shorter than 8 bytes".into()));
        }
        file.read_exact(&mut head).map_err(failed)?;
        let count = head
            .iter()
            .rev()
            .fold(0u64, |n, byte| n << 8 | u64::from(*byte));
        if count > LONGEST || count > length - 8 {
            file.take(32).read_to_end(&mut head).map_err(failed)?;
            let reason = instead(&head).map_or_else(
                || format!("a header of {count} bytes in a file of {length}"),
                str::to_string,
            );
            return Err(refused(reason));
        }
        head.resize(8 + count as usize, 0);
        file.read_exact(&mut head[8..]).map_err(failed)?;
        if let Some(name) = twice(&head[8..]) {
            return Err(refused(format!("its header has `{}` twice", shown(&name))));
        }
        // Reading it checks that no tensor overlaps another or has another size than its shape.
        let metadata: Metadata =
            serde_json::from_slice(&head[8..]).map_err(|e| refused(e.to_string()))?;
        let source = Self {
            path: path.to_path_buf(),
            file,
            head,
            metadata,
        };
        let size = source.size();
        match size.checked_add(8 + count) == Some(length) {
            true => Ok(source),
            false => Err(refused(format!(
                "{size} bytes of data in a file of {length}"
            ))),
        }
    }

    /// Names in the order of their data.
    pub(super) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Bytes of its tensors.
    pub(super) fn size(&self) -> u64 {
        let infos = self.metadata.tensors().into_values();
        infos.map(|info| info.data_offsets.1).max().unwrap_or(0) as u64
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// The name of the file in its folder.
    pub(super) fn file_name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Length and header with more tensors behind all others.
    pub(super) fn head_with(&self, added: &[(String, Tensor)]) -> Result<Vec<u8>> {
        let wrong = |e: serde_json::Error| Error::file(&self.path, e.to_string());
        let mut header: BTreeMap<String, Value> =
            serde_json::from_slice(&self.head[8..]).map_err(wrong)?;
        let mut start = self.size() as usize;
        for (name, tensor) in added {
            let end = start + tensor.elem_count() * tensor.dtype().size_in_bytes();
            let entry = json!({
                "dtype": Dtype::from(tensor.dtype()).to_string(),
                "shape": tensor.dims(),
                "data_offsets": [start, end],
            });
            header.insert(name.clone(), entry);
            start = end;
        }
        Ok(head(&serde_json::to_string(&header).map_err(wrong)?))
    }

    pub(super) fn info(&self, name: &str) -> Result<&TensorInfo> {
        let info = self.metadata.info(name);
        info.ok_or_else(|| Error::file(&self.path, format!("it has no tensor `{}`", shown(name))))
    }

    /// Bytes of a tensor.
    pub(super) fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let (start, end) = self.info(name)?.data_offsets;
        self.bytes_at(name, 0, end - start)
    }

    /// So many bytes of a tensor, from its byte `from` on.
    pub(super) fn bytes_at(&self, name: &str, from: usize, count: usize) -> Result<Vec<u8>> {
        let (start, end) = self.info(name)?.data_offsets;
        let mut bytes = vec![0; count.min((end - start).saturating_sub(from))];
        let start = (self.head.len() + start + from) as u64;
        let mut file = &self.file;
        let read = file
            .seek(SeekFrom::Start(start))
            .and_then(|_| file.read_exact(&mut bytes));
        read.map_err(Error::io(&self.path))?;
        Ok(bytes)
    }

    /// A float tensor.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?.clone();
        let Some(dtype) = float(info.dtype) else {
            let found = format!("`{}` has dtype {:?}", shown(name), info.dtype);
            let reason = format!("{found}, expected F64, F32, F16 or BF16");
            return Err(Error::file(&self.path, reason));
        };
        let bytes = self.bytes(name)?;
        Ok(Tensor::from_raw_buffer(
            &bytes,
            dtype,
            &info.shape,
            &Device::Cpu,
        )?)
    }
}
