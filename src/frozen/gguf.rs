//! [`QuantizedVarBuilder`]: the tensors of a GGUF file by path, kept quantized.

use candle_core::quantized::{QTensor, gguf_file};
use candle_core::{Device, Error, Result, Shape};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Quantized tensors by path, as [`candle_nn::VarBuilder`] gives dense ones.
///
/// # Examples
///
/// ```
/// use candle_core::Device;
/// use candle_doft::{Adapter, DoftConfig, frozen::QuantizedVarBuilder};
/// # use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("model.gguf");
/// # let weight = candle_core::Tensor::ones((576, 576), candle_core::DType::F32, &Device::Cpu)?;
/// # let weight = QTensor::quantize(&weight, GgmlDType::Q4_0)?;
/// # let mut file = std::fs::File::create(&path).unwrap();
/// # gguf_file::write(&mut file, &[], &[("blk.0.attn_q.weight", &weight)])?;
///
/// let vb = QuantizedVarBuilder::from_gguf(&path, &Device::Cpu)?;
/// let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
/// let query = builder.linear_no_bias(576, 576, vb.pp("blk.0.attn_q"))?;
/// assert!(query.is_adapted() && query.base().qtensor().is_some());
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct QuantizedVarBuilder {
    tensors: Arc<HashMap<String, Arc<QTensor>>>,
    path: Vec<String>,
    device: Device,
}

impl QuantizedVarBuilder {
    /// Reads all tensors of a GGUF file.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or is not a GGUF file.
    pub fn from_gguf(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let mut file = std::fs::File::open(path)
            .map_err(|error| Error::Msg(format!("{}: {error}", path.display())))?;
        let content = gguf_file::Content::read(&mut file).map_err(|e| e.with_path(path))?;
        let mut tensors = HashMap::new();
        for name in content.tensor_infos.keys() {
            let tensor = content.tensor(&mut file, name, device);
            let tensor = tensor.map_err(|error| error.with_path(path))?;
            tensors.insert(name.clone(), Arc::new(tensor));
        }
        Ok(Self::from_tensors(tensors, device))
    }

    /// A builder over tensors that exist already.
    pub fn from_tensors(tensors: HashMap<String, Arc<QTensor>>, device: &Device) -> Self {
        Self {
            tensors: Arc::new(tensors),
            path: Vec::new(),
            device: device.clone(),
        }
    }

    /// The builder one step further down.
    pub fn pp(&self, name: impl ToString) -> Self {
        let mut path = self.path.clone();
        path.push(name.to_string());
        Self {
            path,
            ..self.clone()
        }
    }

    /// The path so far, with dots.
    pub fn prefix(&self) -> String {
        self.path.join(".")
    }

    /// The device of the tensors.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether a tensor of that name is there.
    pub fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(&self.full(name))
    }

    /// The tensor of that name, of whatever shape.
    ///
    /// # Errors
    ///
    /// When it is not there.
    pub fn get_no_shape(&self, name: &str) -> Result<Arc<QTensor>> {
        let path = self.full(name);
        match self.tensors.get(&path) {
            Some(tensor) => Ok(tensor.clone()),
            None => Err(Error::CannotFindTensor { path }),
        }
    }

    /// The tensor of that name.
    ///
    /// # Errors
    ///
    /// When it is not there, or has another shape.
    pub fn get(&self, shape: impl Into<Shape>, name: &str) -> Result<Arc<QTensor>> {
        let (tensor, expected) = (self.get_no_shape(name)?, shape.into());
        if tensor.shape() != &expected {
            return Err(Error::UnexpectedShape {
                msg: format!("quantized tensor `{}`", self.full(name)),
                expected,
                got: tensor.shape().clone(),
            });
        }
        Ok(tensor)
    }

    fn full(&self, name: &str) -> String {
        match self.path.is_empty() {
            true => name.to_string(),
            false => format!("{}.{name}", self.prefix()),
        }
    }
}
