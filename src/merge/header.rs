//! The header of a safetensors file on disk, and its tensors one by one.

use crate::error::{Error, Result};
use crate::file::{float, instead};
use candle_core::{Device, Tensor};
use safetensors::tensor::{Metadata, TensorInfo};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The longest header that is read.
const LONGEST: u64 = 100_000_000;

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
        let metadata: Metadata =
            serde_json::from_slice(&head[8..]).map_err(|e| refused(e.to_string()))?;
        let end = metadata
            .offset_keys()
            .last()
            .and_then(|name| metadata.info(name));
        let end = end.map_or(0, |info| info.data_offsets.1);
        if (end as u64).checked_add(8 + count) != Some(length) {
            return Err(refused(format!(
                "{end} bytes of data in a file of {length}"
            )));
        }
        for (name, info) in metadata.tensors() {
            let elements = info
                .shape
                .iter()
                .try_fold(1usize, |n, axis| n.checked_mul(*axis));
            let bits = elements.and_then(|n| n.checked_mul(info.dtype.bitsize()));
            let bytes = info.data_offsets.1.checked_sub(info.data_offsets.0);
            if bits != bytes.and_then(|n| n.checked_mul(8)) {
                return Err(refused(format!(
                    "the size of `{name}` is not that of its shape"
                )));
            }
        }
        Ok(Self {
            path: path.to_path_buf(),
            file,
            head,
            metadata,
        })
    }

    /// Names in the order of their data.
    pub(super) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    pub(super) fn info(&self, name: &str) -> Result<&TensorInfo> {
        let info = self.metadata.info(name);
        info.ok_or_else(|| Error::file(&self.path, format!("it has no tensor `{name}`")))
    }

    /// Bytes of a tensor.
    pub(super) fn bytes(&mut self, name: &str) -> Result<Vec<u8>> {
        let (start, end) = self.info(name)?.data_offsets;
        let mut bytes = vec![0; end - start];
        let start = (self.head.len() + start) as u64;
        let file = &mut self.file;
        let read = file
            .seek(SeekFrom::Start(start))
            .and_then(|_| file.read_exact(&mut bytes));
        read.map_err(Error::io(&self.path))?;
        Ok(bytes)
    }

    /// A float tensor.
    pub(super) fn tensor(&mut self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?.clone();
        let Some(dtype) = float(info.dtype) else {
            let found = format!("`{name}` has dtype {:?}", info.dtype);
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
