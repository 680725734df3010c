//! A strength that is done in the file, and strengths by layer in a merge.

use super::support::orthogonal_maps;
use super::support::tensors::{CPU, bits, relative, values};
use super::{Home, assert_same, f64_config, listing, load, seeded, text};
use candle_core::Tensor;
use candle_doft::config::Strengths;
use candle_doft::file::{Changes, LoadOptions, Target, convert_with};
use candle_doft::merge::{CheckpointOptions, Merge, NameTable, Strength, StrengthMode, inspect};
use candle_doft::{Adapter, Magnitude, Map, Result};
use candle_nn::Linear;
use proptest::prelude::*;
use std::path::Path;

fn at(strength: impl Into<Strengths>) -> Changes {
    Changes::default().with_strength(strength)
}

#[test]
fn a_strength_in_the_file_is_the_geodesic_strength_of_a_merge() -> Result<()> {
    let home = Home::new();
    for map in orthogonal_maps() {
        for magnitude in [
            Magnitude::Log,
            Magnitude::Factor,
            Magnitude::Absolute,
            Magnitude::None,
        ] {
            for (shared, cap) in [(false, None), (true, Some(0.2))] {
                let config = f64_config().with_map(map).with_magnitude(magnitude);
                let config = config.with_block_share(shared).with_max_norm(cap);
                let adapter = home.adapter("adapter", config, 0.3, 1)?;
                for strength in [0.5, -1., 1.7, 0.] {
                    let what = format!("{map}, {magnitude:?}, shared {shared}, {strength}");
                    let (file, _) = home.convert(&adapter, "at", Target::Doft, at(strength))?;
                    let expected = home.merged_at(&[&adapter], Strength::geodesic(strength))?;
                    assert_same(&what, &home.merged(&[&file])?, &expected, 1e-13);
                    let caps = load(&file)?
                        .into_keys()
                        .filter(|key| key.ends_with("clipped_oft"));
                    assert_eq!(caps.count(), 0, "{what}");
                }
                // Twice: there and back again.
                let (third, _) = home.convert(&adapter, "third", Target::Doft, at(1. / 3.))?;
                let (whole, _) = home.convert(&third, "whole", Target::Doft, at(3.))?;
                assert_same(
                    "there and back",
                    &home.merged(&[&whole])?,
                    &home.merged(&[&adapter])?,
                    1e-13,
                );
                let (undo, _) = home.convert(&adapter, "undo", Target::Doft, at(-1.))?;
                let base = load(&home.base())?;
                assert_same("undone", &home.merged(&[&adapter, &undo])?, &base, 1e-13);
            }
        }
    }
    Ok(())
}

#[test]
fn other_targets_hold_the_strength_as_well() -> Result<()> {
    let home = Home::new();
    let config = f64_config().with_magnitude(Magnitude::None);
    let adapter = home.adapter_of("adapter", &["a", "b"], config, 0.1, 0)?;
    let expected = home.merged_at(&[&adapter], Strength::geodesic(0.5))?;
    let peft = Target::Peft {
        drop_magnitude: false,
    };
    let series = Target::Series {
        drop_magnitude: false,
    };
    for (target, tolerance) in [(peft, 1e-6), (series, 1e-4)] {
        let (file, _) = home.convert(&adapter, "other", target, at(0.5))?;
        assert_same("other", &home.merged(&[&file])?, &expected, tolerance);
        if file.is_dir() {
            std::fs::remove_dir_all(file).unwrap();
        }
    }
    Ok(())
}

#[test]
fn layers_have_strengths_of_their_own_in_files_and_merges() -> Result<()> {
    let home = Home::new();
    let adapter = home.adapter("adapter", f64_config(), 0.3, 1)?;
    let strengths = Strengths::from(0.5)
        .with_rule("{a,b}", 0.25)
        .with_rule("b", -1.);
    let (file, _) = home.convert(&adapter, "at", Target::Doft, at(strengths.clone()))?;
    let found = home.merged(&[&file])?;
    for (layer, strength) in [("a", 0.25), ("b", -1.), ("conv", 0.5), ("embed", 0.5)] {
        let expected = home.merged_at(&[&adapter], Strength::geodesic(strength))?;
        let name = format!("{layer}.weight");
        assert!(relative(&found[&name], &expected[&name]) < 1e-13, "{layer}");
    }
    let merged = home.path("merged.safetensors");
    let options = LoadOptions::default();
    for mode in [StrengthMode::Geodesic, StrengthMode::Linear] {
        let merge = Merge::new().with_file_by_layer(&adapter, &options, mode, &strengths)?;
        merge.checkpoint(home.base(), &merged, CheckpointOptions::default())?;
        let weights = load(&merged)?;
        for (layer, value) in [("a", 0.25), ("b", -1.), ("conv", 0.5)] {
            let strength = match mode {
                StrengthMode::Geodesic => Strength::geodesic(value),
                _ => Strength::linear(value),
            };
            let name = format!("{layer}.weight");
            let merge = Merge::new().with_file(&adapter, &options, strength)?;
            let alone = merge
                .weight(layer, &load(&home.base())?[&name], false)?
                .unwrap();
            assert_eq!(bits(&weights[&name]), bits(&alone), "{layer}");
        }
    }
    // A cap stays where nothing was changed.
    let capped = home.adapter("capped", f64_config().with_max_norm(0.1), 0.3, 1)?;
    let one = Strengths::from(1.).with_rule("b", 0.5);
    let (file, _) = home.convert(&capped, "one", Target::Doft, at(one))?;
    let caps = load(&file)?
        .into_keys()
        .filter(|key| key.ends_with("clipped_oft"));
    assert_eq!(caps.count(), 3);
    let (found, whole) = (home.merged(&[&file])?, home.merged(&[&capped])?);
    let half = home.merged_at(&[&capped], Strength::geodesic(0.5))?;
    for (name, expected) in [
        ("a.weight", &whole),
        ("b.weight", &half),
        ("conv.weight", &whole),
    ] {
        assert!(relative(&found[name], &expected[name]) < 1e-13, "{name}");
    }
    let wrong = Strengths::from(1.).with_rule("q_proj", 0.5);
    let before = listing(&home);
    let merge =
        Merge::new().with_file_by_layer(&adapter, &options, StrengthMode::Linear, &wrong)?;
    let to = home.path("wrong");
    let said = text(merge.checkpoint(home.base(), &to, CheckpointOptions::default()));
    assert!(
        said.contains("strength `q_proj` matches no layer; the nearest are"),
        "{said}"
    );
    assert_eq!(
        said,
        text(home.convert(&adapter, "wrong", Target::Doft, at(wrong)))
    );
    assert_eq!(listing(&home), before);
    Ok(())
}

#[test]
fn parts_of_a_fused_weight_have_strengths_of_their_own() -> Result<()> {
    let home = Home::new();
    let builder = Adapter::builder(f64_config(), &CPU)?;
    let fused = seeded((24, 16), 1);
    for (at, name) in ["to_q", "to_k", "to_v"].into_iter().enumerate() {
        builder.wrap(
            name,
            Linear::new(fused.narrow(0, 8 * at, 8)?.contiguous()?, None),
        )?;
    }
    let adapter = builder.finish()?;
    super::disturb_all(
        [adapter.rotation_vars(), adapter.magnitude_vars()].concat(),
        0.3,
    )?;
    adapter.save(home.path("parts"))?;
    let layer = |at: usize| {
        format!(
            r#"{{"tensor": "qkv.weight", "rows": [[{at}, {}]]}}"#,
            at + 8
        )
    };
    let (q, k, v) = (layer(0), layer(8), layer(16));
    let table = format!(r#"{{"layers": {{"to_q": {q}, "to_k": {k}, "to_v": {v}}}}}"#);
    let merged = |strengths: &Strengths| -> Result<Tensor> {
        let (options, mode) = (LoadOptions::default(), StrengthMode::Geodesic);
        let path = home.path("parts");
        let merge = Merge::new().with_file_by_layer(path, &options, mode, strengths)?;
        let merge = merge.with_names(NameTable::from_json(&table)?);
        let merged = merge.weight("qkv", &fused, false)?.unwrap();
        merge.check_used()?;
        Ok(merged)
    };
    let mixed = merged(
        &Strengths::from(1.)
            .with_rule("to_k", 0.5)
            .with_rule("to_v", 0.),
    )?;
    for (at, strength) in [(0, 1.), (8, 0.5), (16, 0.)] {
        let expected = merged(&Strengths::from(strength))?.narrow(0, at, 8)?;
        assert_eq!(
            bits(&mixed.narrow(0, at, 8)?),
            bits(&expected),
            "rows from {at}"
        );
    }
    assert!(
        text(merged(&Strengths::from(1.).with_rule("to_x", 0.5)))
            .contains("`to_x` matches no layer")
    );
    Ok(())
}

#[test]
fn a_layer_of_strength_1_stays_to_the_bit_and_minus_1_turns_its_sign() -> Result<()> {
    let home = Home::new();
    let config = f64_config().with_max_norm(0.1);
    let adapter = home.adapter("adapter", config, 0.3, 1)?;
    let (same, _) = home.convert(&adapter, "same", Target::Doft, at(1.))?;
    assert_eq!(
        std::fs::read(&adapter).unwrap(),
        std::fs::read(same).unwrap()
    );
    let plain = home.adapter("plain", f64_config(), 0.3, 1)?;
    let (undo, _) = home.convert(&plain, "undo", Target::Doft, at(-1.))?;
    let (before, after) = (load(&plain)?, load(&undo)?);
    for name in [
        "a.dora_log_multiplier",
        "a.oft_R.weight",
        "conv.oft_R.weight",
    ] {
        assert_eq!(bits(&before[name].neg()?), bits(&after[name]), "{name}");
    }
    Ok(())
}

#[test]
fn what_has_no_such_strength_is_refused_by_name_and_nothing_is_written() -> Result<()> {
    let home = Home::new();
    let quarter = |map| -> Result<std::path::PathBuf> {
        let config = f64_config()
            .with_block_size(2)
            .with_scaled(false)
            .with_map(map);
        let builder = Adapter::builder(config.with_magnitude(Magnitude::None), &CPU)?;
        builder.wrap("head", Linear::new(seeded((3, 2), 1), None))?;
        let adapter = builder.finish()?;
        let value = if map == Map::Exponential { 1.2 } else { 1. };
        adapter.rotation_vars()[0].set(&Tensor::new(&[[value]], &CPU)?)?;
        adapter.save(home.path("quarter"))?;
        Ok(home.path("quarter"))
    };
    let run = |from: &Path, strength: f64| {
        let (options, none) = (LoadOptions::default(), Default::default());
        let to = home.path("refused");
        convert_with(from, to, Target::Doft, &options, &none, &at(strength))
    };
    let said = text(run(&quarter(Map::Cayley)?, 2.));
    assert_eq!(
        said,
        "strength 2: layer `head` would turn a plane by 180.00 degrees, expected less than 180; its widest \
         plane turns by 90.00, so take a strength below 2.000"
    );
    run(&home.path("quarter"), -1.99)?;
    let angle =
        inspect(home.path("refused"), &LoadOptions::default(), None)?.layers[0].max_angle_degrees;
    assert!((angle - 179.1).abs() < 1e-9, "{angle}");
    std::fs::remove_file(home.path("refused")).unwrap();
    assert!(text(run(&quarter(Map::Exponential)?, -3.)).contains("turn a plane by 206.26 degrees"));
    assert!(text(run(&quarter(Map::SERIES)?, 0.5)).contains("layer `head` has the series"));
    assert!(text(run(&quarter(Map::Cayley)?, f64::NAN)).contains("not a finite number"));
    let config = f64_config().with_magnitude(Magnitude::Factor);
    let builder = Adapter::builder(config, &CPU)?;
    builder.wrap("head", Linear::new(seeded((3, 8), 1), None))?;
    let adapter = builder.finish()?;
    adapter.magnitude_vars()[0].set(&Tensor::new(&[1f64, -0.5, 2.], &CPU)?)?;
    adapter.save(home.path("negative"))?;
    let said = text(run(&home.path("negative"), 0.5));
    assert!(
        said.contains("layer `head` has a factor of 0 or below"),
        "{said}"
    );
    adapter.magnitude_vars()[0].set(&Tensor::new(&[1f64, 0.5, 2.], &CPU)?)?;
    adapter.save(home.path("high"))?;
    assert!(text(run(&home.path("high"), 1000.)).contains("beyond f32"));
    assert!(!home.path("refused").exists());
    Ok(())
}

#[test]
fn extras_stay_in_full_with_a_warning() -> Result<()> {
    let home = Home::new();
    let builder = Adapter::builder(f64_config(), &CPU)?;
    builder.wrap("head", Linear::new(seeded((3, 8), 1), None))?;
    builder.extra("norm.weight", &seeded(4, 1))?;
    builder.finish()?.save(home.path("extra"))?;
    let (options, none) = (LoadOptions::default(), Default::default());
    let run = |strength: f64| {
        let to = home.path("to");
        convert_with(
            home.path("extra"),
            to,
            Target::Doft,
            &options,
            &none,
            &at(strength),
        )
    };
    assert_eq!(run(1.)?.warnings, []);
    let warnings = run(0.5)?.warnings;
    assert_eq!(warnings[0].subject, "norm.weight");
    let name = "doft_extra.norm.weight";
    assert_eq!(
        bits(&load(&home.path("to"))?[name]),
        bits(&load(&home.path("extra"))?[name])
    );
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]

    #[test]
    fn one_strength_after_another_is_their_product(
        first in 0.1..1.5f64, second in -1.5..1.5f64, seed in 0usize..4, exponential: bool,
    ) {
        let home = Home::new();
        let map = if exponential { Map::Exponential } else { Map::Cayley };
        let adapter = home.adapter("adapter", f64_config().with_map(map), 0.3, seed).unwrap();
        let (one, _) = home.convert(&adapter, "one", Target::Doft, at(first)).unwrap();
        let (both, _) = home.convert(&one, "both", Target::Doft, at(second)).unwrap();
        let (at_once, _) = home.convert(&adapter, "once", Target::Doft, at(first * second)).unwrap();
        let (found, expected) = (load(&both).unwrap(), load(&at_once).unwrap());
        for (name, tensor) in &expected {
            let (found, expected) = (values(&found[name]), values(tensor));
            let off = found.iter().zip(&expected).map(|(f, e)| (f - e).abs()).fold(0., f64::max);
            prop_assert!(off < 1e-12, "{name}: {off:e}");
        }
    }
}
