//! The tensors of a safetensors file, read with every check that a hostile file needs.

use crate::error::{Error, Result, shown};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensors};
use serde::Deserializer as _;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

/// What a file that should be safetensors is instead, where its first bytes tell.
pub(crate) fn instead(bytes: &[u8]) -> Option<&'static str> {
    const KNOWN: [(&[u8], &str); 3] = [
        (
            b"GGUF",
            "it is a GGUF file, and a safetensors file was expected",
        ),
        (
            b"PK\x03\x04",
            "it is a zip archive, as PyTorch writes; save its tensors as safetensors",
        ),
        (
            b"version https://git-lfs",
            "it is a pointer of Git LFS; fetch the file itself with `git lfs pull`",
        ),
    ];
    let known = KNOWN.iter().find(|(start, _)| bytes.starts_with(start));
    // The length of a header, in 8 bytes, is never so long that its upper half counts.
    let length = bytes.get(4..8).is_none_or(|upper| upper == [0; 4]);
    let other = (!length).then_some("it does not begin with the length of a header");
    known.map(|(_, reason)| *reason).or(other)
}

pub(super) fn refused<T>(file: &Path, reason: impl Into<String>) -> Result<T> {
    Err(Error::file(file, reason))
}

/// candle's dtype for one of the floats that adapters and weights are made of.
pub(crate) fn float(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 => DType::try_from(dtype).ok(),
        _ => None,
    }
}

/// The value of a marker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Marker {
    Empty,
    Bool(bool),
    Int(i64),
    Float(f64),
}

impl Marker {
    /// Its value as a number; nothing is 0.
    pub(super) fn number(self) -> f64 {
        match self {
            Self::Empty => 0.,
            Self::Bool(value) => f64::from(u8::from(value)),
            Self::Int(value) => value as f64,
            Self::Float(value) => value,
        }
    }
}

/// A file whose header has been checked against its length.
pub(crate) struct Tensors<'a> {
    file: &'a Path,
    views: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl<'a> Tensors<'a> {
    pub(crate) fn new(file: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        if let Some(name) = header_of(bytes).and_then(twice) {
            let reason = format!("its header has `{}` twice", shown(&name));
            return refused(file, reason);
        }
        let read = || -> std::result::Result<(Metadata, SafeTensors<'a>), _> {
            let (_, metadata) = SafeTensors::read_metadata(bytes)?;
            Ok::<_, safetensors::SafeTensorError>((metadata, SafeTensors::deserialize(bytes)?))
        };
        match read() {
            Ok((metadata, views)) => Ok(Self {
                file,
                views,
                metadata: metadata.metadata().clone().unwrap_or_default(),
            }),
            Err(e) => {
                let reason = instead(bytes).map_or_else(|| e.to_string(), str::to_string);
                refused(file, format!("not a whole safetensors file: {reason}"))
            }
        }
    }

    pub(super) fn file(&self) -> &'a Path {
        self.file
    }

    pub(crate) fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// The names, sorted.
    pub(crate) fn names(&self) -> Vec<&str> {
        let mut names = self.views.names();
        names.sort_unstable();
        names
    }

    /// A scalar of any dtype, or nothing where a marker has no element.
    pub(super) fn marker(&self, name: &str) -> Result<Marker> {
        let view = self.view(name)?;
        let whole = |bytes: &[u8]| bytes.iter().rev().fold(0i64, |n, b| n << 8 | i64::from(*b));
        Ok(match (view.dtype(), view.shape().iter().product()) {
            (_, 0) => Marker::Empty,
            (Dtype::BOOL, 1) => Marker::Bool(view.data()[0] != 0),
            (Dtype::U8 | Dtype::I64, 1) => Marker::Int(whole(view.data())),
            (Dtype::I32, 1) => Marker::Int(i64::from(whole(view.data()) as i32)),
            (_, 1) => {
                let value = self.read(name)?.flatten_all()?.to_dtype(DType::F64)?;
                Marker::Float(value.to_vec1::<f64>()?[0])
            }
            _ => {
                let reason = format!("the marker `{}` is not one value", shown(name));
                return refused(self.file, reason);
            }
        })
    }

    /// One float tensor, finite throughout.
    pub(super) fn read(&self, name: &str) -> Result<Tensor> {
        let tensor = self.tensor(name)?;
        match not_finite(&tensor)? {
            None => Ok(tensor),
            Some((index, found)) => {
                self.wrong(name, format!("{found} at index {index}"), "finite values")
            }
        }
    }

    /// One float tensor, of whatever values.
    pub(crate) fn tensor(&self, name: &str) -> Result<Tensor> {
        let view = self.view(name)?;
        let Some(dtype) = float(view.dtype()) else {
            let found = format!("dtype {:?}", view.dtype());
            return self.wrong(name, found, "F32, F64, F16 or BF16");
        };
        // Without elements the other axes may be of any size.
        if view.data().is_empty() && view.shape().iter().any(|axis| *axis > u32::MAX as usize) {
            let found = format!("shape {:?}", view.shape());
            return self.wrong(name, found, "a shape that a layer has");
        }
        let shape = view.shape();
        Ok(Tensor::from_raw_buffer(
            view.data(),
            dtype,
            shape,
            &Device::Cpu,
        )?)
    }

    fn view(&self, name: &str) -> Result<TensorView<'a>> {
        self.views
            .tensor(name)
            .or_else(|e| refused(self.file, format!("tensor `{}`: {e}", shown(name))))
    }

    /// An error that names a tensor, what it has and what was expected.
    pub(super) fn wrong<T>(&self, name: &str, found: String, expected: &str) -> Result<T> {
        Err(Error::FileTensor {
            file: self.file.to_path_buf(),
            tensor: shown(name),
            found,
            expected: expected.into(),
            fix: "the file is damaged or not an adapter",
        })
    }
}

/// The header of a file, where it is whole.
fn header_of(bytes: &[u8]) -> Option<&[u8]> {
    let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    bytes.get(8..usize::try_from(length).ok()?.checked_add(8)?)
}

/// A name that a header has more than once. Readers take one of the two, and not all the same.
pub(crate) fn twice(header: &[u8]) -> Option<String> {
    struct Names;

    impl<'de> Visitor<'de> for Names {
        type Value = Option<String>;

        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("a JSON object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut names = BTreeSet::new();
            let mut found = None;
            while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
                if names.contains(&name) {
                    found.get_or_insert(name);
                } else {
                    names.insert(name);
                }
            }
            Ok(found)
        }
    }

    // What is no JSON is told by the reader of the header itself.
    let mut json = serde_json::Deserializer::from_slice(header);
    json.deserialize_map(Names).ok().flatten()
}

/// The first value that is a NaN or an infinity.
pub(super) fn not_finite(tensor: &Tensor) -> Result<Option<(usize, f64)>> {
    let values: Vec<f64> = tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
    Ok(values.into_iter().enumerate().find(|(_, v)| !v.is_finite()))
}

/// Refuses to save what a reader would refuse to load.
pub(super) fn check_finite(tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    for (name, tensor) in tensors {
        if let Some((index, found)) = not_finite(tensor)? {
            return Err(Error::NotFinite {
                tensor: name.clone(),
                found,
                index,
            });
        }
    }
    Ok(())
}
