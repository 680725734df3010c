//! Bytes of a safetensors file, the same for the same content; and replacing a file as one.

use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A safetensors file: tensors by descending element width, then by name; metadata sorted.
pub(crate) fn safetensors(
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let (mut bytes, order) = layout(tensors, metadata);
    for tensor in order {
        append(tensor, &mut bytes)?;
    }
    Ok(bytes)
}

/// The head of a file, and its tensors in the order of their data.
fn layout<'a>(
    tensors: &'a BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> (Vec<u8>, Vec<&'a Tensor>) {
    let mut order: Vec<(&String, &Tensor)> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype().size_in_bytes()));
    let mut header = vec![format!(
        r#""__metadata__":{}"#,
        Value::from_iter(metadata.clone())
    )];
    let mut start = 0;
    for (name, tensor) in &order {
        let end = start + tensor.elem_count() * tensor.dtype().size_in_bytes();
        let dtype = Dtype::from(tensor.dtype());
        let (name, shape) = (Value::from(name.as_str()), Value::from(tensor.dims()));
        header.push(format!(
            r#"{name}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#
        ));
        start = end;
    }
    let bytes = head(&format!("{{{}}}", header.join(",")));
    (bytes, order.into_iter().map(|(_, tensor)| tensor).collect())
}

/// Writes float tensors to a safetensors file, one after the other: memory stays within the largest of them. The
/// file appears under its name when it is whole, as with [`replace_with`].
///
/// # Errors
///
/// [`Error::Io`] if the file cannot be written, [`Error::DType`] for a tensor that is not f64, f32, f16 or
/// bf16.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_doft::file::save_tensors;
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("model.safetensors");
///
/// let tensors = [("head.weight".to_string(), Tensor::ones((2, 3), DType::F32, &Device::Cpu)?)].into();
/// save_tensors(&path, &tensors, &[("format".to_string(), "pt".to_string())].into())?;
/// assert_eq!(candle_core::safetensors::load(&path, &Device::Cpu)?.len(), 1);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn save_tensors(
    path: impl AsRef<Path>,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let (start, order) = layout(tensors, metadata);
    replace_with(path, |out| {
        let failed = Error::io(path);
        out.write_all(&start).map_err(failed)?;
        for tensor in order {
            out.write_all(&raw_bytes(tensor)?).map_err(failed)?;
        }
        Ok(())
    })
}

/// Replaces the file at `path` by what `content` writes: through a temporary file beside it, so that a reader finds
/// the old file or the new one, and the old one stays on any error. A link at `path` is replaced, not
/// followed. Temporary files of processes that were killed, told by their lock, are removed.
///
/// # Errors
///
/// That of `content`, and [`Error::Io`].
///
/// # Examples
///
/// ```
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("notes.txt");
/// use candle_doft::{Error, file::replace_with};
/// use std::io::Write;
///
/// replace_with(&path, |out| out.write_all(b"whole").map_err(candle_core::Error::wrap))?;
/// assert_eq!(std::fs::read(&path).unwrap(), b"whole");
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn replace_with<E: From<Error>>(
    path: impl AsRef<Path>,
    content: impl FnOnce(&mut BufWriter<&mut File>) -> Result<(), E>,
) -> Result<(), E> {
    let path = path.as_ref();
    let failed = Error::io(path);
    let mut file = temporary(path)?;
    let mut out = BufWriter::with_capacity(1 << 20, file.as_file_mut());
    content(&mut out)?;
    out.flush().map_err(failed)?;
    drop(out);
    file.as_file().sync_all().map_err(failed)?;
    Ok(persist(file, path)?)
}

/// The length of a header and the header, so that the data begins at a multiple of 8.
pub(crate) fn head(header: &str) -> Vec<u8> {
    let length = header.len().next_multiple_of(8);
    let mut bytes = (length as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(8 + length, b' ');
    bytes
}

fn append(tensor: &Tensor, data: &mut Vec<u8>) -> Result<()> {
    let flat = tensor.flatten_all()?;
    match tensor.dtype() {
        DType::F64 => extend(data, &flat.to_vec1::<f64>()?, f64::to_le_bytes),
        DType::F32 => extend(data, &flat.to_vec1::<f32>()?, f32::to_le_bytes),
        DType::F16 => extend(data, &flat.to_vec1()?, half::f16::to_le_bytes),
        DType::BF16 => extend(data, &flat.to_vec1()?, half::bf16::to_le_bytes),
        found => {
            let expected = "f64, f32, f16 or bf16";
            return Err(Error::dtype(
                "an adapter file",
                "a tensor to save",
                found,
                expected,
            ));
        }
    }
    Ok(())
}

fn extend<T: Copy, const N: usize>(data: &mut Vec<u8>, values: &[T], bytes: fn(T) -> [u8; N]) {
    let start = data.len();
    data.resize(start + N * values.len(), 0);
    for (to, value) in data[start..].chunks_exact_mut(N).zip(values) {
        to.copy_from_slice(&bytes(*value));
    }
}

/// The values of a float tensor as a file has them.
pub(crate) fn raw_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(tensor.elem_count() * tensor.dtype().size_in_bytes());
    append(tensor, &mut bytes)?;
    Ok(bytes)
}

/// Writes `bytes` beside `path` and renames them over it, so that a reader finds the old file or the
/// new one. A link at `path` is replaced, not followed.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    persist(filled(path, bytes)?, path)
}

/// A file of those bytes beside `path` and on disk, to be renamed to it.
pub(crate) fn filled(path: &Path, bytes: &[u8]) -> Result<NamedTempFile> {
    let mut file = temporary(path)?;
    file.as_file_mut()
        .write_all(bytes)
        .map_err(Error::io(path))?;
    file.as_file().sync_all().map_err(Error::io(path))?;
    Ok(file)
}

/// A file beside `path`, gone when it is dropped.
pub(crate) fn temporary(path: &Path) -> Result<NamedTempFile> {
    let home = folder(path);
    // The system's own error would name the temporary file.
    if !home.exists() {
        let text = format!(
            "the folder {} does not exist; make it first",
            home.display()
        );
        let error = std::io::Error::new(std::io::ErrorKind::NotFound, text);
        return Err(Error::io(path)(error));
    }
    remove_stale(home);
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX);
    // A temporary file is readable by its owner alone; an adapter is as open as any other file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    loop {
        let file = builder.tempfile_in(home).map_err(Error::io(path))?;
        // The lock says that someone still writes it. Where there are no locks, nothing is removed.
        file.as_file().try_lock().ok();
        // Another process may have taken it for stale before the lock.
        if file.path().exists() {
            return Ok(file);
        }
    }
}

/// What the names of temporary files begin and end with.
const PREFIX: &str = ".doft";
const SUFFIX: &str = ".tmp";

/// Removes temporary files that a killed process left behind. One that is being written is locked.
fn remove_stale(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !(name.starts_with(PREFIX) && name.ends_with(SUFFIX)) {
            continue;
        }
        let path = entry.path();
        if let Ok(file) = std::fs::OpenOptions::new().write(true).open(&path)
            && file.try_lock().is_ok()
        {
            std::fs::remove_file(&path).ok();
        }
    }
}

/// Renames a file that is on disk to `path`.
pub(crate) fn persist(file: NamedTempFile, path: &Path) -> Result<()> {
    file.persist(path).map_err(|e| Error::io(path)(e.error))?;
    // The rename is on disk once its folder is. Not every system lets a folder be opened.
    #[cfg(unix)]
    std::fs::File::open(folder(path))
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io(path))?;
    Ok(())
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A folder that is there from now on; those that had to be made go again if it is dropped while
/// they are empty.
pub(crate) struct Folder(Vec<PathBuf>);

impl Folder {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let missing = path.ancestors().take_while(|folder| !folder.exists());
        let missing = missing
            .map(Path::to_path_buf)
            .filter(|folder| !folder.as_os_str().is_empty());
        let made = Self(missing.collect());
        std::fs::create_dir_all(path).map_err(Error::io(path))?;
        Ok(made)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for folder in &self.0 {
            // A folder with something in it stays.
            std::fs::remove_dir(folder).ok();
        }
    }
}
