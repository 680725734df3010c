//! Extraction from files: shards, extra tensors, and what is refused.

use super::extract::{config, in_dtype, merge, options, save};
use super::support::tensors::{CPU, seeded};
use super::{Home, assert_same, listing, load, text};
use candle_core::{DType, Tensor};
use candle_doft::merge::extract;
use candle_doft::{DoftConfig, Map, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Without tensors that have no values.
fn filled(mut all: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    all.retain(|_, tensor| tensor.elem_count() > 0);
    all
}

#[test]
fn shards_extras_and_progress() -> Result<()> {
    let home = Home::new();
    let (base, tuned) = (home.path("base_folder"), home.path("tuned_folder"));
    std::fs::create_dir(&base).unwrap();
    std::fs::create_dir(&tuned).unwrap();
    let mut before = in_dtype(&home, DType::F32)?;
    for (name, shape) in [("none.weight", (0, 4)), ("thin.weight", (4, 0))] {
        before.insert(name.into(), Tensor::zeros(shape, DType::F32, &CPU)?);
    }
    save(&home.path("whole"), &before);
    let adapter = home.adapter_over(
        &home.path("whole"),
        "adapter",
        &["a", "conv"],
        config(),
        0.3,
        1,
    )?;
    merge(&adapter, &home.path("whole"), &home.path("merged"))?;
    let mut after = load(&home.path("merged"))?;
    after.insert("norm.weight".into(), (&after["norm.weight"] + 1.)?);
    after.insert("embed.weight".into(), (&after["embed.weight"] * 2.)?);
    after.insert("cls.bias".into(), seeded(3, 1).to_dtype(DType::F32)?);
    // Cut in different places, the index of one beside it.
    let parts = |all: &BTreeMap<String, Tensor>, folder: &Path, cut: &[&str]| {
        let (first, second): (BTreeMap<_, _>, BTreeMap<_, _>) = all
            .clone()
            .into_iter()
            .partition(|(name, _)| cut.contains(&name.as_str()));
        save(&folder.join("model-00001-of-00002.safetensors"), &first);
        save(&folder.join("model-00002-of-00002.safetensors"), &second);
        std::fs::write(folder.join("model.safetensors.index.json"), "{}").unwrap();
    };
    parts(&before, &base, &["a.weight", "norm.weight"]);
    parts(&after, &tuned, &["conv.weight", "a.weight", "cls.bias"]);
    let output = home.path("found");
    let mut seen = Vec::new();
    let mut progress = |done: u64, total: u64| seen.push((done, total));
    let mut how = options(config());
    how.extras = true;
    how.progress = Some(&mut progress);
    let done = extract(&base, &tuned, &output, how)?;
    assert_eq!(seen.len(), before.len());
    assert!(seen.is_sorted() && seen.last().is_some_and(|(done, total)| done == total));
    let paths: Vec<&str> = done
        .layers
        .iter()
        .map(|layer| layer.path.as_str())
        .collect();
    assert_eq!((paths.as_slice(), done.unchanged), (&["a", "conv"][..], 3));
    let left: Vec<(&str, bool)> = done
        .left
        .iter()
        .map(|l| (l.name.as_str(), l.kept))
        .collect();
    assert_eq!(
        left,
        [
            ("cls.bias", true),
            ("embed.weight", true),
            ("norm.weight", true)
        ]
    );
    merge(&output, &home.path("whole"), &home.path("again"))?;
    assert_same(
        "with extras",
        &filled(load(&home.path("again"))?),
        &filled(after.clone()),
        1e-6,
    );
    let done = extract(&base, &tuned, &output, options(config()))?;
    assert!(done.left.iter().all(|left| !left.kept));
    assert!(
        load(&output)?
            .keys()
            .all(|key| !key.starts_with("doft_extra."))
    );
    // Extras alone.
    for name in ["a.weight", "conv.weight"] {
        after.insert(name.into(), before[name].clone());
    }
    parts(&after, &tuned, &[]);
    let said = text(extract(&base, &tuned, home.path("no"), options(config())));
    assert!(
        said.contains("nothing to extract: no target") && said.contains("`--extras` keeps them"),
        "{said}"
    );
    let mut how = options(config());
    how.extras = true;
    let done = extract(&base, &tuned, &output, how)?;
    assert!(done.layers.is_empty() && load(&output)?.len() == 3);
    Ok(())
}

#[test]
fn wrong_input_is_one_line_and_nothing_is_left_behind() -> Result<()> {
    let home = Home::new();
    let (tuned, output) = (home.path("tuned"), home.path("no"));
    let base = load(&home.base())?;
    let (b, o) = (home.base(), output.clone());
    let run = |after: &BTreeMap<String, Tensor>, config: DoftConfig| -> String {
        save(&tuned, after);
        let before = listing(&home);
        let said = text(extract(&b, &tuned, &o, options(config)));
        assert_eq!(listing(&home), before);
        said
    };
    let with = |name: &str, tensor: Tensor| {
        let mut all = base.clone();
        all.insert(name.to_string(), tensor);
        all
    };
    let said = run(&base, config());
    assert!(
        said.ends_with("nothing to extract: it holds the same values as the base"),
        "{said}"
    );
    let mut missing = base.clone();
    missing.remove("b.weight");
    let said = run(&missing, config());
    assert!(
        said.contains("tuned: it lacks `b.weight` of the base"),
        "{said}"
    );
    let said = run(&with("conv.weight", seeded((48, 4, 4), 1)), config());
    assert!(
        said.contains("`conv.weight` has shape [48, 4, 4], expected [48, 4, 4, 2]"),
        "{said}"
    );
    let said = run(&with("norm.weight", seeded(11, 1)), config());
    assert!(
        said.contains("`norm.weight` has shape [11], expected [12]"),
        "{said}"
    );
    for (name, bad) in [("a.weight", f64::NAN), ("norm.weight", f64::INFINITY)] {
        let mut all = base.clone();
        all.insert("b.weight".into(), (&base["b.weight"] * 2.)?);
        let broken = (&base[name] * bad)?;
        all.insert(name.into(), broken);
        let said = run(&all, config());
        assert!(
            said.contains("tuned: `") && said.contains(&format!("`{name}` holds a NaN")),
            "{said}"
        );
    }
    let whole = Tensor::ones((24, 16), DType::U32, &CPU)?;
    let said = run(&with("b.weight", whole), config());
    assert!(
        said.contains("tuned: `b.weight` has dtype U32, expected F64"),
        "{said}"
    );
    let other = with("a.weight", (&base["a.weight"] * 2.)?);
    let said = run(&other, config().with_targets("q_proj"));
    assert!(said.contains("targets `q_proj` matches no layer"), "{said}");
    let said = run(&other, config().with_map(Map::Exponential));
    assert!(
        said.contains("`map` is exponential, expected cayley"),
        "{said}"
    );
    assert!(run(&other, config().with_max_norm(0.5)).contains("`max_norm`"));
    // One that both have, outside the targets, is nobody's business.
    let mut broken = base.clone();
    broken.insert("norm.weight".into(), (&base["norm.weight"] * f64::NAN)?);
    save(&home.path("broken"), &broken);
    broken.insert("a.weight".into(), other["a.weight"].clone());
    save(&tuned, &broken);
    extract(
        home.path("broken"),
        &tuned,
        home.path("fine"),
        options(config()),
    )?;
    save(&tuned, &other);
    // A NaN in the base.
    save(
        &home.path("nan"),
        &with("a.weight", (&base["a.weight"] * f64::NAN)?),
    );
    let said = text(extract(
        home.path("nan"),
        &tuned,
        &output,
        options(config()),
    ));
    assert!(said.contains("nan: `a.weight` holds a NaN"), "{said}");
    let said = text(extract(
        home.base(),
        home.path("none"),
        &output,
        options(config()),
    ));
    assert!(said.contains("none"), "{said}");
    std::fs::write(
        home.path("cut"),
        &std::fs::read(home.base()).unwrap()[..1000],
    )
    .unwrap();
    let said = text(extract(
        home.base(),
        home.path("cut"),
        &output,
        options(config()),
    ));
    assert!(said.contains("not a whole safetensors file"), "{said}");
    // Where it is to be written.
    for (output, part) in [
        (home.base(), "it is one of the checkpoints"),
        (home.path(""), "it is a folder"),
        (home.path("lost").join("a"), "does not exist; make it first"),
    ] {
        let said = text(extract(home.base(), &tuned, output, options(config())));
        assert!(said.contains(part), "{said}");
    }
    assert!(!output.exists());
    let fine = extract(home.base(), &tuned, &output, options(config()))?;
    assert_eq!(fine.layers.len(), 1);
    Ok(())
}
