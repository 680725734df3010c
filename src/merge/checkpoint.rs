//! Merged checkpoints on disk: one file, or a folder with shards and whatever lies beside them.

use super::Merge;
use super::added::{self, Added};
use super::header::{self, Source};
use crate::error::{Error, Result};
use crate::file::{Folder, filled, persist, raw_bytes, temporary};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;
use tempfile::NamedTempFile;

/// What a merge on disk may do, and whom it tells.
///
/// # Examples
///
/// ```
/// use candle_doft::merge::CheckpointOptions;
///
/// let mut tell = |done: u64, all: u64| eprintln!("{done} of {all} bytes");
/// let mut options = CheckpointOptions::default();
/// options.allow_changed_base = true;
/// options.progress = Some(&mut tell);
/// ```
#[derive(Default)]
#[non_exhaustive]
pub struct CheckpointOptions<'a> {
    /// Merges into a base whose row norms are not those of the training.
    pub allow_changed_base: bool,
    /// Is called with the bytes done and the bytes in all, after each tensor.
    pub progress: Option<&'a mut dyn FnMut(u64, u64)>,
}

impl std::fmt::Debug for CheckpointOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointOptions")
            .field("allow_changed_base", &self.allow_changed_base)
            .finish_non_exhaustive()
    }
}

/// What a merge on disk did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MergeReport {
    /// Tensors that were replaced.
    pub merged: Vec<String>,
    /// Tensors that were copied byte for byte.
    pub copied: usize,
    /// Tensors that the base had none of.
    pub added: Vec<String>,
    /// Whether a head that shared its weight with the embedding got one of its own.
    pub untied: bool,
    /// Bytes written.
    pub bytes: u64,
}

impl Merge {
    /// Writes the checkpoint `base` (a file, or a folder of safetensors files and what lies beside
    /// them) to `output` (of the same sort) with every adapted weight replaced, rounded once to its
    /// dtype. All else is copied byte for byte, headers too. Extra tensors that the base lacks are
    /// added, and a head that shares its weight with the embedding gets one of its own when only one of
    /// the two is adapted; a folder's index and configuration say so then.
    ///
    /// Tensors are streamed: memory stays within a few times the largest of them. Files appear under
    /// their names when all of them are whole; on any error there is nothing new.
    ///
    /// # Errors
    ///
    /// [`Error::FileUnused`] for modules that match no weight, those of [`Merge::weight`], and
    /// [`Error::Io`].
    ///
    /// # Examples
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor, safetensors};
    /// # use candle_doft::{Adapter, DoftConfig};
    /// # use std::collections::HashMap;
    /// use candle_doft::merge::{CheckpointOptions, Merge, Strength};
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let (base, output) = (folder.path().join("base.safetensors"), folder.path().join("merged.safetensors"));
    /// # let weight = Tensor::ones((8, 64), DType::F32, &Device::Cpu)?;
    /// # safetensors::save(&HashMap::from([("head.weight", weight.clone())]), &base)?;
    /// # let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
    /// # builder.wrap("head", candle_nn::Linear::new(weight, None))?;
    /// # let adapter = builder.finish()?;
    ///
    /// let merge = Merge::new().with_adapter(&adapter, Strength::default())?;
    /// let report = merge.checkpoint(&base, &output, CheckpointOptions::default())?;
    /// assert_eq!(report.merged, ["head.weight"]);
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn checkpoint(
        &self,
        base: impl AsRef<Path>,
        output: impl AsRef<Path>,
        mut options: CheckpointOptions,
    ) -> Result<MergeReport> {
        let (base, output) = (base.as_ref(), output.as_ref());
        let (checkpoints, others) = header::files(base)?;
        let folder = base.is_dir();
        check_output(output, folder)?;
        let target = |from: &Path| match from.file_name() {
            Some(name) if folder => output.join(name),
            _ => output.to_path_buf(),
        };
        let opened: Result<Vec<Source>> = checkpoints.iter().map(|p| Source::open(p)).collect();
        let mut sources = opened?;
        let added = Added::of(self, &sources, folder && added::tied(base)?)?;
        let names = sources.iter().flat_map(Source::names).chain(added.names());
        self.check_names(&names.collect())?;
        let mut job = Job {
            added: &added,
            total: sources.iter().map(Source::size).sum(),
            report: MergeReport {
                untied: added.untied,
                ..MergeReport::default()
            },
            options: &mut options,
        };
        let _made = folder.then(|| Folder::create(output)).transpose()?;
        let mut written = Vec::new();
        for source in &mut sources {
            let to = target(&source.path);
            written.push((self.write(source, &to, &mut job)?, to));
        }
        let report = job.report;
        self.check_used()?;
        for from in others {
            let to = target(&from);
            match added.edited(&from, report.bytes)? {
                Some(text) => written.push((filled(&to, &text)?, to)),
                None if from != to => written.push((copied(&from, &to)?, to)),
                None => {}
            }
        }
        for (file, to) in written {
            persist(file, &to)?;
        }
        Ok(report)
    }

    /// Every module has its weight, before anything is computed.
    fn check_names(&self, names: &BTreeSet<String>) -> Result<()> {
        let paths = || {
            names
                .iter()
                .map(|name| name.strip_suffix(".weight").unwrap_or(name))
        };
        for part in self.parts.iter() {
            part.asked.clear();
            // A weaker match that comes first in a file must not take what belongs to another.
            for path in part.stored.matched(paths())?.into_values() {
                part.asked.insert(&part.stored, path)?;
            }
            part.check_patterns()?;
            let modules = part.stored.layers.keys();
            let unused = part.asked.unused(&part.stored);
            let missing: Vec<&String> = modules.filter(|name| unused.contains(name)).collect();
            let partial = part.stored.allow_partial && !part.asked.is_empty();
            if !missing.is_empty() && !partial {
                let names = names.iter().map(String::as_str);
                return Err(part.stored.unused(&missing, names));
            }
        }
        Ok(())
    }

    fn write(&self, source: &mut Source, to: &Path, job: &mut Job) -> Result<NamedTempFile> {
        let failed = Error::io(to);
        let allow_changed_base = job.options.allow_changed_base;
        let mut file = temporary(to)?;
        let mut out = BufWriter::with_capacity(1 << 20, file.as_file_mut());
        let added = job.added.tensors(self, source, allow_changed_base)?;
        match added.is_empty() {
            true => out.write_all(&source.head).map_err(failed)?,
            false => out.write_all(&source.head_with(&added)?).map_err(failed)?,
        }
        for name in source.names() {
            let bytes = match self.replaced(source, &name, allow_changed_base)? {
                Some(bytes) => {
                    job.report.merged.push(name);
                    bytes
                }
                None => {
                    job.report.copied += 1;
                    source.bytes(&name)?
                }
            };
            out.write_all(&bytes).map_err(failed)?;
            job.report.bytes += bytes.len() as u64;
            if let Some(progress) = &mut job.options.progress {
                progress(job.report.bytes, job.total);
            }
        }
        for (name, tensor) in added {
            let bytes = raw_bytes(&tensor)?;
            out.write_all(&bytes).map_err(failed)?;
            job.report.bytes += bytes.len() as u64;
            job.report.added.push(name);
        }
        out.flush().map_err(failed)?;
        drop(out);
        file.as_file().sync_all().map_err(failed)?;
        Ok(file)
    }

    /// The bytes that replace a tensor, if an adapter has it.
    fn replaced(
        &self,
        source: &mut Source,
        name: &str,
        allow_changed_base: bool,
    ) -> Result<Option<Vec<u8>>> {
        let extra = self.extra(name);
        let path = name.strip_suffix(".weight");
        let mut adapted = false;
        for part in self.parts.iter() {
            adapted |= match path {
                Some(path) => part.asked.find(&part.stored, path)?.is_some(),
                None => false,
            };
        }
        if extra.is_none() && !adapted {
            return Ok(None);
        }
        let mut tensor = source.tensor(name)?;
        if let Some(extra) = extra {
            if extra.dims() != tensor.dims() {
                return Err(Error::FileTensor {
                    file: source.path.clone(),
                    tensor: name.to_string(),
                    found: format!("shape {:?}", tensor.dims()),
                    expected: format!("{:?}, that of the adapter's extra tensor", extra.dims()),
                    fix: "is this the model it was trained on?",
                });
            }
            tensor = extra.to_dtype(tensor.dtype())?;
        }
        if let (true, Some(path)) = (adapted, path)
            && let Some(merged) = self.weight(path, &tensor, allow_changed_base)?
        {
            tensor = merged;
        }
        raw_bytes(&tensor).map(Some)
    }
}

/// Refuses a file where a folder is to be written, and a folder where a file is.
fn check_output(output: &Path, folder: bool) -> Result<()> {
    if !output.exists() || output.is_dir() == folder {
        return Ok(());
    }
    let (found, expected) = match folder {
        true => ("a file", "a folder"),
        false => ("a folder", "a file"),
    };
    let reason = format!("it is {found}, expected {expected} to write to, as the base is");
    Err(Error::file(output, reason))
}

/// What the files of one checkpoint share while they are written.
struct Job<'a, 'b> {
    added: &'a Added,
    /// Bytes of the base's tensors.
    total: u64,
    report: MergeReport,
    options: &'a mut CheckpointOptions<'b>,
}

fn copied(from: &Path, to: &Path) -> Result<NamedTempFile> {
    let mut file = temporary(to)?;
    let mut source = fs::File::open(from).map_err(Error::io(from))?;
    std::io::copy(&mut source, file.as_file_mut()).map_err(Error::io(to))?;
    file.as_file().sync_all().map_err(Error::io(to))?;
    Ok(file)
}
