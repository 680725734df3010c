//! Merged checkpoints on disk: one file, or a folder with shards and whatever lies beside them.

use super::added::{self, Added};
use super::header::{self, Shapes, Source};
use super::part::Part;
use super::{Merge, NameTable};
use crate::error::{Error, Result};
use crate::file::{Folder, filled, persist, raw_bytes, temporary};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// Ends the merge with [`Error::Stopped`] when it is set, of Ctrl-C for example; nothing is left behind.
    pub stop: Option<&'a AtomicBool>,
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
    /// them, in folders too, but for what is hidden) to `output` (of the same sort) with every adapted weight replaced, rounded once to its
    /// dtype. All else is copied byte for byte, headers too. Extra tensors that the base lacks are
    /// added, and a head that shares its weight with the embedding gets one of its own when only one of
    /// the two is adapted; a folder's index and configuration say so then.
    ///
    /// Tensors are streamed: memory stays within a few times the largest of them. Files appear under
    /// their names when all of them are whole; on any error there is nothing new.
    ///
    /// # Errors
    ///
    /// * [`Error::FileUnused`] for modules that match no weight, and those of [`Merge::weight`].
    /// * [`Error::Unnamed`] if layers were found by a table of names that lacks one of the checkpoint.
    /// * [`Error::File`] for an output folder that holds weights which are not of this model.
    /// * [`Error::Stopped`] and [`Error::Io`].
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
        options: CheckpointOptions,
    ) -> Result<MergeReport> {
        // A plan of its own: others may merge the same adapters at the same time.
        let plan = self.fresh();
        let report = plan.write_checkpoint(base.as_ref(), output.as_ref(), options);
        self.publish(&plan);
        report
    }

    fn write_checkpoint(
        &self,
        base: &Path,
        output: &Path,
        mut options: CheckpointOptions,
    ) -> Result<MergeReport> {
        let (checkpoints, others) = header::files(base, output)?;
        let folder = base.is_dir();
        check_output(output, folder)?;
        let target = |from: &Path| match from.strip_prefix(base) {
            Ok(name) if folder => output.join(name),
            _ => output.to_path_buf(),
        };
        let all = checkpoints.iter().chain(&others);
        header::check_stale(output, &all.map(|from| target(from)).collect())?;
        let opened: Result<Vec<Source>> = checkpoints.iter().map(|p| Source::open(p)).collect();
        let mut sources = opened?;
        let added = Added::of(self, &sources, folder && added::tied(base)?)?;
        let names = sources.iter().flat_map(Source::names).chain(added.names());
        let names: BTreeSet<String> = names.collect();
        let merge = self.named(|| NameTable::detect(names.iter().map(String::as_str)));
        merge.check_names(&names, &header::shapes(&sources)?)?;
        let mut job = Job {
            added: &added,
            total: sources.iter().map(Source::size).sum(),
            report: MergeReport {
                untied: added.untied,
                ..MergeReport::default()
            },
            options: &mut options,
        };
        let mut made = Vec::new();
        if folder {
            made.push(Folder::create(output)?);
        }
        let mut written = Vec::new();
        for source in &mut sources {
            let to = target(&source.path);
            written.push((merge.write(source, &to, &mut job)?, to));
        }
        let (report, stop) = (job.report, options.stop);
        self.check_used()?;
        for from in others {
            stopped(stop, output)?;
            let to = target(&from);
            if let Some(home) = to.parent().filter(|home| !home.exists()) {
                made.push(Folder::create(home)?);
            }
            // Files of the same name in folders within are none of this checkpoint.
            let beside = from.parent() == Some(base);
            let edited = beside.then(|| added.edited(&from, report.bytes));
            match edited.transpose()?.flatten() {
                Some(text) => written.push((filled(&to, &text)?, to)),
                None if from != to => written.push((copied(&from, &to)?, to)),
                None => {}
            }
        }
        stopped(stop, output)?;
        for (file, to) in written {
            persist(file, &to)?;
        }
        Ok(report)
    }

    /// Every module has its weight, before anything is computed.
    fn check_names(&self, names: &BTreeSet<String>, shapes: &Shapes) -> Result<()> {
        let paths = || {
            names
                .iter()
                .map(|name| name.strip_suffix(".weight").unwrap_or(name))
        };
        for part in self.parts.iter() {
            // A weaker match that comes first in a file must not take what belongs to another.
            for path in part.stored.matched(paths())?.into_values() {
                part.asked.insert(&part.stored, path)?;
            }
            let found = self.check_layers(part, shapes)?;
            part.check_patterns()?;
            let modules = part.stored.layers.keys();
            let unused = part.asked.unused(&part.stored);
            let missing: Vec<&String> = modules.filter(|name| unused.contains(name)).collect();
            let partial = part.stored.allow_partial && !part.asked.is_empty();
            if !missing.is_empty() && !partial {
                let names = names.iter().chain(&found).map(String::as_str);
                return Err(part.stored.unused(&missing, names));
            }
        }
        let mut unnamed = Vec::new();
        for (name, shape) in shapes {
            if self.is_unnamed(name, shape)? {
                unnamed.push(name.as_str());
            }
        }
        self.check_named(unnamed)
    }

    /// Enters the modules that the table of names finds, where others are left; returns the names of all
    /// layers in it.
    fn check_layers(&self, part: &Part, shapes: &Shapes) -> Result<Vec<String>> {
        let Some(table) = self.names.as_deref() else {
            return Ok(Vec::new());
        };
        let mut layers = Vec::new();
        for (name, shape) in shapes {
            for target in part.targets(name, shape, Some(table))? {
                part.enter(&target)?;
            }
            let parts = table.parts(name, shape)?.into_iter().flatten();
            layers.extend(parts.map(|named| named.module));
        }
        part.check_extras(shapes, &layers)?;
        Ok(layers)
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
            stopped(job.options.stop, to)?;
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
        let shape = source.info(name)?.shape.clone();
        let mut adapted = self.extra(name).is_some();
        for part in self.parts.iter() {
            let targets = part.targets(name, &shape, self.names.as_deref())?;
            adapted |= !targets.is_empty();
        }
        if !adapted {
            return Ok(None);
        }
        let tensor = source.tensor(name)?;
        match self.tensor(name, &tensor, allow_changed_base)? {
            Some(merged) => raw_bytes(&merged).map(Some),
            None => Ok(None),
        }
    }
}

fn stopped(stop: Option<&AtomicBool>, path: &Path) -> Result<()> {
    match stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
        false => Ok(()),
        true => Err(Error::Stopped {
            path: path.to_path_buf(),
        }),
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
