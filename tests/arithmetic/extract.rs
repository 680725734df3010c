//! Adapters extracted from finished fine-tunes.

use super::support::tensors::{CPU, relative, seeded, values};
use super::{Home, f64_config, load, text};
use candle_core::{DType, Tensor};
use candle_doft::file::LoadOptions;
use candle_doft::merge::{ExtractOptions, Merge, Strength, extract, inspect};
use candle_doft::rotation::{cayley, skew};
use candle_doft::{Adapter, DoftConfig, Magnitude, Result};
use candle_nn::Linear;
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The layers of the base.
const ALL: [&str; 4] = ["a", "b", "conv", "embed"];

pub(super) fn config() -> DoftConfig {
    f64_config().with_embedding_magnitude(Magnitude::Log)
}

pub(super) fn options<'a>(config: DoftConfig) -> ExtractOptions<'a> {
    let mut options = ExtractOptions::default();
    options.config = config;
    options
}

pub(super) fn save(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let tensors: HashMap<_, _> = tensors.clone().into_iter().collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// The base in a dtype.
pub(super) fn in_dtype(home: &Home, dtype: DType) -> Result<BTreeMap<String, Tensor>> {
    let base = load(&home.base())?.into_iter();
    base.map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?)))
        .collect()
}

pub(super) fn merge(adapter: &Path, base: &Path, to: &Path) -> Result<()> {
    let merge = Merge::new().with_file(adapter, &LoadOptions::default(), Strength::default())?;
    merge.checkpoint(base, to, Default::default())?;
    Ok(())
}

/// The largest difference of the tensors of two adapters, of all but markers.
fn apart(found: &Path, expected: &Path) -> Result<f64> {
    let (found, expected) = (load(found)?, load(expected)?);
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    let mut most = 0f64;
    for (name, expected) in expected {
        let pairs = values(&found[&name]).into_iter().zip(values(&expected));
        most = pairs.map(|(f, e)| (f - e).abs()).fold(most, f64::max);
    }
    Ok(most)
}

#[test]
fn a_merged_adapter_comes_back() -> Result<()> {
    let home = Home::new();
    let (base, tuned, output) = (home.path("base"), home.path("tuned"), home.path("found"));
    for magnitude in [
        Magnitude::Log,
        Magnitude::Factor,
        Magnitude::Absolute,
        Magnitude::None,
    ] {
        for (shared, b) in [(false, 8), (false, 16), (true, 8), (false, 4)] {
            for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 1e-5)] {
                let config = config()
                    .with_magnitude(magnitude)
                    .with_embedding_magnitude(magnitude);
                let config = config.with_block_share(shared).with_block_size(b);
                let what = format!("{magnitude:?}, shared {shared}, size {b}, {dtype:?}");
                save(&base, &in_dtype(&home, dtype)?);
                let adapter = home.adapter_over(&base, "adapter", &ALL, config.clone(), 0.3, 1)?;
                merge(&adapter, &base, &tuned)?;
                let config = config.with_targets(ALL);
                let done = extract(&base, &tuned, &output, options(config))?;
                let off = apart(&output, &adapter)?;
                assert!(off < tolerance, "{what}: {off:e}");
                assert!(done.explained > 1. - 1e-9, "{what}: {}", done.explained);
                assert!(done.left.is_empty() && done.layers.len() == 4);
                let plain = magnitude == Magnitude::None;
                assert_eq!(done.explained_by_rotation > 1. - 1e-9, plain, "{what}");
                // The base that it belongs to is on record.
                let found = inspect(&output, &LoadOptions::default(), Some(&base))?;
                assert!(found.layers.iter().all(|layer| layer.mismatch.is_none()));
            }
        }
    }
    Ok(())
}

#[test]
fn half_precision_comes_back_within_its_rounding() -> Result<()> {
    let home = Home::new();
    let (base, tuned) = (home.path("base"), home.path("tuned"));
    let (output, again) = (home.path("found"), home.path("again"));
    for (dtype, rounding) in [(DType::BF16, 4e-3), (DType::F16, 5e-4)] {
        save(&base, &in_dtype(&home, dtype)?);
        let adapter = home.adapter_over(&base, "adapter", &ALL, config(), 0.3, 1)?;
        merge(&adapter, &base, &tuned)?;
        let done = extract(&base, &tuned, &output, options(config().with_targets(ALL)))?;
        assert!(
            done.explained > 1. - 20. * rounding * rounding,
            "{}",
            done.explained
        );
        merge(&output, &base, &again)?;
        let expected = load(&tuned)?;
        for (name, weight) in load(&again)? {
            let off = relative(&weight, &expected[&name]);
            assert!(off <= 2. * rounding, "{dtype:?}, {name}: {off:e}");
        }
        // A fine-tune in another dtype than its base.
        let wide: BTreeMap<_, _> = load(&tuned)?
            .into_iter()
            .map(|(name, tensor)| (name, tensor.to_dtype(DType::F32).unwrap()))
            .collect();
        save(&again, &wide);
        let wide = extract(&base, &again, &output, options(config().with_targets(ALL)))?;
        assert!((wide.explained - done.explained).abs() < 1e-5);
        // Rounding alone is no fine-tune.
        save(&again, &in_dtype(&home, dtype)?);
        let said = text(extract(
            home.base(),
            &again,
            home.path("no"),
            options(config()),
        ));
        assert!(said.contains("nothing to extract"), "{said}");
    }
    Ok(())
}

/// Row by row what a slow search says: the best share for one block of size 2, by angle.
#[test]
fn one_block_by_hand() -> Result<()> {
    let home = Home::new();
    let (base, tuned, output) = (home.path("base"), home.path("tuned"), home.path("found"));
    let before = seeded((5, 2), 1);
    let after = (&before + (seeded((5, 2), 2) * 0.8)?)?;
    save(
        &base,
        &BTreeMap::from([("x.weight".to_string(), before.clone())]),
    );
    save(
        &tuned,
        &BTreeMap::from([("x.weight".to_string(), after.clone())]),
    );
    let done = extract(
        &base,
        &tuned,
        &output,
        options(DoftConfig::default().with_block_size(2)),
    )?;
    let (w, t) = (before.to_vec2::<f64>()?, after.to_vec2::<f64>()?);
    let change: f64 = (0..5)
        .map(|o| (t[o][0] - w[o][0]).powi(2) + (t[o][1] - w[o][1]).powi(2))
        .sum();
    let rest = |angle: f64, scaled: bool| -> f64 {
        let (s, c) = angle.sin_cos();
        (0..5)
            .map(|o| {
                let turned = [c * w[o][0] - s * w[o][1], s * w[o][0] + c * w[o][1]];
                let along = turned[0] * t[o][0] + turned[1] * t[o][1];
                let size = w[o][0].powi(2) + w[o][1].powi(2);
                let m = if scaled { (along / size).max(1e-6) } else { 1. };
                (t[o][0] - m * turned[0]).powi(2) + (t[o][1] - m * turned[1]).powi(2)
            })
            .sum()
    };
    for (scaled, found) in [(true, done.explained), (false, done.explained_by_rotation)] {
        let angles = (0..200_000).map(|k| f64::from(k) * std::f64::consts::TAU / 200_000.);
        let best = angles
            .map(|angle| rest(angle, scaled))
            .fold(f64::INFINITY, f64::min);
        let expected = 1. - best / change;
        assert!((found - expected).abs() < 1e-6, "{found}, not {expected}");
    }
    // What the report says is what the file does.
    merge(&output, &base, &home.path("merged"))?;
    let merged = &load(&home.path("merged"))?["x.weight"];
    let off = (merged - &after)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
    assert!((1. - off / change - done.explained).abs() < 1e-12);
    Ok(())
}

#[test]
fn a_fine_tune_of_another_kind_is_told_honestly() -> Result<()> {
    let home = Home::new();
    let (tuned, output, merged) = (home.path("tuned"), home.path("found"), home.path("merged"));
    let before = load(&home.base())?;
    for scale in [1e-3, 0.3, 3.] {
        let mut after = before.clone();
        for (seed, (_, tensor)) in after.iter_mut().enumerate() {
            *tensor = (&*tensor + (seeded(tensor.shape().clone(), 50 + seed as u64) * scale)?)?;
        }
        save(&tuned, &after);
        let done = extract(
            home.base(),
            &tuned,
            &output,
            options(config().with_targets(ALL)),
        )?;
        assert!(
            done.explained > 0. && done.explained < 0.9,
            "{}",
            done.explained
        );
        assert!(done.explained_by_rotation < done.explained);
        assert!(done.adapted > 0.5 && done.adapted < 1.);
        merge(&output, &home.base(), &merged)?;
        let found = load(&merged)?;
        for layer in &done.layers {
            let name = format!("{}.weight", layer.path);
            let squares = |a: &Tensor, b: &Tensor| -> Result<f64> {
                Ok((a - b)?.sqr()?.sum_all()?.to_scalar::<f64>()?)
            };
            let change = squares(&before[&name], &after[&name])?;
            let rest = squares(&found[&name], &after[&name])?;
            assert!(
                (1. - rest / change - layer.explained).abs() < 1e-9,
                "{name}"
            );
            assert!(rest <= change && layer.explained_by_rotation <= layer.explained + 1e-12);
        }
        let names: Vec<&str> = done.left.iter().map(|left| left.name.as_str()).collect();
        assert_eq!(names, ["norm.weight"]);
        assert!(!done.left[0].kept);
    }
    Ok(())
}

#[test]
fn it_is_never_further_than_the_base() -> Result<()> {
    let home = Home::new();
    let (tuned, output) = (home.path("tuned"), home.path("found"));
    let base = load(&home.base())?;
    // Rows of the other sign: a rotation of b = 8 turns all planes by 180 degrees, a ratio cannot.
    let mut after = base.clone();
    after.insert("a.weight".into(), base["a.weight"].neg()?);
    save(&tuned, &after);
    let done = extract(home.base(), &tuned, &output, options(config()))?;
    assert_eq!(done.layers[0].half_turns, 4);
    assert!(
        done.warnings[0]
            .to_string()
            .contains("nearly 180 degrees; 179.9")
    );
    assert!((done.layers[0].max_angle_degrees - 179.9).abs() < 1e-9);
    assert!(done.explained > 1. - 1e-5);
    assert_eq!(done.unchanged, 2);
    merge(&output, &home.base(), &home.path("merged"))?;
    // Every other row changed its sign: neither does.
    let signs = (0..40).map(|row| if row % 2 == 0 { 1f64 } else { -1. });
    let signs = Tensor::from_vec(signs.collect::<Vec<_>>(), (40, 1), &CPU)?;
    after.insert("a.weight".into(), base["a.weight"].broadcast_mul(&signs)?);
    save(&tuned, &after);
    let done = extract(home.base(), &tuned, &output, options(config()))?;
    let share = done.explained;
    assert!((0. ..0.9).contains(&share), "{share}");
    // Rows that vanish keep a ratio above 0.
    after.insert(
        "a.weight".into(),
        base["a.weight"].broadcast_mul(&signs.relu()?)?,
    );
    save(&tuned, &after);
    let done = extract(home.base(), &tuned, &output, options(config()))?;
    assert!(done.explained > 1. - 1e-9 && done.layers[0].ratio_min > 0.);
    // Rows of zeros have ratio 1.
    let mut dead = base.clone();
    dead.insert(
        "a.weight".into(),
        base["a.weight"].broadcast_mul(&signs.relu()?)?,
    );
    save(&home.path("dead"), &dead);
    save(
        &tuned,
        &BTreeMap::from([("a.weight".to_string(), (&dead["a.weight"] * 2.)?)]),
    );
    save(
        &home.path("dead"),
        &BTreeMap::from([("a.weight".to_string(), dead["a.weight"].clone())]),
    );
    let done = extract(home.path("dead"), &tuned, &output, options(config()))?;
    let logs = values(&load(&output)?["a.dora_log_multiplier"]);
    assert!(logs.iter().enumerate().all(|(row, log)| {
        let expected = if row % 2 == 0 { 2f64.ln() } else { 0. };
        (log - expected).abs() < 1e-12
    }));
    assert!(done.layers[0].max_angle_degrees < 1e-5);
    Ok(())
}

#[test]
fn rows_that_leave_a_block_free_turn_it_least() -> Result<()> {
    let home = Home::new();
    let (base, tuned, output) = (home.path("base"), home.path("tuned"), home.path("found"));
    for dtype in [DType::F64, DType::F32] {
        // Three rows for blocks of 8, and rows of which one repeats another.
        for weight in [
            seeded((3, 16), 1),
            Tensor::cat(&[seeded((5, 16), 2), seeded((5, 16), 2)], 0)?,
        ] {
            let weight = weight.to_dtype(dtype)?;
            save(
                &base,
                &BTreeMap::from([("x.weight".to_string(), weight.clone())]),
            );
            let builder = Adapter::builder(config(), &CPU)?;
            builder.wrap("x", Linear::new(weight, None))?;
            let adapter = builder.finish()?;
            super::disturb_all(
                [adapter.rotation_vars(), adapter.magnitude_vars()].concat(),
                0.5,
            )?;
            adapter.save(home.path("adapter"))?;
            merge(&home.path("adapter"), &base, &tuned)?;
            let done = extract(&base, &tuned, &output, options(config()))?;
            assert!(done.explained > 1. - 1e-9, "{}", done.explained);
            merge(&output, &base, &home.path("merged"))?;
            let rounding = if dtype == DType::F64 { 1e-12 } else { 1e-6 };
            let (found, expected) = (load(&home.path("merged"))?, load(&tuned)?);
            assert!(relative(&found["x.weight"], &expected["x.weight"]) < rounding);
            // Of all rotations that do this, the found one has the largest trace.
            let trace = |file: &Path| -> Result<f64> {
                let theta = (&load(file)?["x.oft_R.weight"] / (2. * 7f64.sqrt()))?;
                let r = cayley(&skew(&theta.to_dtype(DType::F64)?, 8)?)?;
                let eye = Tensor::eye(8, DType::F64, &CPU)?;
                Ok(r.broadcast_mul(&eye)?.sum_all()?.to_scalar()?)
            };
            let (least, trained) = (trace(&output)?, trace(&home.path("adapter"))?);
            assert!(least > trained + 1e-3, "{least} and {trained}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(16) })]

    #[test]
    fn any_merged_adapter_comes_back(
        scale in 0.01..1.2f64, seed in 0usize..6, b in prop::sample::select(vec![2usize, 4, 8, 16]),
    ) {
        let home = Home::new();
        let config = config().with_block_size(b);
        let adapter = home.adapter("adapter", config.clone(), scale, seed).unwrap();
        let (tuned, output) = (home.path("tuned"), home.path("found"));
        merge(&adapter, &home.base(), &tuned).unwrap();
        extract(home.base(), &tuned, &output, options(config.with_targets(ALL))).unwrap();
        let off = apart(&output, &adapter).unwrap();
        prop_assert!(off < 1e-9, "{off:e}");
    }
}
