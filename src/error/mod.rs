//! Errors: one variant for each thing that the caller has to mend, with the data to mend it.

mod gradients;
mod nearest;
mod shown;

pub use gradients::GradientReport;
pub(crate) use nearest::nearest;
pub(crate) use shown::shown;

use std::path::{Path, PathBuf};

/// What went wrong, with the names and numbers needed to mend it.
///
/// # Examples
///
/// ```
/// use candle_doft::{DoftConfig, Error};
///
/// let error = DoftConfig::default().with_block_size(0).validate().unwrap_err();
/// assert!(matches!(error, Error::Config { field: "block_size", .. }));
/// assert_eq!(error.to_string(), "config: `block_size` is 0, expected at least 1");
/// ```
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of candle itself: a shape, dtype or device that does not fit.
    #[error(transparent)]
    Candle(candle_core::Error),

    /// A value of a configuration is out of its range.
    #[error("config: `{field}` is {found}, expected {expected}")]
    Config {
        /// The field of the configuration.
        field: &'static str,
        /// The value that was found.
        found: String,
        /// The values that are allowed.
        expected: String,
    },

    /// A pattern of targets, excludes or rules cannot be read.
    #[error("config: the pattern `{pattern}` cannot be read: {reason}")]
    Pattern {
        /// The pattern as written.
        pattern: String,
        /// What its parser said.
        reason: String,
    },

    /// A block size does not divide the width of a layer, and may not be adjusted.
    #[error(
        "layer `{layer}`: block size {asked} does not divide its width {width}; \
         the nearest that does is {nearest}"
    )]
    BlockSize {
        /// Path of the layer.
        layer: String,
        /// The block size of the configuration.
        asked: usize,
        /// Input width of the layer.
        width: usize,
        /// The divisor of `width` nearest to `asked`; ties go down.
        nearest: usize,
    },

    /// The width of a layer leaves nothing to rotate: the nearest divisor is 1.
    #[error(
        "layer `{layer}`: the divisor of its width {width} nearest to block size {asked} is 1, \
         which rotates nothing; choose another block size for it or exclude it"
    )]
    NothingToRotate {
        /// Path of the layer.
        layer: String,
        /// The block size of the configuration.
        asked: usize,
        /// Input width of the layer.
        width: usize,
    },

    /// A layer, or what it is fed, has a shape that it cannot have.
    #[error("layer `{layer}`: {what} has shape {found:?}, expected {expected}")]
    Shape {
        /// Path of the layer.
        layer: String,
        /// The tensor that is off.
        what: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// What it should be.
        expected: String,
    },

    /// A tensor has a dtype that the operation does not take.
    #[error("layer `{layer}`: {what} has dtype {found:?}, expected {expected}")]
    DType {
        /// Path of the layer.
        layer: String,
        /// The tensor that is off.
        what: &'static str,
        /// Its dtype.
        found: candle_core::DType,
        /// What it should be.
        expected: String,
    },

    /// The layer has no rotation: it is not adapted, or LoRA or DoRA is what it has.
    #[error("layer `{layer}` has no rotation: it is outside the targets, or has low-rank matrices")]
    NotAdapted {
        /// Path of the layer.
        layer: String,
    },

    /// The weight of a frozen layer has other values than when the layer was built.
    #[error(
        "layer `{layer}`: its base weight changed after it was built, so its norms are of other values; \
         load the weights (`VarMap::load`) before the model is built"
    )]
    BaseChanged {
        /// Path of the layer.
        layer: String,
    },

    /// The weight of a layer that is to be adapted holds a NaN or an infinity.
    #[error(
        "layer `{layer}`: row {row} of its base weight has norm {found}: it holds a NaN or an infinity, or \
         its norm is above the range of f32; is the checkpoint damaged?"
    )]
    BaseNotFinite {
        /// Path of the layer.
        layer: String,
        /// The first such row.
        row: usize,
        /// Its norm.
        found: f64,
    },

    /// No adapter on the model has that name.
    #[error("no adapter is called `{name}`; the model has `{}`", .known.join("`, `"))]
    NoAdapter {
        /// The name that was asked for.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },

    /// An adapter of that name is on the model already.
    #[error("an adapter is called `{name}` already; remove it first, or load over it")]
    AdapterExists {
        /// The name.
        name: String,
    },

    /// The adapter that acts cannot be removed.
    #[error("the adapter `{name}` acts; activate another first, or deactivate it")]
    AdapterActs {
        /// The name.
        name: String,
    },

    /// An input does not fit the scope that names an adapter for each row.
    #[error("layer `{layer}`: the input has {found}, expected {expected}")]
    Rows {
        /// Path of the layer.
        layer: String,
        /// What it has.
        found: String,
        /// What it has to have.
        expected: String,
    },

    /// A state in memory is not one of the adapter.
    #[error("`{name}`: the state has {found}, the adapter expects {expected}")]
    State {
        /// The trainable tensor.
        name: String,
        /// What the state has.
        found: String,
        /// What the adapter has.
        expected: String,
    },

    /// A layer was run while its model is still being built.
    #[error(
        "layer `{layer}`: the adapter is not finished; call `AdapterBuilder::finish` when the whole model \
         is built, then run it"
    )]
    Unfinished {
        /// Path of the layer.
        layer: String,
    },

    /// An extra tensor was asked for after the model was finished.
    #[error(
        "extra tensor `{name}`: the adapter is finished; ask for all extra tensors before \
         `AdapterBuilder::finish`"
    )]
    Finished {
        /// Name of the tensor.
        name: String,
    },

    /// A layer of this path exists in the adapter already.
    #[error("layer `{layer}` is wrapped already; give each layer a path of its own")]
    LayerExists {
        /// Path of the layer.
        layer: String,
    },

    /// A layer lives on another device than the adapter.
    #[error("layer `{layer}` is on {found}, the adapter on {expected}; build both on one device")]
    Device {
        /// Path of the layer.
        layer: String,
        /// Device of the layer.
        found: String,
        /// Device of the adapter.
        expected: String,
    },

    /// Patterns of the targets, excludes or rules match no layer.
    #[error("config: {field} `{pattern}` matches no layer; {}{hint}", near(.nearest))]
    NoMatch {
        /// The field of the configuration.
        field: &'static str,
        /// The pattern.
        pattern: String,
        /// The layers whose paths are nearest.
        nearest: Vec<String>,
        /// How the pattern is written if it was meant as a list or a regular expression; else empty.
        hint: &'static str,
    },

    /// Nothing was adapted.
    #[error(
        "the adapter has no layers; build the model through `AdapterBuilder`, with targets and excludes \
         that leave some (`Targets::None` where none is meant)"
    )]
    NoLayers,

    /// Adapter parameters got no gradient, or one that is not finite.
    #[error("{0}")]
    Gradients(Box<GradientReport>),

    /// A file or folder cannot be read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said. Not the `source` of this error, whose text has it already.
        error: std::io::Error,
    },

    /// The work was asked to stop; nothing was written.
    #[error("{}: stopped on request; nothing was written", .path.display())]
    Stopped {
        /// The file or folder that was to be written.
        path: PathBuf,
    },

    /// An adapter file cannot be read as one, or contradicts itself.
    #[error("{}: {reason}", .file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },

    /// A tensor of an adapter file is not what it should be. No layer was changed.
    #[error("{}: tensor `{tensor}` has {found}, expected {expected}; {fix}", .file.display())]
    FileTensor {
        /// The file.
        file: PathBuf,
        /// The tensor, by its name in the file.
        tensor: String,
        /// What the file has.
        found: String,
        /// What it should have, and where that comes from.
        expected: String,
        /// What to do.
        fix: &'static str,
    },

    /// A part of a loaded file was asked for by no layer.
    #[error(
        "{}: {count} of {total} layers and extra tensors match nothing in the model, \
         the first is `{first}`{}; is this the model it was trained on?{}", .file.display(),
         listed(.nearest), partly(*.count, *.total)
    )]
    FileUnused {
        /// The file.
        file: PathBuf,
        /// How many.
        count: usize,
        /// Of how many.
        total: usize,
        /// The first of them.
        first: String,
        /// The layers of the model whose paths are nearest to it.
        nearest: Vec<String>,
    },

    /// A layer of a checkpoint has no name in the table by which the layers of an adapter were found.
    #[error(
        "`{tensor}` is not in the table of names for {family}, so what an adapter calls it is not known; \
         name it in a table of your own (`NameTable::load`, `--names FILE`)"
    )]
    Unnamed {
        /// The tensor.
        tensor: String,
        /// What the table is for, or where it came from.
        family: String,
    },

    /// Parameters that cannot be saved, because they are not finite.
    #[error("`{tensor}` holds {found} at index {index}; nothing was saved")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The value.
        found: f64,
        /// Its place.
        index: usize,
    },

    /// A training step met a loss or a gradient that is not finite. Nothing was changed by it.
    #[error(
        "step {step}: {what} is {found}; the step was not made: lower the learning rate or look for \
         an overflow, and go on from the last checkpoint"
    )]
    Diverged {
        /// The step, counted from 1.
        step: u64,
        /// What is not finite.
        what: String,
        /// Its value.
        found: f64,
    },

    /// An argument of a function has a shape, dtype or value that it cannot have.
    #[error("`{function}`: {what} is {found}, expected {expected}")]
    Argument {
        /// The function.
        function: &'static str,
        /// What is off.
        what: &'static str,
        /// What was found.
        found: String,
        /// What it should be.
        expected: String,
    },

    /// What another process of a run met, or what it has that this one has not; no process goes on.
    #[error("rank {rank}: {reason}")]
    Rank {
        /// The number of that process.
        rank: usize,
        /// What it said, or what differs.
        reason: String,
    },

    /// A strength that the adapter cannot be applied with.
    #[error("strength {strength}: {reason}")]
    Strength {
        /// The strength asked for.
        strength: f64,
        /// Why it is refused, and what to do instead.
        reason: String,
    },
}

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The text that a reader can act on, as candle's own error has it: `main` and `unwrap` print this one.
impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// For `map_err`: what the operating system said of a file or folder.
    pub(crate) fn io(path: &Path) -> impl Fn(std::io::Error) -> Self + Copy {
        move |error| Self::Io {
            path: path.to_path_buf(),
            error,
        }
    }

    /// A file that is refused.
    pub(crate) fn file(file: &Path, reason: impl Into<String>) -> Self {
        Self::File {
            file: file.to_path_buf(),
            reason: reason.into(),
        }
    }

    /// A tensor of a layer, or what it is fed, of a shape that it cannot have.
    pub(crate) fn shape(
        layer: &str,
        what: &'static str,
        found: &[usize],
        expected: impl Into<String>,
    ) -> Self {
        Self::Shape {
            layer: layer.to_string(),
            what,
            found: found.to_vec(),
            expected: expected.into(),
        }
    }

    /// The same for a dtype.
    pub(crate) fn dtype(
        layer: &str,
        what: &'static str,
        found: candle_core::DType,
        expected: impl Into<String>,
    ) -> Self {
        Self::DType {
            layer: layer.to_string(),
            what,
            found,
            expected: expected.into(),
        }
    }

    /// An argument that a function cannot take.
    pub(crate) fn argument(
        function: &'static str,
        what: &'static str,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Argument {
            function,
            what,
            found: found.into(),
            expected: expected.into(),
        }
    }

    /// A field of a configuration that is out of its range.
    pub(crate) fn config(field: &'static str, found: impl ToString, expected: &str) -> Self {
        Self::Config {
            field,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Candle(error)
    }
}

/// Lets `?` carry an error of this crate through a function that answers candle's result, such as
/// [`candle_nn::Module::forward`].
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            // `Error::wrap` would print a backtrace into the text where one is enabled.
            other => Self::Wrapped(Box::new(other)),
        }
    }
}

fn near(names: &[String]) -> String {
    match names {
        [] => "the adapter has no layers".to_string(),
        names => format!("the nearest are `{}`", names.join("`, `")),
    }
}

fn listed(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!("; {}", near(names)),
    }
}

// Where nothing fits at all, nothing is left to go on with.
fn partly(count: usize, total: usize) -> &'static str {
    match count < total {
        true => " `allow_partial` goes on without them",
        false => "",
    }
}
