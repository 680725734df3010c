//! How well the model reads the texts under a strength. One copy of the model: at each strength the adapter alone
//! is made anew.

use crate::Flags;
use crate::support::llm::data::{Batch, Data, Sequence};
use crate::support::llm::model::Model;
use crate::support::llm::open;
use crate::support::llm::tokenizer::Text;
use crate::support::llm::weights::Weights;
use crate::support::methods::{Method, TunerBuilder};
use anyhow::{Context, Result, ensure};
use candle_core::Device;
use candle_doft::adapter::Warning;
use candle_doft::config::Strengths;
use candle_doft::file::{Changes, LoadOptions, Target, convert_with};
use candle_doft::{Adapter, Adapters, DoftConfig, Mode, Targets};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Mean losses of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Losses {
    pub(crate) target: f64,
    pub(crate) general: Option<f64>,
}

/// The losses on the part that chooses, and on the one that is reported.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Measured {
    pub(crate) choose: Losses,
    pub(crate) report: Losses,
}

/// What the second text is held to: its perplexity may be `1 + allow` times that of the base.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    pub(crate) allow: f64,
    /// The loss of the base on the part that chooses.
    pub(crate) base: f64,
}

impl Limit {
    /// The largest loss.
    pub(crate) fn loss(self) -> f64 {
        self.base + self.allow.ln_1p()
    }
}

/// The sequences of one part of the texts.
struct Part {
    target: Vec<Sequence>,
    general: Option<Vec<Sequence>>,
}

/// A model, an adapter that acts on it at any strength, and the texts.
pub(crate) struct Bench {
    model: Model,
    device: Device,
    adapters: Adapters,
    folder: tempfile::TempDir,
    batch: usize,
    choose: Part,
    report: Part,
    /// The adapted layers.
    pub(crate) paths: Vec<String>,
    pub(crate) limit: Option<Limit>,
    /// Without the adapter.
    pub(crate) base: Measured,
}

/// The name of the adapter at the strength that is tried.
const TRIED: &str = "tried";

impl Bench {
    pub(crate) fn open(flags: &Flags) -> Result<Self> {
        let device = Device::Cpu;
        let options = flags.read_as.options();
        let weights = Weights::open(&open::locate(&flags.model)?, flags.dequantize, &device)?;
        let text = Text::open(&weights)?;
        let (choose, report) = texts(flags, &text)?;
        let nothing = DoftConfig::default().with_targets(Targets::None);
        let builder = Adapter::builder(nothing.clone(), &device)?;
        let builder = TunerBuilder::with_adapter(Method::Doft(Box::new(nothing)), builder);
        let model = Model::new(&weights, &builder, &device)?;
        ensure!(
            flags.seq <= model.config.context,
            "--seq {} is longer than the model's context of {}; give a smaller one",
            flags.seq,
            model.config.context
        );
        let tuner = builder.finish()?;
        let base = tuner.adapter().context("the model has no adapter")?;
        let adapters = Adapters::new("base", base.clone());
        let whole = adapters.load_with(TRIED, &flags.adapter, &options)?;
        for warning in whole.warnings() {
            eprintln!("note: {warning}");
        }
        let folder = tempfile::tempdir().context("no folder for files in between")?;
        // With the paths of the model, as the patterns of strengths need them.
        whole.save(folder.path().join("whole.safetensors"))?;
        let layers = whole.report().layers.into_iter();
        let none = Losses {
            target: 0.,
            general: None,
        };
        let mut bench = Self {
            paths: layers.map(|layer| layer.path).collect(),
            model,
            device,
            adapters,
            folder,
            batch: flags.batch,
            choose,
            report,
            limit: flags.limit(),
            base: Measured {
                choose: none,
                report: none,
            },
        };
        bench.base = bench.measured(&Strengths::from(0.))?;
        let base = bench.base.choose.general;
        if let (Some(limit), Some(base)) = (&mut bench.limit, base) {
            limit.base = base;
        }
        Ok(bench)
    }

    /// The losses of both parts.
    pub(crate) fn measured(&self, strengths: &Strengths) -> Result<Measured> {
        self.under(strengths, || {
            Ok(Measured {
                choose: self.losses(&self.choose)?,
                report: self.losses(&self.report)?,
            })
        })
    }

    /// The losses of the part that chooses, alone.
    pub(crate) fn to_choose(&self, strengths: &Strengths) -> Result<Losses> {
        self.under(strengths, || self.losses(&self.choose))
    }

    /// Writes the adapter with the strengths done in the file.
    pub(crate) fn write(&self, strengths: &Strengths, output: &Path) -> Result<Vec<Warning>> {
        let whole = self.folder.path().join("whole.safetensors");
        let changes = Changes::default().with_strength(strengths.clone());
        let options = LoadOptions::default();
        let shapes = BTreeMap::new();
        let done = convert_with(whole, output, Target::Doft, &options, &shapes, &changes)?;
        Ok(done.warnings)
    }

    fn under<T>(&self, strengths: &Strengths, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let none = strengths.value == 0. && strengths.rules.is_empty();
        if none {
            return self.adapters.get("base")?.with_mode(Mode::Off, f);
        }
        let file: PathBuf = self.folder.path().join("tried.safetensors");
        self.write(strengths, &file)?;
        self.adapters.load(TRIED, &file)?.with_mode(Mode::Eval, f)
    }

    fn losses(&self, part: &Part) -> Result<Losses> {
        let general = part.general.as_ref();
        Ok(Losses {
            target: self.loss(&part.target)?,
            general: general.map(|general| self.loss(general)).transpose()?,
        })
    }

    fn loss(&self, sequences: &[Sequence]) -> Result<f64> {
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let (mut sum, mut tokens) = (0., 0);
        for chunk in sequences.chunks(self.batch) {
            let batch = Batch::new(chunk, &self.device)?;
            let hidden = self.model.hidden(&self.model.embed(&batch.ids)?, false)?;
            let hidden = hidden.flatten_to(1)?.index_select(&batch.rows, 0)?;
            let loss = self.model.loss(&hidden, &batch.targets)?;
            sum += f64::from(loss.to_scalar::<f32>()?) * batch.tokens as f64;
            tokens += batch.tokens;
        }
        let loss = sum / tokens as f64;
        ensure!(loss.is_finite(), "the loss of a text is {loss}");
        Ok(loss)
    }
}

/// The part that chooses, and the part that is reported: no text is in both.
fn texts(flags: &Flags, text: &Text) -> Result<(Part, Part)> {
    let open = |file: &Path| -> Result<(Vec<Sequence>, Vec<Sequence>)> {
        let data = Data::open(Some(file), text, flags.seq, flags.seed)?;
        for note in &data.notes {
            eprintln!("note: {}: {note}", file.display());
        }
        let (mut choose, mut report) = (data.train, data.validation);
        choose.truncate(flags.sequences);
        report.truncate(flags.sequences);
        let (chosen, reported) = (choose.len(), report.len());
        eprintln!(
            "{}: {chosen} sequences choose, {reported} are reported",
            file.display()
        );
        Ok((choose, report))
    };
    let (target, reported) = open(&flags.data)?;
    let (general, reported_general) = match &flags.keep {
        Some(keep) => open(keep).map(|(choose, report)| (Some(choose), Some(report)))?,
        None => (None, None),
    };
    let choose = Part { target, general };
    let report = Part {
        target: reported,
        general: reported_general,
    };
    Ok((choose, report))
}
