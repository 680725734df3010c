//! The adapter file: what is saved comes back, equal adapters give equal bytes, a bad file changes
//! nothing and says why.

mod support;

use candle_core::{DType, Tensor, Var};
use candle_doft::config::Rule;
use candle_doft::file::LoadOptions;
use candle_doft::{
    Adapter, AdapterBuilder, DoftConfig, DoftLinear, Magnitude, Map, Result, rng::SplitMix64,
};
use candle_nn::{Linear, Module};
use std::path::{Path, PathBuf};
use support::MAPS;
use support::tensors::{CPU, bits, disturb_all, linear, relative, seeded};

/// A model of two adapted layers, a frozen one and an extra tensor, away from its start.
struct Model {
    adapter: Adapter,
    q: DoftLinear,
    v: DoftLinear,
    head: Var,
}

fn base(out: usize, width: usize, dtype: DType) -> Linear {
    linear(out, width, true, dtype).unwrap()
}

fn build(builder: AdapterBuilder, dtype: DType) -> Result<Model> {
    let q = builder.wrap("blocks.0.q", base(48, 64, dtype))?;
    let v = builder.wrap("blocks.0.v", base(12, 48, dtype))?;
    builder.wrap("norm", base(4, 64, dtype))?;
    let head = builder.extra("head.weight", &Tensor::zeros((3, 4), DType::F32, &CPU)?)?;
    Ok(Model {
        adapter: builder.finish()?,
        q,
        v,
        head,
    })
}

fn config() -> DoftConfig {
    DoftConfig::default()
        .with_block_size(16)
        .with_exclude(["norm"])
}

fn trained(config: DoftConfig, dtype: DType) -> Result<Model> {
    let model = build(Adapter::builder(config, &CPU)?, dtype)?;
    disturb_all(model.adapter.vars(), 0.3)?;
    Ok(model)
}

fn x(dtype: DType) -> Tensor {
    seeded((5, 64), 99).to_dtype(dtype).unwrap()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("adapter.safetensors")
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

fn header(bytes: &[u8]) -> serde_json::Value {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    serde_json::from_slice(&bytes[8..8 + length]).unwrap()
}

/// The file with its header changed as text, of whatever length.
fn edited(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    let text = text.replace(from, to);
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out.extend(&bytes[8 + length..]);
    out
}

fn error_of(path: &Path) -> String {
    let error = Adapter::load(path, &CPU).expect_err("a file that should be refused");
    error
        .to_string()
        .replace(&path.display().to_string(), "FILE")
}

#[test]
fn what_is_saved_comes_back_for_every_setting() -> Result<()> {
    let series = |terms, last_coefficient| Map::CayleyNeumann {
        terms,
        last_coefficient,
    };
    let plain = MAPS.map(|map| config().with_map(map));
    let configs = [
        config().with_map(Map::Exponential).with_scaled(false),
        config().with_map(Map::SERIES).with_max_norm(0.95),
        config()
            .with_map(series(7, 2))
            .with_magnitude(Magnitude::Factor),
        config()
            .with_magnitude(Magnitude::Absolute)
            .with_block_share(true),
        config().with_magnitude(Magnitude::None).with_max_norm(0.3),
        config()
            .with_max_norm(0.5)
            .with_rule(
                Rule::new("v")
                    .with_block_size(8)
                    .with_map(Map::SERIES)
                    .with_max_norm(0.),
            )
            .with_rule(
                Rule::new("q")
                    .with_magnitude(Magnitude::Absolute)
                    .with_scaled(false),
            ),
    ];
    for dtype in [DType::F32, DType::F64] {
        for config in plain.iter().chain(&configs) {
            let folder = Folder::new();
            let model = trained(config.clone(), dtype)?;
            model.adapter.save(folder.file())?;
            let loaded = build(Adapter::load(folder.file(), &CPU)?, dtype)?;
            let what = format!("{dtype:?} {config:?}");
            assert_eq!(loaded.adapter.warnings(), [], "{what}");
            let exact = config.magnitude != Magnitude::Factor;
            let pairs = model
                .adapter
                .named_vars()
                .into_iter()
                .zip(loaded.adapter.named_vars());
            for ((name, before), (again, after)) in pairs {
                assert_eq!(name, again, "{what}");
                assert_eq!(before.dtype(), after.dtype(), "{what}");
                match exact || !name.contains("dora") {
                    true => assert_eq!(bits(&before), bits(&after), "{what}: {name}"),
                    false => assert!(relative(&after, &before) < 3e-7, "{what}: {name}"),
                }
            }
            for (before, after) in [(&model.q, &loaded.q), (&model.v, &loaded.v)] {
                assert_eq!(before.layout(), after.layout(), "{what}");
                assert!(relative(&after.effective_weight()?, &before.effective_weight()?) < 3e-7);
            }
            assert_eq!(bits(&model.head), bits(&loaded.head));
            if exact {
                assert_eq!(
                    bits(&model.q.forward(&x(dtype))?),
                    bits(&loaded.q.forward(&x(dtype))?)
                );
            }
        }
    }
    Ok(())
}

#[test]
fn equal_adapters_give_equal_bytes_and_saving_a_loaded_one_changes_none() -> Result<()> {
    let folder = Folder::new();
    let saved = |model: &Model| -> Result<Vec<u8>> {
        model.adapter.save(folder.file())?;
        Ok(std::fs::read(folder.file()).unwrap())
    };
    let first = saved(&trained(config(), DType::F32)?)?;
    assert_eq!(first, saved(&trained(config(), DType::F32)?)?);
    let loaded = build(Adapter::load(folder.file(), &CPU)?, DType::F32)?;
    assert_eq!(first, saved(&loaded)?);
    assert_eq!(
        folder.names(),
        ["adapter.safetensors"],
        "nothing else is left"
    );
    Ok(())
}

#[test]
fn the_file_is_the_one_of_the_format() -> Result<()> {
    let folder = Folder::new();
    let builder = Adapter::builder(DoftConfig::default().with_block_size(16), &CPU)?;
    builder.wrap("blocks.0.q", base(48, 64, DType::F32))?;
    let adapter = builder.finish()?;
    adapter.save(folder.file())?;
    let header = header(&std::fs::read(folder.file()).unwrap());
    let places = [
        ("blocks.0.q.dora_log_multiplier", "[48]", "[0,192]"),
        ("blocks.0.q.oft_R.cans_oft", "[]", "[192,196]"),
        ("blocks.0.q.oft_R.scaled_oft", "[]", "[196,200]"),
        ("blocks.0.q.oft_R.weight", "[4,120]", "[200,2120]"),
    ];
    for (name, shape, offsets) in places {
        assert_eq!(header[name]["dtype"], "F32", "{name}");
        assert_eq!(header[name]["shape"].to_string(), shape, "{name}");
        assert_eq!(header[name]["data_offsets"].to_string(), offsets, "{name}");
    }
    let metadata = &header["__metadata__"];
    assert_eq!(
        (&metadata["format"], &metadata["format_version"]),
        (&"doft".into(), &"1".into())
    );
    let config: serde_json::Value =
        serde_json::from_str(metadata["doft_config"].as_str().unwrap()).unwrap();
    assert_eq!(
        (&config["map"], &config["magnitude"]),
        (&"cayley".into(), &"log".into())
    );
    assert_eq!(config["max_norm"], serde_json::Value::Null);
    // candle's own loader reads it as well: no BOOL tensor.
    assert_eq!(
        candle_core::safetensors::load(folder.file(), &CPU)?.len(),
        4
    );
    Ok(())
}

#[test]
fn a_failed_save_leaves_the_old_file() -> Result<()> {
    let folder = Folder::new();
    let model = trained(config(), DType::F32)?;
    model.adapter.save(folder.file())?;
    let before = std::fs::read(folder.file()).unwrap();
    let (name, var) = model.adapter.named_vars().remove(1);
    let mut values: Vec<f32> = var.flatten_all()?.to_vec1()?;
    values[3] = f32::NAN;
    var.set(&Tensor::from_vec(values, var.shape(), &CPU)?)?;
    let error = model.adapter.save(folder.file()).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("`{name}` holds NaN at index 3; nothing was saved")
    );
    assert_eq!(std::fs::read(folder.file()).unwrap(), before);
    let nowhere = folder.0.path().join("missing").join("adapter.safetensors");
    let error = trained(config(), DType::F32)?
        .adapter
        .save(&nowhere)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with(&format!("{}: ", nowhere.display())),
        "{error}"
    );
    assert_eq!(folder.names(), ["adapter.safetensors"]);
    Ok(())
}

#[test]
fn a_model_that_does_not_fit_is_told_before_any_layer_changes() -> Result<()> {
    let folder = Folder::new();
    trained(config(), DType::F32)?.adapter.save(folder.file())?;
    let load = || Adapter::load(folder.file(), &CPU);
    let cut = |error: candle_doft::Error| {
        error
            .to_string()
            .replace(&folder.file().display().to_string(), "FILE")
    };
    let error = load()?
        .wrap("blocks.0.q", base(48, 32, DType::F32))
        .unwrap_err();
    assert_eq!(
        cut(error),
        "FILE: tensor `blocks.0.q.oft_R.weight` has a base weight [48, 64] on record, \
         expected [48, 32] of `blocks.0.q.weight`; is this the model it was trained on?"
    );
    // A model that asks for less than the file holds.
    let builder = load()?;
    builder.wrap("blocks.0.q", base(48, 64, DType::F32))?;
    builder.wrap("blocks.0.w", base(12, 48, DType::F32))?;
    assert_eq!(
        cut(builder.finish().unwrap_err()),
        "FILE: 2 of 3 layers and extra tensors match nothing in the model, the first is \
         `blocks.0.v`; the nearest are `blocks.0.q`, `blocks.0.w`; is this the model it was trained \
         on? `allow_partial` goes on without them"
    );
    let error = load()?.extra("head.weight", &Tensor::zeros((4, 4), DType::F32, &CPU)?);
    assert!(error.unwrap_err().to_string().contains("`head.weight`"));
    Ok(())
}

#[test]
fn another_base_is_refused_unless_allowed() -> Result<()> {
    let folder = Folder::new();
    trained(config(), DType::F32)?.adapter.save(folder.file())?;
    let other = Linear::new((base(48, 64, DType::F32).weight() * 1.1)?, None);
    let builder = Adapter::load(folder.file(), &CPU)?;
    let error = builder.wrap("blocks.0.q", other.clone()).unwrap_err();
    let expected = "adapter.safetensors: `blocks.0.q` is not the base weight it was trained on, by its row \
                    norms; `allow_changed_base` uses it all the same";
    assert!(error.to_string().ends_with(expected), "{error}");
    let allowed = LoadOptions::default().with_allow_changed_base(true);
    let builder = Adapter::load_with(folder.file(), &CPU, &allowed)?;
    assert!(builder.wrap("blocks.0.q", other)?.is_adapted());
    Ok(())
}

#[test]
fn a_file_that_contradicts_itself_is_refused_with_the_reason() -> Result<()> {
    let folder = Folder::new();
    trained(config(), DType::F32)?.adapter.save(folder.file())?;
    let good = std::fs::read(folder.file()).unwrap();
    let metadata = r#"layer `blocks.0.q`: "#;
    for (from, to, expected) in [
        (
            "blocks.0.q.oft_R.cans_oft",
            "blocks.0.q.oft_R.cans_off",
            "1 unexpected keys".to_string(),
        ),
        (
            "blocks.0.q.oft_R.scaled_oft",
            "blocks.0.q.oft_embedding_R.scaled_oft",
            format!("{metadata}it has `oft_embedding_R.scaled_oft` beside `oft_R.weight`"),
        ),
        (
            "blocks.0.q.oft_R.weight",
            "blocks.0.p.oft_R.weight",
            "layer `blocks.0.p`: ".into(),
        ),
        (
            "blocks.0.q.dora_log_multiplier",
            "blocks.0.q.dora_multiplier",
            format!("{metadata}its magnitude is Log, the file has `dora_multiplier`"),
        ),
        (
            r#"\"scaled\":true"#,
            r#"\"scaled\":false"#,
            format!("{metadata}the marker `scaled_oft` contradicts its `scaled`"),
        ),
        (
            r#"\"map\":\"cayley\""#,
            r#"\"map\":\"exponential\""#,
            format!("{metadata}the marker `cans_oft` contradicts its `map`"),
        ),
        (
            r#"\"max_norm\":null"#,
            r#"\"max_norm\":0.5"#,
            format!("{metadata}by its `max_norm` it needs the marker `clipped_oft`"),
        ),
        (
            r#""format_version":"1""#,
            r#""format_version":"2""#,
            "format version 2, this crate reads 1; it was written by candle-doft 0.1.0".into(),
        ),
        (
            r#"\"scaled\":"#,
            r#"\"scald\":"#,
            "`doft_config` lacks `scaled`".into(),
        ),
        (
            r#"\"dropout\":0.0"#,
            r#"\"dropout\":7.0"#,
            "`doft_config`: config: `dropout` is 7".into(),
        ),
        (
            r#"\"blocks.0.v\":"#,
            r#"\"blocks.0.y\":"#,
            "`doft_layers` names `blocks.0.y`, of which it holds no tensors".into(),
        ),
        (
            "[4,120]",
            "[1,480]",
            "tensor `blocks.0.q.oft_R.weight` has shape [1, 480], expected".into(),
        ),
        (
            r#"\"shape\":[48,64]"#,
            r#"\"shape\":[]"#,
            format!("{metadata}its `shape` is [], which no such layer has"),
        ),
        (
            r#"\"shape\":[48,64]"#,
            r#"\"shape\":[48,64,1,1]"#,
            format!("{metadata}its `shape` is [48, 64, 1, 1]"),
        ),
        (
            r#"\"shape\":[48,64]"#,
            r#"\"shape\":[48,18446744073709551615]"#,
            format!("{metadata}its `shape` is [48, 18446744073709551615]"),
        ),
        (
            r#"\"shape\":[48,64]"#,
            r#"\"shape\":[48,128]"#,
            "`blocks.0.q.oft_R.weight` has 4 rows of block size 16, expected 8 or 1".into(),
        ),
        (
            r#"\"kind\":\"linear\",\"shape\":[48,64]"#,
            r#"\"map\":{\"cayley_neumann\":{\"terms\":65,\"last_coefficient\":1}}"#,
            "`doft_layers` of `blocks.0.q`: config: `map.terms` is 65".into(),
        ),
        (
            r#"{"dtype":"F32","shape":[4,120]"#,
            r#"{"dtype":"I32","shape":[4,120]"#,
            "dtype I32".into(),
        ),
    ] {
        std::fs::write(folder.file(), edited(&good, from, to)).unwrap();
        let error = error_of(&folder.file());
        assert!(
            error.starts_with("FILE: ") && error.contains(&expected),
            "{from}: {error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
    Ok(())
}

#[test]
fn an_unknown_field_of_the_configuration_is_a_warning() -> Result<()> {
    let folder = Folder::new();
    trained(config(), DType::F32)?.adapter.save(folder.file())?;
    let good = std::fs::read(folder.file()).unwrap();
    let newer = edited(&good, r#"\"seed\":0"#, r#"\"seed\":0,\"spin\":1"#);
    std::fs::write(folder.file(), newer).unwrap();
    let warnings = Adapter::load(folder.file(), &CPU)?.warnings();
    assert_eq!(warnings.len(), 1);
    assert_eq!(warnings[0].subject, "spin");
    Ok(())
}

#[test]
fn a_value_that_is_not_finite_is_refused() -> Result<()> {
    let folder = Folder::new();
    trained(config(), DType::F32)?.adapter.save(folder.file())?;
    let mut bytes = std::fs::read(folder.file()).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(folder.file(), bytes).unwrap();
    let error = error_of(&folder.file());
    assert!(error.contains("has inf at index"), "{error}");
    Ok(())
}

#[test]
fn a_file_cut_anywhere_or_with_bytes_changed_never_panics() -> Result<()> {
    let folder = Folder::new();
    let builder = Adapter::builder(DoftConfig::default().with_block_size(4), &CPU)?;
    builder.wrap("q", base(3, 8, DType::F32))?;
    let adapter = builder.finish()?;
    adapter.save(folder.file())?;
    let good = std::fs::read(folder.file()).unwrap();
    for length in 0..good.len() {
        std::fs::write(folder.file(), &good[..length]).unwrap();
        assert!(error_of(&folder.file()).starts_with("FILE: not a whole safetensors file"));
    }
    let mut rng = SplitMix64::new(5);
    let mut refused = 0;
    for _ in 0..3000 {
        let mut bytes = good.clone();
        for _ in 0..=rng.below(3) {
            let place = rng.below(bytes.len());
            bytes[place] = rng.next_u64() as u8;
        }
        std::fs::write(folder.file(), &bytes).unwrap();
        refused += usize::from(Adapter::load(folder.file(), &CPU).is_err());
    }
    assert!(refused > 1000, "only {refused} of 3000 were noticed");
    // Lengths that promise more than there is.
    for length in [u64::MAX, 1 << 40, good.len() as u64] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        std::fs::write(folder.file(), &bytes).unwrap();
        error_of(&folder.file());
    }
    error_of(folder.0.path());
    error_of(&folder.0.path().join("missing"));
    Ok(())
}

#[test]
fn a_file_without_its_metadata_reads_by_its_markers() -> Result<()> {
    for map in MAPS {
        let folder = Folder::new();
        let model = trained(config().with_map(map), DType::F32)?;
        model.adapter.save(folder.file())?;
        let good = std::fs::read(folder.file()).unwrap();
        let other = edited(&good, r#""format":"doft""#, r#""format":"pt""#);
        std::fs::write(folder.file(), other).unwrap();
        let loaded = build(Adapter::load(folder.file(), &CPU)?, DType::F32)?;
        let (ours, theirs) = (&model.q, &loaded.q);
        let x = x(DType::F32);
        assert!(
            bits(&ours.forward(&x)?) == bits(&theirs.forward(&x)?),
            "{map}"
        );
        assert_eq!(bits(&model.head), bits(&loaded.head));
    }
    Ok(())
}
