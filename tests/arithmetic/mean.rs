//! Means of adapters.

use super::support::tensors::{CPU, relative, values};
use super::{Home, assert_same, f64_config, load, seeded, text};
use candle_core::Tensor;
use candle_doft::file::{Changes, Combination, LoadOptions, Target, combine};
use candle_doft::merge::{Strength, inspect};
use candle_doft::{Adapter, DoftConfig, Magnitude, Map, Result};
use candle_nn::Linear;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn mean(home: &Home, adapters: &[&Path], weights: &[f64], to: &str) -> Result<PathBuf> {
    let (output, options) = (home.path(to), LoadOptions::default());
    let combination = Combination::Mean(weights.to_vec());
    combine(adapters, &combination, &output, &options, &BTreeMap::new())?;
    Ok(output)
}

#[test]
fn the_mean_of_equals_is_each_of_them() -> Result<()> {
    let home = Home::new();
    for map in [Map::Cayley, Map::Exponential] {
        let config = f64_config().with_map(map).with_max_norm(0.4);
        let adapter = home.adapter("adapter", config, 0.3, 0)?;
        let found = mean(
            &home,
            &[&adapter, &adapter, &adapter],
            &[0.2, 0.5, 0.3],
            "mean",
        )?;
        assert_same(
            "mean",
            &home.merged(&[&found])?,
            &home.merged(&[&adapter])?,
            1e-13,
        );
    }
    Ok(())
}

#[test]
fn with_nothing_it_is_a_strength_and_with_its_inverse_nothing() -> Result<()> {
    let home = Home::new();
    let a = home.adapter("a", f64_config(), 0.3, 0)?;
    let none = home.adapter_of("none", &["a"], f64_config(), 0., 0)?;
    // Layers that the second lacks are the identity in it.
    let found = mean(&home, &[&a, &none], &[0.25, 0.75], "mean")?;
    let expected = home.merged_at(&[&a], Strength::geodesic(0.25))?;
    assert_same("part", &home.merged(&[&found])?, &expected, 1e-13);
    let (undo, _) = home.convert(
        &a,
        "undo",
        Target::Doft,
        Changes::default().with_strength(-1.),
    )?;
    let found = mean(&home, &[&a, &undo], &[0.5, 0.5], "mean")?;
    assert_same(
        "nothing",
        &home.merged(&[&found])?,
        &load(&home.base())?,
        1e-13,
    );
    Ok(())
}

#[test]
fn the_mean_of_two_is_the_middle_of_the_way() -> Result<()> {
    // R_A (R_A^T R_B)^w: from the inverse of A, B, a strength, and A again.
    let home = Home::new();
    let oft = f64_config().with_magnitude(Magnitude::None);
    let a = home.adapter("a", oft.clone(), 0.3, 0)?;
    let b = home.adapter("b", oft.with_block_size(16), 0.3, 2)?;
    let found = mean(&home, &[&a, &b], &[0.3, 0.7], "mean")?;
    let options = LoadOptions::default();
    let at = |strength: f64| Changes::default().with_strength(strength);
    let (back, _) = home.convert(&a, "back", Target::Doft, at(-1.))?;
    let path = home.path("between");
    let none = BTreeMap::new();
    combine(&[&b, &back], &Combination::Product, &path, &options, &none)?;
    let (part, _) = home.convert(&path, "part", Target::Doft, at(0.7))?;
    let expected = home.merged(&[&part, &a])?;
    let found = home.merged(&[&found])?;
    for name in ["a.weight", "b.weight", "conv.weight"] {
        assert!(relative(&found[name], &expected[name]) < 1e-12, "{name}");
    }
    Ok(())
}

#[test]
fn kernels_that_nothing_tells_have_their_mean_all_the_same() -> Result<()> {
    // As another tool saves it: no metadata, no magnitude, so that a kernel looks like a matrix.
    let home = Home::new();
    let oft = f64_config().with_magnitude(Magnitude::None);
    let bare = |from: &Path, to: &str| -> Result<PathBuf> {
        let tensors: std::collections::HashMap<_, _> = load(from)?.into_iter().collect();
        candle_core::safetensors::save(&tensors, home.path(to))?;
        Ok(home.path(to))
    };
    let a = home.adapter_of("a", &["a", "conv"], oft.clone(), 0.3, 0)?;
    let b = home.adapter_of("b", &["a", "conv"], oft.with_block_size(16), 0.3, 1)?;
    let expected = mean(&home, &[&a, &b], &[0.3, 0.7], "mean")?;
    let found = mean(
        &home,
        &[&bare(&a, "a2")?, &bare(&b, "b2")?],
        &[0.3, 0.7],
        "bare",
    )?;
    assert_same(
        "bare",
        &home.merged(&[&found])?,
        &home.merged(&[&expected])?,
        1e-6,
    );
    // With known ones.
    let found = mean(&home, &[&a, &home.path("b2")], &[0.3, 0.7], "both")?;
    assert_same(
        "both",
        &home.merged(&[&found])?,
        &home.merged(&[&expected])?,
        1e-6,
    );
    Ok(())
}

fn plane(home: &Home, name: &str, degrees: f64, ratio: f64) -> Result<PathBuf> {
    let config = DoftConfig::default().with_block_size(2).with_scaled(false);
    let builder = Adapter::builder(config, &CPU)?;
    builder.wrap("head", Linear::new(seeded((3, 2), 1), None))?;
    let adapter = builder.finish()?;
    let v = (degrees.to_radians() / 2.).tan();
    adapter.rotation_vars()[0].set(&Tensor::new(&[[v]], &CPU)?)?;
    adapter.magnitude_vars()[0]
        .set(&(Tensor::ones(3, candle_core::DType::F64, &CPU)? * ratio.ln())?)?;
    adapter.save(home.path(name))?;
    Ok(home.path(name))
}

#[test]
fn angles_have_their_mean_and_ratios_the_geometric_one() -> Result<()> {
    let home = Home::new();
    let files = [(10., 2.), (-40., 4.), (100., 0.5)];
    let files: Vec<PathBuf> = files
        .iter()
        .enumerate()
        .map(|(at, (degrees, ratio))| plane(&home, &at.to_string(), *degrees, *ratio))
        .collect::<Result<_>>()?;
    let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let weights = [0.5, 0.3, 0.2];
    let output = home.path("mean");
    let combination = Combination::Mean(weights.to_vec());
    let warnings = combine(
        &paths,
        &combination,
        &output,
        &LoadOptions::default(),
        &BTreeMap::new(),
    )?;
    let tensors = load(&output)?;
    let angle = 2. * values(&tensors["head.oft_R.weight"])[0].atan();
    assert!(
        (angle.to_degrees() - 13.).abs() < 1e-12,
        "{}",
        angle.to_degrees()
    );
    let expected = 0.5 * 2f64.ln() + 0.3 * 4f64.ln() + 0.2 * 0.5f64.ln();
    assert!((values(&tensors["head.dora_log_multiplier"])[0] - expected).abs() < 1e-15);
    assert_eq!(warnings.len(), 1);
    let said = warnings[0].to_string();
    assert!(
        said.starts_with("`head`: two adapters turn a plane 140.0 degrees apart"),
        "{said}"
    );
    Ok(())
}

#[test]
fn what_has_no_mean_is_refused_by_name_and_nothing_is_written() -> Result<()> {
    let home = Home::new();
    let (a, b) = (plane(&home, "a", 100., 1.)?, plane(&home, "b", -80., 1.)?);
    let no = |adapters: &[&Path], weights: &[f64]| text(mean(&home, adapters, weights, "no"));
    let said = no(&[&a, &b], &[0.5, 0.5]);
    assert!(
        said.contains("layer `head` turns a plane by 180.00 degrees against"),
        "{said}"
    );
    let said = no(&[&a, &a], &[0.5, 0.6]);
    assert!(
        said.contains("the sum of the weights is 1.1, expected 1"),
        "{said}"
    );
    assert!(no(&[&a, &a], &[1.5, -0.5]).contains("a weight is -0.5, expected a number above 0"));
    assert!(no(&[&a, &a], &[f64::NAN, 1.]).contains("a weight is NaN"));
    assert!(no(&[&a, &a], &[1.]).contains("1 for 2 adapters, expected one for each"));
    let series = home.adapter("series", f64_config().with_map(Map::SERIES), 0.1, 0)?;
    assert!(no(&[&series, &series], &[0.5, 0.5]).contains("project it first"));
    let negative = {
        let config = DoftConfig::default()
            .with_block_size(2)
            .with_magnitude(Magnitude::Factor);
        let builder = Adapter::builder(config, &CPU)?;
        builder.wrap("head", Linear::new(seeded((3, 2), 1), None))?;
        let adapter = builder.finish()?;
        adapter.magnitude_vars()[0].set(&Tensor::new(&[1f64, -1., 1.], &CPU)?)?;
        adapter.save(home.path("negative"))?;
        home.path("negative")
    };
    assert!(no(&[&a, &negative], &[0.5, 0.5]).contains("has a factor of 0 or below"));
    let with = |name: &str, seed: u64| -> Result<PathBuf> {
        let builder = Adapter::builder(f64_config(), &CPU)?;
        builder.wrap("head", Linear::new(seeded((3, 8), 1), None))?;
        builder.extra("cls.weight", &seeded((2, 3), seed))?;
        builder.finish()?.save(home.path(name))?;
        Ok(home.path(name))
    };
    let (one, two) = (with("one", 1)?, with("two", 2)?);
    let both = load(&mean(&home, &[&one, &two], &[0.25, 0.75], "extras")?)?;
    let expected = ((seeded((2, 3), 1) * 0.25)? + (seeded((2, 3), 2) * 0.75)?)?;
    assert!(relative(&both["doft_extra.cls.weight"], &expected) < 1e-15);
    let bare = {
        let builder = Adapter::builder(f64_config(), &CPU)?;
        builder.wrap("head", Linear::new(seeded((3, 8), 1), None))?;
        builder.finish()?.save(home.path("bare"))?;
        home.path("bare")
    };
    assert!(no(&[&one, &bare], &[0.5, 0.5]).contains("lacks the extra tensor `cls.weight`"));
    assert!(!home.path("no").exists());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) })]

    #[test]
    fn a_mean_does_not_depend_on_the_order(
        first in 0.05..0.9f64, size in 0.05..0.5f64, seed in 0usize..5,
    ) {
        let home = Home::new();
        let second = 0.9 * (1. - first);
        let weights = [first, second, 1. - first - second];
        let files: Vec<PathBuf> = (0..3)
            .map(|at| {
                let config = f64_config().with_block_size([8, 16, 8][at]);
                home.adapter(&at.to_string(), config, size, seed + at).unwrap()
            })
            .collect();
        let run = |order: [usize; 3], to: &str| {
            let paths = order.map(|at| files[at].as_path());
            load(&mean(&home, &paths, &order.map(|at| weights[at]), to).unwrap()).unwrap()
        };
        let expected = run([0, 1, 2], "expected");
        for order in [[2, 0, 1], [1, 0, 2]] {
            for (name, tensor) in run(order, "found") {
                let (found, expected) = (values(&tensor), values(&expected[&name]));
                let off = found.iter().zip(&expected).map(|(f, e)| (f - e).abs()).fold(0., f64::max);
                prop_assert!(off < 1e-11, "{name}: {off:e}");
            }
        }
        let found = inspect(home.path("found"), &LoadOptions::default(), None).unwrap();
        prop_assert!(found.layers.iter().all(|layer| layer.orthogonality_error < 1e-13));
    }
}
