//! [`NameTable`]: where a checkpoint keeps the layers that adapters call by other names.
//!
//! Adapters of diffusion models speak the names of diffusers. The originals, ComfyUI, and candle's Flux and
//! Stable Diffusion 3.5 speak others, and keep q, k and v in one weight.
//!
//! | found | by | its modules begin with |
//! |---|---|---|
//! | Flux | `double_blocks.0.img_attn.qkv.weight`, and `img_mod` and `single_blocks` | `transformer.` |
//! | Stable Diffusion 3, 3.5 | `joint_blocks.0.x_block.attn.qkv.weight` | `transformer.` |
//! | Stable Diffusion 1, 2, XL | `input_blocks.0.0.weight`, and `middle_block` and `output_blocks` | `unet.` |
//! | CLIP | `cond_stage_model.`, `conditioner.embedders.N.`, `text_encoders.clip_l.` and `clip_g.` | `text_encoder.`, `text_encoder_2.` |
//! | OpenCLIP | `cond_stage_model.model.`, `conditioner.embedders.N.model.` | the same |
//! | T5 | `text_encoders.t5xxl.` | `text_encoder_3.`; beside Flux `text_encoder_2.` |
//!
//! Denoisers are found behind `model.diffusion_model.` and a few other prefixes, or behind none.

mod clip;
mod flux;
mod listed;
mod scope;
mod sd3;
mod unet;

use crate::error::{Error, Result};
use listed::Listed;
use scope::Scope;
use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

/// A layer inside a tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NamedRows {
    /// The layer, as adapters call it.
    pub module: String,
    /// Other names of it, from other tools or versions.
    pub aliases: Vec<String>,
    /// The rows of the tensor that are the rows of the layer, in the layer's order.
    pub rows: Vec<Range<usize>>,
    /// Whether the tensor is stored as `(in, out)`; `rows` are those of its transpose.
    pub transposed: bool,
}

/// From the tensors of a checkpoint to the layers that adapters name.
///
/// [`Merge`](super::Merge) and [`inspect`](super::inspect) look for one by the names of the checkpoint. Where
/// none fits, or another is needed, [`NameTable::load`] reads one from a file. An adapter that already speaks
/// the names of the checkpoint needs none, and none is used.
///
/// # Examples
///
/// ```
/// use candle_doft::merge::NameTable;
///
/// let names = [
///     "double_blocks.0.img_attn.qkv.weight",
///     "double_blocks.0.img_mod.lin.weight",
///     "single_blocks.0.linear1.weight",
/// ];
/// let table = NameTable::detect(names).expect("a Flux checkpoint");
/// assert_eq!(table.family(), "Flux");
/// let parts = table.parts("double_blocks.0.img_attn.qkv.weight", &[96, 32])?.expect("a known layer");
/// assert_eq!(parts[1].module, "transformer.transformer_blocks.0.attn.to_k");
/// assert_eq!(parts[1].rows, [32..64]);
/// # Ok::<(), candle_doft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct NameTable {
    family: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Known(Vec<Scope>),
    Listed(Listed),
}

/// Names of layers inside one tensor, and their rows.
type Layers = Vec<(String, Vec<Range<usize>>)>;

impl NameTable {
    /// The table of a checkpoint with these tensors, if its model is known. A checkpoint with the names of
    /// diffusers needs none.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_doft::merge::NameTable;
    ///
    /// assert!(NameTable::detect(["model.layers.0.self_attn.q_proj.weight"]).is_none());
    /// ```
    pub fn detect<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let names: HashSet<&str> = names.into_iter().collect();
        Self::probe(|name| names.contains(name))
    }

    /// The same, where it can only be asked whether there is a tensor of some name.
    pub(super) fn probe(has: impl Fn(&str) -> bool) -> Option<Self> {
        // Something that has every name, as `VarBuilder::zeros`, tells nothing.
        if has("a name that no checkpoint has") {
            return None;
        }
        let (family, scopes) = scope::find(&has)?;
        Some(Self {
            family: family.to_string(),
            kind: Kind::Known(scopes),
        })
    }

    /// A table from JSON:
    ///
    /// ```json
    /// {
    ///   "layers": {
    ///     "blocks.0.to_q": {"tensor": "blocks.0.qkv.weight", "rows": [[0, 64]]},
    ///     "blocks.0.to_k": {"tensor": "blocks.0.qkv.weight", "rows": [[64, 128]]},
    ///     "norm_out": {"tensor": "last.weight", "rows": [[64, 128], [0, 64]]},
    ///     "head": {"tensor": "projection", "transposed": true},
    ///     "proj_out": "out.weight"
    ///   },
    ///   "unnamed": ["vae."]
    /// }
    /// ```
    ///
    /// `layers` goes from a layer, as the adapter calls it (a prefix such as `unet.` or `lora_unet_` may be
    /// missing here or there), to the tensor, by its whole name. `rows` are the rows of the tensor that are
    /// those of the layer, `[from, to)` each, in the layer's order; without it all. A `transposed` tensor is
    /// stored as `(in, out)`. Every weight of the checkpoint with 2 to 4 axes has to be named, unless its name
    /// begins with one of `unnamed`.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if the text is not such JSON, names a layer twice, or gives a row to two layers.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_doft::merge::NameTable;
    ///
    /// let table = NameTable::from_json(r#"{"layers": {"head": "out.weight"}}"#)?;
    /// assert_eq!(table.parts("out.weight", &[8, 64])?.map(|p| p[0].module.clone()), Some("head".into()));
    /// assert!(NameTable::from_json(r#"{"layers": {"head": "a", "head": "b"}}"#).is_err());
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn from_json(text: &str) -> Result<Self> {
        let listed = Listed::parse(text);
        let listed = listed.map_err(|reason| {
            Error::argument(
                "NameTable::from_json",
                "the table",
                reason,
                listed::EXPECTED,
            )
        })?;
        Ok(Self::listed(listed, "the given table"))
    }

    /// A table from a file with the JSON of [`NameTable::from_json`].
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the file cannot be read, and [`Error::File`] if it is not such a table.
    ///
    /// # Examples
    ///
    /// ```
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let path = folder.path().join("names.json");
    /// use candle_doft::merge::NameTable;
    ///
    /// std::fs::write(&path, r#"{"layers": {"head": "out.weight"}}"#).unwrap();
    /// assert!(NameTable::load(&path)?.parts("out.weight", &[8, 64])?.is_some());
    /// # Ok::<(), candle_doft::Error>(())
    /// ```
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read(path).map_err(Error::io(path))?;
        let text = String::from_utf8(text)
            .map_err(|_| Error::file(path, "a table of names has to be JSON in UTF-8"))?;
        let listed = Listed::parse(&text).map_err(|reason| {
            let expected = listed::EXPECTED;
            Error::file(
                path,
                format!("a table of names: {reason}; expected {expected}"),
            )
        })?;
        Ok(Self::listed(
            listed,
            &format!("the table {}", path.display()),
        ))
    }

    fn listed(listed: Listed, family: &str) -> Self {
        Self {
            family: family.to_string(),
            kind: Kind::Listed(listed),
        }
    }

    /// What model it is for; of a table that was given, where it came from.
    pub fn family(&self) -> &str {
        &self.family
    }

    /// The layers that adapters name in a tensor of that shape; none where it names no layer in it.
    ///
    /// # Errors
    ///
    /// [`Error::Argument`] if a table that was given names rows that the tensor does not have.
    pub fn parts(&self, tensor: &str, shape: &[usize]) -> Result<Option<Vec<NamedRows>>> {
        if !(2..=4).contains(&shape.len()) {
            return Ok(None);
        }
        match &self.kind {
            Kind::Known(scopes) => {
                Ok(scope::of(scopes, tensor).and_then(|s| s.parts(tensor, shape)))
            }
            Kind::Listed(listed) => listed.parts(tensor, shape),
        }
    }

    /// Whether it should name a layer in that tensor, and does not: a weight with 2 to 4 axes of one of the
    /// models that it is for.
    pub(super) fn lacks(&self, tensor: &str, shape: &[usize]) -> Result<bool> {
        let covered = match &self.kind {
            Kind::Known(scopes) => scope::of(scopes, tensor).is_some(),
            Kind::Listed(listed) => listed.covers(tensor),
        };
        let weight = (2..=4).contains(&shape.len()) && tensor.ends_with(".weight");
        Ok(covered && weight && self.parts(tensor, shape)?.is_none())
    }
}

/// A layer that is a whole tensor.
fn one(name: impl Into<String>, rows: usize) -> Option<Layers> {
    Some(vec![(name.into(), cut(0, rows))])
}

/// A layer whose two halves stand the other way round: shift and scale, where diffusers has scale and
/// shift.
fn swapped(name: impl Into<String>, rows: usize) -> Option<Layers> {
    let half = rows / 2;
    let halves = vec![half..rows, 0..half];
    (half > 0 && rows.is_multiple_of(2)).then(|| vec![(name.into(), halves)])
}

/// Layers of equal size, one below the other, in the first `rows` of a tensor.
fn each<const N: usize>(parent: &str, names: [&str; N], rows: usize) -> Option<Layers> {
    let size = rows / N;
    let layer = |(i, name)| (format!("{parent}.{name}"), cut(i * size, (i + 1) * size));
    let fits = rows.is_multiple_of(N) && rows > 0;
    fits.then(|| names.into_iter().enumerate().map(layer).collect())
}

fn cut(from: usize, to: usize) -> Vec<Range<usize>> {
    std::iter::once(from..to).collect()
}

/// The number that a segment of a path is.
fn number(segment: &str) -> Option<usize> {
    let plain = segment.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| segment.parse().ok()).flatten()
}
