//! Adapters one after the other, as one.

use super::support::golden::golden;
use super::support::tensors::{CPU, bits, values};
use super::{Home, assert_same, f64_config, listing, load, seeded, text};
use candle_core::{DType, Tensor};
use candle_doft::file::{Changes, Combination, LoadOptions, Target, combine};
use candle_doft::merge::weight_shapes;
use candle_doft::{Adapter, DoftConfig, Magnitude, Map, Result};
use candle_nn::Linear;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn product(home: &Home, adapters: &[&Path], to: &str) -> Result<PathBuf> {
    let (output, options) = (home.path(to), LoadOptions::default());
    combine(
        adapters,
        &Combination::Product,
        &output,
        &options,
        &BTreeMap::new(),
    )?;
    Ok(output)
}

/// With a magnitude for embeddings as well.
fn config() -> DoftConfig {
    f64_config().with_embedding_magnitude(Magnitude::Log)
}

#[test]
fn a_product_is_what_merging_in_that_order_gives() -> Result<()> {
    let home = Home::new();
    let second = [
        config(),
        config().with_block_size(4),
        config().with_block_size(16),
        config().with_block_share(true),
        config().with_map(Map::Exponential).with_max_norm(0.3),
        config().with_magnitude(Magnitude::Absolute),
        config().with_magnitude(Magnitude::None).with_scaled(false),
    ];
    let a = home.adapter("a", config(), 0.3, 0)?;
    let shared = home.adapter("shared", config().with_block_share(true), 0.3, 3)?;
    for (at, second) in second.into_iter().enumerate() {
        let b = home.adapter("b", second, 0.2, 2)?;
        for first in [&a, &shared] {
            let both = product(&home, &[first, &b], "both")?;
            let expected = home.merged(&[first, &b])?;
            assert_same(
                &format!("case {at}"),
                &home.merged(&[&both])?,
                &expected,
                1e-12,
            );
            let reverse = product(&home, &[&b, first], "reverse")?;
            let expected = home.merged(&[&b, first])?;
            assert_same(
                &format!("case {at}, reverse"),
                &home.merged(&[&reverse])?,
                &expected,
                1e-12,
            );
        }
    }
    // In f32, within its rounding.
    let rounded = |from: &Path, to: &str| -> Result<PathBuf> {
        let bytes = std::fs::read(from).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = load(from)?.into_iter();
        let tensors: Vec<(String, Tensor)> = tensors
            .map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?)))
            .collect::<Result<_>>()?;
        safetensors::serialize_to_file(tensors, header.metadata().clone(), &home.path(to)).unwrap();
        Ok(home.path(to))
    };
    let b = home.adapter("b", config().with_block_size(16), 0.2, 2)?;
    let (a, b) = (rounded(&a, "a32")?, rounded(&b, "b32")?);
    let both = product(&home, &[&a, &b], "both")?;
    assert_eq!(load(&both)?["a.oft_R.weight"].dtype(), DType::F32);
    assert_same(
        "f32",
        &home.merged(&[&both])?,
        &home.merged(&[&a, &b])?,
        1e-6,
    );
    Ok(())
}

#[test]
fn products_are_associative_and_an_adapter_with_its_inverse_is_nothing() -> Result<()> {
    let home = Home::new();
    let a = home.adapter("a", config(), 0.3, 0)?;
    let b = home.adapter("b", config().with_map(Map::Exponential), 0.2, 1)?;
    let c = home.adapter("c", config().with_block_size(16), 0.2, 2)?;
    let left = product(&home, &[&product(&home, &[&a, &b], "ab")?, &c], "left")?;
    let right = product(&home, &[&a, &product(&home, &[&b, &c], "bc")?], "right")?;
    let at_once = product(&home, &[&a, &b, &c], "once")?;
    let expected = load(&left)?;
    for other in [right, at_once] {
        for (name, tensor) in load(&other)? {
            let off = values(&tensor)
                .iter()
                .zip(values(&expected[&name]))
                .map(|(a, b)| (a - b).abs())
                .fold(0., f64::max);
            assert!(off < 1e-11, "{name}: {off:e}");
        }
    }
    for adapter in [&a, &b] {
        let (undo, _) = home.convert(
            adapter,
            "undo",
            Target::Doft,
            Changes::default().with_strength(-1.),
        )?;
        for nothing in [
            product(&home, &[adapter, &undo], "one")?,
            product(&home, &[&undo, adapter], "two")?,
        ] {
            for (name, tensor) in load(&nothing)? {
                let marker = name.ends_with("scaled_oft") || name.ends_with("cans_oft");
                let most = values(&tensor)
                    .iter()
                    .fold(0f64, |most, v| most.max(v.abs()));
                assert!(marker || most < 1e-13, "{name}: {most:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_layer_that_only_one_has_stays_to_the_bit() -> Result<()> {
    let home = Home::new();
    let a = home.adapter_of("a", &["a", "conv"], config(), 0.3, 0)?;
    let series = config().with_map(Map::SERIES);
    let b = home.adapter_of("b", &["b"], series, 0.3, 0)?;
    let both = load(&product(&home, &[&a, &b], "both")?)?;
    let (a, b) = (load(&a)?, load(&b)?);
    assert_eq!(both.len(), a.len() + b.len());
    for (name, tensor) in a.into_iter().chain(b) {
        assert_eq!(bits(&tensor), bits(&both[&name]), "{name}");
    }
    Ok(())
}

#[test]
fn names_of_other_tools_meet_and_the_base_tells_kernels() -> Result<()> {
    let home = Home::new();
    let golden = golden("onetrainer/oft_scaled_bool");
    let (base, source) = (
        golden.join("base.safetensors"),
        golden.join("adapter.safetensors"),
    );
    let (shapes, options) = (weight_shapes(&base)?, LoadOptions::default());
    let output = home.path("twice");
    let mended = Changes::default().with_projection(true);
    let cayley = home.path("cayley");
    candle_doft::file::convert_with(&source, &cayley, Target::Doft, &options, &shapes, &mended)?;
    let merged = |adapters: &[&Path]| -> Result<BTreeMap<String, Tensor>> {
        let mut merge = candle_doft::merge::Merge::new();
        for adapter in adapters {
            merge = merge.with_file(adapter, &options, Default::default())?;
        }
        merge.checkpoint(&base, home.path("m"), Default::default())?;
        Ok(load(&home.path("m"))?)
    };
    combine(
        &[&cayley, &cayley],
        &Combination::Product,
        &output,
        &options,
        &shapes,
    )?;
    assert_same(
        "golden",
        &merged(&[&output])?,
        &merged(&[&cayley, &cayley])?,
        1e-6,
    );
    let refused = |adapters: &[&PathBuf], shapes| {
        text(combine(
            adapters,
            &Combination::Product,
            home.path("no"),
            &options,
            shapes,
        ))
    };
    let said = refused(&[&cayley, &source], &shapes);
    assert!(
        said.contains("has the series for its map, which is not orthogonal; project it first"),
        "{said}"
    );
    let said = refused(&[&source, &source], &BTreeMap::new());
    assert!(
        said.contains("may be a kernel") && said.contains("give the base"),
        "{said}"
    );
    assert!(!home.path("no").exists());
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_name_and_nothing_is_written() -> Result<()> {
    let home = Home::new();
    let options = LoadOptions::default();
    let a = home.adapter_of("a", &["a"], config(), 0.3, 0)?;
    let head = |name: &str,
                shape: (usize, usize),
                seed: u64,
                config: DoftConfig,
                v: f64|
     -> Result<PathBuf> {
        let builder = Adapter::builder(config, &CPU)?;
        builder.wrap("a", Linear::new(seeded(shape, seed), None))?;
        let adapter = builder.finish()?;
        let theta = &adapter.rotation_vars()[0];
        theta.set(&(theta.ones_like()? * v)?)?;
        adapter.save(home.path(name))?;
        Ok(home.path(name))
    };
    let other = head("other", (40, 32), 9, config(), 0.1)?;
    let wide = head("wide", (40, 64), 1, config(), 0.1)?;
    let blocks = head("blocks", (40, 32), 1, config().with_block_size(32), 0.1)?;
    let plane = config().with_block_size(2).with_scaled(false);
    let quarter = head("quarter", (40, 32), 1, plane.clone(), 1.)?;
    let before = listing(&home);
    let run = |adapters: &[&PathBuf]| {
        combine(
            adapters,
            &Combination::Product,
            home.path("no"),
            &options,
            &BTreeMap::new(),
        )
    };
    for (adapters, parts) in [
        (
            vec![&a, &other],
            [
                "layer `a` was trained on another base weight",
                "`allow_changed_base`",
            ],
        ),
        (
            vec![&a, &wide],
            ["layer `a` is of shape [40, 64]", "but [40, 32]"],
        ),
        (
            vec![&quarter, &quarter],
            ["layer `a` would turn a plane by 180 degrees", "Cayley map"],
        ),
        (vec![&a], ["number of adapters is 1", "two or more"]),
    ] {
        let said = text(run(&adapters));
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    }
    assert_eq!(listing(&home), before);
    // As another tool would save them: nothing but the tensors tells the width.
    let bare = |name: &str, width: usize, b: usize| -> Result<PathBuf> {
        let builder = Adapter::builder(config().with_block_size(b), &CPU)?;
        builder.wrap("b", Linear::new(seeded((24, width), 1), None))?;
        builder.finish()?.save(home.path(name))?;
        let mut tensors = load(&home.path(name))?;
        // Of known kind by its magnitude.
        let log = tensors.remove("b.dora_log_multiplier").unwrap();
        tensors.insert("b.dora_multiplier".into(), log.exp()?.reshape(((), 1))?);
        let tensors: std::collections::HashMap<_, _> = tensors.into_iter().collect();
        candle_core::safetensors::save(&tensors, home.path(name))?;
        Ok(home.path(name))
    };
    let (wide, narrow) = (bare("wide", 16, 4)?, bare("narrow", 12, 3)?);
    let said = text(run(&[&wide, &narrow]));
    assert!(
        said.contains("layer `b` has the input width 12, but 16"),
        "{said}"
    );
    assert!(!home.path("no").exists());
    let mut allowed = options.clone();
    allowed.allow_changed_base = true;
    let output = home.path("allowed");
    let warnings = combine(
        &[&a, &other],
        &Combination::Product,
        &output,
        &allowed,
        &BTreeMap::new(),
    )?;
    assert!(
        warnings
            .iter()
            .any(|w| w.message.contains("another base weight"))
    );
    // Block sizes of which one divides the other do.
    run(&[&a, &blocks])?;
    let six = {
        let builder = Adapter::builder(config().with_block_size(6), &CPU)?;
        builder.wrap("x", Linear::new(seeded((4, 24), 1), None))?;
        builder.finish()?.save(home.path("six"))?;
        home.path("six")
    };
    let four = {
        let builder = Adapter::builder(config().with_block_size(4), &CPU)?;
        builder.wrap("x", Linear::new(seeded((4, 24), 1), None))?;
        builder.finish()?.save(home.path("four"))?;
        home.path("four")
    };
    let said = text(run(&[&six, &four]));
    assert!(
        said.contains("layer `x` has blocks of size 4, another adapter of 6, and neither divides"),
        "{said}"
    );
    Ok(())
}

#[test]
fn of_extra_tensors_the_last_counts_as_in_merges() -> Result<()> {
    let home = Home::new();
    let with = |name: &str, extra: &Tensor| -> Result<PathBuf> {
        let builder = Adapter::builder(config(), &CPU)?;
        builder.wrap(
            "a",
            Linear::new(load(&home.base())?["a.weight"].clone(), None),
        )?;
        builder.extra("norm.weight", extra)?;
        builder.finish()?.save(home.path(name))?;
        Ok(home.path(name))
    };
    let (a, b) = (with("a", &seeded(12, 1))?, with("b", &seeded(12, 2))?);
    let both = product(&home, &[&a, &b], "both")?;
    assert_same(
        "extras",
        &home.merged(&[&both])?,
        &home.merged(&[&a, &b])?,
        1e-12,
    );
    let c = with("c", &seeded(11, 2))?;
    let said = text(product(&home, &[&a, &c], "no"));
    assert!(
        said.contains("its extra tensor `norm.weight` has shape [11], but [12]"),
        "{said}"
    );
    Ok(())
}
