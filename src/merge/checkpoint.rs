//! Merged checkpoints on disk: one file, or a folder with shards and whatever lies beside them.

use super::Merge;
use super::header::Source;
use super::untie::{self, Untied};
use crate::error::{Error, Result};
use crate::file::{persist, raw_bytes, temporary};
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
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
    /// Whether a head that shared its weight with the embedding got one of its own.
    pub untied: bool,
    /// Bytes written.
    pub bytes: u64,
}

const SUFFIX: &str = "safetensors";

impl Merge {
    /// Writes the checkpoint `base` (a file, or a folder of safetensors files and what lies beside
    /// them) to `output` (of the same sort) with every adapted weight replaced, rounded once to its
    /// dtype. All else is copied byte for byte, headers too. A head that shares its weight with the
    /// embedding gets one of its own when only one of the two is adapted; a folder's configuration and
    /// index say so then.
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
    /// # let adapter = Adapter::new(DoftConfig::default(), &Device::Cpu)?;
    /// # adapter.wrap_linear("head", candle_nn::Linear::new(weight, None))?;
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
        let files = Files::of(base, output)?;
        let mut sources = Vec::new();
        let mut total = 0;
        for (from, _) in &files.checkpoints {
            let source = Source::open(from)?;
            for name in source.names() {
                let (start, end) = source.info(&name)?.data_offsets;
                total += (end - start) as u64;
            }
            sources.push(source);
        }
        let tied = base.is_dir() && untie::tied(base)?;
        let untied = Untied::of(self, &sources, tied)?;
        let head = untied.as_ref().map(|_| Untied::name());
        self.check_names(sources.iter().flat_map(Source::names).chain(head).collect())?;
        let mut report = MergeReport {
            untied: untied.is_some(),
            ..MergeReport::default()
        };
        let mut written = Vec::new();
        for (mut source, (_, to)) in sources.into_iter().zip(&files.checkpoints) {
            let untied = untied.as_ref().filter(|untied| untied.is_in(&source.path));
            let file = self.write(&mut source, to, untied, total, &mut report, &mut options)?;
            written.push((file, to));
        }
        self.check_used()?;
        for (from, to) in &files.others {
            let edited = match &untied {
                Some(untied) => untied.edited(from)?,
                None => None,
            };
            match edited {
                Some(text) => written.push((filled(to, &text)?, to)),
                None if from != to => written.push((copied(from, to)?, to)),
                None => {}
            }
        }
        for (file, to) in written {
            persist(file, to)?;
        }
        Ok(report)
    }

    /// Every module has its weight, before anything is computed.
    fn check_names(&self, names: Vec<String>) -> Result<()> {
        for part in self.parts.iter() {
            let mut found = std::collections::BTreeSet::new();
            for name in &names {
                let path = name.strip_suffix(".weight").unwrap_or(name);
                let module = part.stored.find(path)?.map(|(module, _)| module);
                if module.is_some_and(|module| !found.insert(module)) {
                    let reason = format!("a module means several weights, `{path}` is one of them");
                    return Err(Error::file(&part.stored.file, reason));
                }
            }
            let partial = part.stored.allow_partial && !found.is_empty();
            let modules = part.stored.layers.keys();
            let extras = part
                .stored
                .extras
                .keys()
                .filter(|name| !names.contains(name));
            let modules = modules.filter(|module| !found.contains(module));
            let missing: Vec<&String> = modules.chain(extras).collect();
            if !missing.is_empty() && !partial {
                return Err(part
                    .stored
                    .unused(&missing, names.iter().map(String::as_str)));
            }
        }
        Ok(())
    }

    fn write(
        &self,
        source: &mut Source,
        to: &Path,
        untied: Option<&Untied>,
        total: u64,
        report: &mut MergeReport,
        options: &mut CheckpointOptions,
    ) -> Result<NamedTempFile> {
        let mut file = temporary(to)?;
        let mut out = BufWriter::with_capacity(1 << 20, file.as_file_mut());
        let head = untied.map(|untied| untied.head(source)).transpose()?;
        out.write_all(head.as_ref().unwrap_or(&source.head))
            .map_err(Error::io(to))?;
        for name in source.names() {
            let bytes = match self.replaced(source, &name, options.allow_changed_base)? {
                Some(bytes) => {
                    report.merged.push(name);
                    bytes
                }
                None => {
                    report.copied += 1;
                    source.bytes(&name)?
                }
            };
            out.write_all(&bytes).map_err(Error::io(to))?;
            report.bytes += bytes.len() as u64;
            if let Some(progress) = &mut options.progress {
                progress(report.bytes, total);
            }
        }
        if let Some(untied) = untied {
            let table = source.tensor(&untied.table)?;
            let head = self.weight(Untied::path(), &table, options.allow_changed_base)?;
            let bytes = raw_bytes(&head.unwrap_or(table))?;
            out.write_all(&bytes).map_err(Error::io(to))?;
            report.bytes += bytes.len() as u64;
        }
        out.flush().map_err(Error::io(to))?;
        drop(out);
        file.as_file().sync_all().map_err(Error::io(to))?;
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
                Some(path) => part.stored.find(path)?.is_some(),
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

/// What to write from what.
struct Files {
    checkpoints: Vec<(PathBuf, PathBuf)>,
    others: Vec<(PathBuf, PathBuf)>,
}

impl Files {
    fn of(base: &Path, output: &Path) -> Result<Self> {
        let folder = fs::metadata(base).map_err(Error::io(base))?.is_dir();
        if output.exists() && output.is_dir() != folder {
            let (found, expected) = match folder {
                true => ("a file", "a folder"),
                false => ("a folder", "a file"),
            };
            let reason = format!("it is {found}, expected {expected} to write to, as the base is");
            return Err(Error::file(output, reason));
        }
        if !folder {
            return Ok(Self {
                checkpoints: vec![(base.to_path_buf(), output.to_path_buf())],
                others: Vec::new(),
            });
        }
        let mut files = Self {
            checkpoints: Vec::new(),
            others: Vec::new(),
        };
        let mut entries = Vec::new();
        for entry in fs::read_dir(base).map_err(Error::io(base))? {
            entries.push(entry.map_err(Error::io(base))?.path());
        }
        entries.sort();
        for from in entries.into_iter().filter(|path| path.is_file()) {
            let Some(name) = from.file_name() else {
                continue;
            };
            let to = output.join(name);
            match from.extension().is_some_and(|end| end == SUFFIX) {
                true => files.checkpoints.push((from, to)),
                false => files.others.push((from, to)),
            }
        }
        if files.checkpoints.is_empty() {
            let reason = format!("a folder without .{SUFFIX} files");
            return Err(Error::file(base, reason));
        }
        fs::create_dir_all(output).map_err(Error::io(output))?;
        Ok(files)
    }
}

fn copied(from: &Path, to: &Path) -> Result<NamedTempFile> {
    let mut file = temporary(to)?;
    let mut source = fs::File::open(from).map_err(Error::io(from))?;
    std::io::copy(&mut source, file.as_file_mut()).map_err(Error::io(to))?;
    file.as_file().sync_all().map_err(Error::io(to))?;
    Ok(file)
}

fn filled(to: &Path, content: &[u8]) -> Result<NamedTempFile> {
    let mut file = temporary(to)?;
    file.as_file_mut()
        .write_all(content)
        .map_err(Error::io(to))?;
    file.as_file().sync_all().map_err(Error::io(to))?;
    Ok(file)
}
