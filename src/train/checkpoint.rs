//! [`Checkpoint`]: everything that a run needs to go on, in one file.

use super::AdamW;
use super::optimizer::{State, wide_dtype};
use crate::adapter::Settings;
use crate::error::{Error, Result, shown};
use crate::file::{CHECKPOINT, Tensors, replace, safetensors_bytes};
use candle_core::{DType, Device, Tensor, Var};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// 2: copies in f32 of half variables, and the settings of layers.
const VERSION: &str = "2";

/// A point of a run to go on from: trained variables, the moments and steps of the optimizer, the
/// configuration, and whatever else the run keeps (the position in its data, its random state).
///
/// One safetensors file, replaced as a whole: a reader finds the old checkpoint or the new one. Values
/// are kept bit for bit. It is for going on, not for passing on: [`Adapter::save`](crate::Adapter::save)
/// writes the adapter that others read.
///
/// | name | tensor |
/// |---|---|
/// | `trained.<name>` | the variable |
/// | `first.<name>`, `second.<name>` | its moments |
/// | `master.<name>` | its copy in f32, of a variable in f16 or bf16 |
///
/// Metadata: `format`, `format_version`, `steps`, and as JSON `config`, `state` and `layers`: what the
/// parameters of each layer of an adapter mean, which is compared when they are restored.
///
/// [`train`](super#examples) shows its use.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    file: PathBuf,
    steps: u64,
    config: Value,
    state: Value,
    /// Of the layers of an adapter; none where the optimizer knew of none.
    layers: Option<BTreeMap<String, Settings>>,
    tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Writes a checkpoint. `config` is what a resumed run compares with its own, `state` what it goes
    /// on from.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file cannot be written; the previous one is then intact.
    pub fn save(
        path: impl AsRef<Path>,
        optimizer: &AdamW,
        config: &impl Serialize,
        state: &impl Serialize,
    ) -> Result<()> {
        let path = path.as_ref();
        let mut tensors = BTreeMap::new();
        for (name, var) in optimizer.named_vars() {
            tensors.insert(format!("trained.{name}"), var.as_tensor().clone());
        }
        for (name, state) in optimizer.states()? {
            tensors.insert(format!("first.{name}"), state.first);
            tensors.insert(format!("second.{name}"), state.second);
            if let Some(master) = state.master {
                tensors.insert(format!("master.{name}"), master);
            }
        }
        let json = |what: &str, value: serde_json::Result<String>| {
            value.map_err(|error| Error::file(path, format!("the {what} is no JSON: {error}")))
        };
        let metadata = BTreeMap::from([
            ("format".to_string(), CHECKPOINT.to_string()),
            ("format_version".into(), VERSION.into()),
            ("steps".into(), optimizer.steps().to_string()),
            (
                "config".into(),
                json("configuration", serde_json::to_string(config))?,
            ),
            ("state".into(), json("state", serde_json::to_string(state))?),
            (
                "layers".into(),
                json("settings", serde_json::to_string(&optimizer.layers()))?,
            ),
        ]);
        replace(path, &safetensors_bytes(&tensors, &metadata)?)
    }

    /// Reads a checkpoint; nothing is changed by that.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; [`Error::File`] when the file is not a whole checkpoint of this version.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let file = Tensors::new(path, &bytes)?;
        let get = |key: &str| file.metadata().get(key).map_or("", String::as_str);
        if (get("format"), get("format_version")) != (CHECKPOINT, VERSION) {
            let (format, version) = (shown(get("format")), shown(get("format_version")));
            let reason = format!(
                "not a checkpoint: its format is `{format}` `{version}`, expected `{CHECKPOINT}` `{VERSION}`"
            );
            return Err(Error::file(path, reason));
        }
        // No run is that long, and counting on from the largest number would overflow.
        let steps = get("steps").parse::<u32>().map(u64::from).map_err(|_| {
            let found = shown(get("steps"));
            Error::file(
                path,
                format!("its `steps` are `{found}`, expected a number"),
            )
        })?;
        let unread = |key: &str, error: serde_json::Error| {
            Error::file(path, format!("its `{key}` cannot be read: {error}"))
        };
        let json = |key: &str| serde_json::from_str(get(key)).map_err(|error| unread(key, error));
        let layers =
            serde_json::from_str(get("layers")).map_err(|error| unread("layers", error))?;
        let mut tensors = BTreeMap::new();
        for name in file.names() {
            tensors.insert(name.to_string(), file.tensor(name)?);
        }
        Ok(Self {
            file: path.to_path_buf(),
            steps,
            config: json("config")?,
            state: json("state")?,
            layers,
            tensors,
        })
    }

    /// Steps that the run had made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The configuration that was given, as the type that it was given in or a part of it.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when it is not of that type.
    pub fn config<T: DeserializeOwned>(&self) -> Result<T> {
        self.read("config", &self.config)
    }

    /// The state that was given, likewise.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when it is not of that type.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T> {
        self.read("state", &self.state)
    }

    fn read<T: DeserializeOwned>(&self, what: &str, value: &Value) -> Result<T> {
        let failed = |error| Error::file(&self.file, format!("its `{what}` is another: {error}"));
        T::deserialize(value).map_err(failed)
    }

    /// Sets the variables and moments of an optimizer over the same variables, bit for bit.
    ///
    /// # Errors
    ///
    /// [`Error::FileTensor`] or [`Error::File`] when a variable is missing, another is there, a shape or
    /// dtype differs, or the layers of the adapter (see [`AdamW::with_adapter`]) have other settings or
    /// another base weight than those of the run. Nothing is changed then.
    pub fn restore(&self, optimizer: &mut AdamW) -> Result<()> {
        let vars = optimizer.named_vars();
        let mut found = Vec::with_capacity(vars.len());
        for (name, var) in &vars {
            let trained = self.get("trained", name, var)?;
            let first = self.get("first", name, var)?;
            let second = self.get("second", name, var)?;
            let master = match var.dtype() == wide_dtype(var) {
                true => None,
                false => Some(self.master(name, var, &trained)?),
            };
            let state = State {
                first,
                second,
                master,
            };
            found.push((name.clone(), var, trained, state));
        }
        let expected = |key: &str| {
            let (role, name) = key.split_once('.').unwrap_or_default();
            let of_name = |(known, _, _, state): &&(String, _, _, State)| {
                known == name && (role != "master" || state.master.is_some())
            };
            ["trained", "first", "second", "master"].contains(&role)
                && found.iter().any(|entry| of_name(&entry))
        };
        if let Some(other) = self.tensors.keys().find(|key| !expected(key)) {
            let other = shown(other);
            let reason = format!("it holds `{other}`, which the model does not train");
            return Err(Error::file(&self.file, reason));
        }
        self.check_layers(optimizer.layers())?;
        let mut states = Vec::with_capacity(found.len());
        for (name, var, trained, state) in found {
            var.set(&trained)?;
            states.push((name, state));
        }
        optimizer.resume(self.steps, states);
        Ok(())
    }

    /// Returns an error for layers by whose settings the parameters mean something else.
    fn check_layers(&self, layers: Option<&BTreeMap<String, Settings>>) -> Result<()> {
        let refuse = |reason: String| Err(Error::file(&self.file, reason));
        const KNOWN: &str = "`AdamW::for_adapter` or `AdamW::with_adapter`";
        let (run, model) = match (&self.layers, layers) {
            (None, None) => return Ok(()),
            (Some(run), Some(model)) => (run, model),
            (Some(_), None) => {
                return refuse(format!(
                    "it is of the layers of an adapter, of which the optimizer knows nothing; make that \
                     by {KNOWN}"
                ));
            }
            (None, Some(_)) => {
                return refuse(format!(
                    "it does not say what the parameters of its layers mean, for its optimizer did not \
                     know; save with one that was made by {KNOWN}"
                ));
            }
        };
        for path in run.keys().chain(model.keys()) {
            let layer = shown(path);
            let (Some(was), Some(is)) = (run.get(path), model.get(path)) else {
                let (there, other) = match run.contains_key(path) {
                    true => ("run", "model"),
                    false => ("model", "run"),
                };
                return refuse(format!(
                    "layer `{layer}` is adapted in the {there} and not in the {other}; resume with the \
                     configuration that the run had"
                ));
            };
            if let Some([was, is]) = was.difference(is) {
                return refuse(format!(
                    "layer `{layer}` has {is}, in the run {was}; resume with the configuration that the \
                     run had"
                ));
            }
            if was.other_base(is) {
                return refuse(format!(
                    "layer `{layer}` is over another base weight than in the run, by its row norms; \
                     resume over that one"
                ));
            }
        }
        Ok(())
    }

    /// What it holds of a variable, on the device of that.
    fn get(&self, role: &str, name: &str, var: &Var) -> Result<Tensor> {
        let key = format!("{role}.{name}");
        let Some(tensor) = self.tensors.get(&key) else {
            return Err(Error::file(
                &self.file,
                format!("it lacks `{key}`: the run trained other variables"),
            ));
        };
        let dtype = match role {
            "trained" => var.dtype(),
            _ => wide_dtype(var),
        };
        if tensor.dims() != var.dims() || tensor.dtype() != dtype {
            return Err(Error::FileTensor {
                file: self.file.clone(),
                tensor: key,
                found: format!("{:?} of {:?}", tensor.dims(), tensor.dtype()),
                expected: format!("{:?} of {dtype:?}, as the model", var.dims()),
                fix: "resume with the configuration that the run had",
            });
        }
        if let Some((index, value)) = unusable(role, tensor)? {
            return Err(Error::FileTensor {
                file: self.file.clone(),
                tensor: key,
                found: format!("{value} at index {index}"),
                expected: match role {
                    "second" => "finite numbers from 0".to_string(),
                    _ => "finite numbers".to_string(),
                },
                fix: OLDER,
            });
        }
        Ok(tensor.to_device(var.device())?)
    }

    /// The copy in f32 of a half variable, of which that has to be the rounding.
    fn master(&self, name: &str, var: &Var, trained: &Tensor) -> Result<Tensor> {
        let master = self.get("master", name, var)?;
        let host = |t: &Tensor| -> Result<Vec<f32>> {
            let host = t.to_device(&Device::Cpu)?.to_dtype(var.dtype())?;
            Ok(host.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
        };
        let (rounded, trained) = (host(&master)?, host(trained)?);
        let other = rounded.iter().zip(&trained).position(|(a, b)| a != b);
        match other {
            None => Ok(master),
            Some(index) => Err(Error::FileTensor {
                file: self.file.clone(),
                tensor: format!("master.{name}"),
                found: format!("{} at index {index}, rounded", rounded[index]),
                expected: format!("{}, as `trained.{name}`", trained[index]),
                fix: OLDER,
            }),
        }
    }
}

/// What to do about numbers that no run has.
const OLDER: &str = "go on from an older checkpoint";

/// The first value that no run can go on with: one that is not finite, or a second moment below 0.
fn unusable(role: &str, tensor: &Tensor) -> Result<Option<(usize, f64)>> {
    let host = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let values: Vec<f64> = host.flatten_all()?.to_vec1()?;
    let bad = |value: &f64| !value.is_finite() || role == "second" && *value < 0.;
    let at = values.iter().position(bad);
    Ok(at.map(|index| (index, values[index])))
}
