//! Files for readers that know `oft_R.weight` alone, checked against a reader of their rules.

use super::support::golden::golden;
use super::support::tensors::{CPU, relative, values};
use super::{Home, assert_same, f64_config, load, text};
use candle_core::{DType, Tensor};
use candle_doft::file::{Cause, Changes, Dialect, LoadOptions, Target, convert};
use candle_doft::merge::inspect;
use candle_doft::{Adapter, DoftConfig, Magnitude, Map, Result};
use candle_nn::Linear;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

const SERIES: Target = Target::Series {
    drop_magnitude: false,
};

fn oft() -> DoftConfig {
    f64_config().with_magnitude(Magnitude::None)
}

fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    let entry = |i: usize, j: usize| (0..n).map(|k| a[i * n + k] * b[k * n + j]).sum();
    (0..n * n).map(|at| entry(at / n, at % n)).collect()
}

/// What such a reader makes of a checkpoint: of each layer it takes `oft_R.weight` `(r, n)`, whose rows
/// are strict upper triangles, and `R = I + 2Q + 2Q^2 + 2Q^3 + Q^4`; one row stands for all blocks. A
/// linear layer computes `x R` before its weight, so its weight becomes `W R^T`; a kernel becomes `W R`.
/// All other keys are dropped.
fn read_by_others(file: &Path, base: &Path) -> Result<BTreeMap<String, Tensor>> {
    let (tensors, mut weights) = (load(file)?, load(base)?);
    for (key, rows) in tensors {
        let Some(module) = key.strip_suffix(".oft_R.weight") else {
            continue;
        };
        let weight = weights.get_mut(&format!("{module}.weight")).unwrap();
        let (out, width) = weight.flatten_from(1)?.dims2()?;
        let (count, n) = rows.dims2()?;
        let b = (1..=width).find(|b| b * (b - 1) / 2 == n).unwrap();
        let packed = values(&rows);
        let blocks: Vec<Vec<f64>> = packed.chunks(n).map(|row| series_of(row, b)).collect();
        let old = values(weight);
        let mut new = vec![0.; out * width];
        for (new, old) in new.chunks_mut(width).zip(old.chunks(width)) {
            for (at, new) in new.iter_mut().enumerate() {
                let (d, j) = (at / b, at % b);
                let r = &blocks[if count == 1 { 0 } else { d }];
                *new = (0..b)
                    .map(|k| {
                        let turned = if weight.rank() == 2 {
                            r[j * b + k]
                        } else {
                            r[k * b + j]
                        };
                        old[d * b + k] * turned
                    })
                    .sum();
            }
        }
        *weight = Tensor::from_vec(new, weight.shape(), &CPU)?;
    }
    Ok(weights)
}

fn series_of(row: &[f64], b: usize) -> Vec<f64> {
    let mut q = vec![0.; b * b];
    let upper = (0..b).flat_map(|i| (i + 1..b).map(move |j| (i, j)));
    for ((i, j), v) in upper.zip(row) {
        (q[i * b + j], q[j * b + i]) = (*v, -v);
    }
    let q2 = product(&q, &q, b);
    let (q3, q4) = (product(&q2, &q, b), product(&q2, &q2, b));
    let one = |at: usize| f64::from(u8::from(at / b == at % b));
    (0..b * b)
        .map(|at| one(at) + 2. * (q[at] + q2[at] + q3[at]) + q4[at])
        .collect()
}

#[test]
fn readers_of_the_plain_series_turn_as_far_as_the_adapter_does() -> Result<()> {
    let home = Home::new();
    let layers = ["a", "b", "conv"];
    for map in [Map::Cayley, Map::Exponential, Map::SERIES] {
        for (scaled, cap) in [(true, None), (false, None), (true, Some(0.05))] {
            for shared in [false, true] {
                let config = oft().with_map(map).with_scaled(scaled).with_max_norm(cap);
                let config = config.with_block_share(shared);
                let scale = if scaled { 0.1 } else { 0.02 };
                let what = format!("{map}, scaled {scaled}, cap {cap:?}, shared {shared}");
                let adapter = home.adapter_of("adapter", &layers, config, scale, 0)?;
                let (file, done) = home.convert(&adapter, "series", SERIES, Changes::default())?;
                let expected = home.merged(&[&adapter])?;
                let found = read_by_others(&file, &home.base())?;
                // What they compute is what this crate reads from the file, ..
                assert_same(&what, &found, &home.merged(&[&file])?, 1e-7);
                assert_eq!(
                    inspect(&file, &LoadOptions::default(), None)?.dialect,
                    Dialect::OneTrainer
                );
                // .. and as far from the adapter as the conversion says.
                let share = done
                    .changes
                    .iter()
                    .map(|c| c.weight_share)
                    .fold(0., f64::max);
                assert!(share < 0.01, "{what}: {share}");
                for (name, expected) in &expected {
                    let off = (&found[name] - expected)?
                        .sqr()?
                        .sum_all()?
                        .to_scalar::<f64>()?;
                    let size = expected.sqr()?.sum_all()?.to_scalar::<f64>()?;
                    assert!(off.sqrt() <= (share + 2e-7) * size.sqrt(), "{what}: {name}");
                }
                let said = done.warnings.iter().any(|w| w.message.contains("|R' - R|"));
                assert_eq!(said, map != Map::SERIES, "{what}");
                assert!(
                    load(&file)?
                        .keys()
                        .all(|key| key.ends_with(".oft_R.weight"))
                );
            }
        }
    }
    // Without the conversion they turn too far.
    let adapter = home.adapter_of("adapter", &layers, oft(), 0.1, 0)?;
    let (found, expected) = (
        read_by_others(&adapter, &home.base())?,
        home.merged(&[&adapter])?,
    );
    assert!(relative(&found["a.weight"], &expected["a.weight"]) > 0.1);
    Ok(())
}

#[test]
fn the_difference_is_that_of_series_and_map() -> Result<()> {
    // One plane with v = 0.5: Cayley turns (1, 0) to (0.6, 0.8), the series gives (0.5625, 0.75).
    let home = Home::new();
    let config = oft().with_block_size(2).with_scaled(false);
    let builder = Adapter::builder(config, &CPU)?;
    let weight = Tensor::new(&[[1f64, 0.]], &CPU)?;
    builder.wrap("b", Linear::new(weight, None))?;
    let adapter = builder.finish()?;
    adapter.rotation_vars()[0].set(&Tensor::new(&[[0.5f64]], &CPU)?)?;
    let (from, to) = (home.path("from"), home.path("to"));
    adapter.save(&from)?;
    let changes = Changes::default();
    let options = LoadOptions::default();
    let none = BTreeMap::new();
    let done = candle_doft::file::convert_with(&from, &to, SERIES, &options, &none, &changes)?;
    let change = &done.changes[0];
    assert_eq!((change.path.as_str(), change.cause), ("b", Cause::Series));
    assert!((change.largest_entry - 0.05).abs() < 1e-12);
    assert!((change.weight_share - 0.0625).abs() < 1e-12);
    let said = &done.warnings[0].message;
    assert!(
        said.contains("5.0e-2") && said.contains("6.250 %"),
        "{said}"
    );
    Ok(())
}

#[test]
fn what_such_tools_write_comes_back_unchanged() -> Result<()> {
    let home = Home::new();
    let rows = super::seeded((4, 28), 9).to_dtype(DType::F32)?;
    let kernel = super::seeded((1, 28), 9).to_dtype(DType::F32)?;
    let tensors = HashMap::from([
        ("lora_unet_a.oft_R.weight", (rows * 0.05)?),
        ("lora_unet_conv.oft_R.weight", (kernel * 0.05)?),
    ]);
    let (from, to) = (home.path("from"), home.path("to"));
    candle_core::safetensors::save(&tensors, &from)?;
    let warnings = convert(
        &from,
        &to,
        SERIES,
        &LoadOptions::default(),
        &BTreeMap::new(),
    )?;
    assert_eq!(warnings, []);
    let again = load(&to)?;
    assert_eq!(again.len(), 2);
    for (name, tensor) in tensors {
        assert_eq!(values(&again[name]), values(&tensor), "{name}");
    }
    Ok(())
}

#[test]
fn what_the_series_cannot_hold_is_refused_by_name() -> Result<()> {
    let home = Home::new();
    let to = home.path("series");
    let run = |from: &Path, target| {
        let shapes = candle_doft::merge::weight_shapes(home.base())?;
        convert(from, &to, target, &LoadOptions::default(), &shapes)
    };
    let adapter = home.adapter_of("adapter", &["a"], f64_config(), 0.1, 0)?;
    let said = text(run(&adapter, SERIES));
    assert!(
        said.contains("layer `a`") && said.contains("`--drop-magnitude`"),
        "{said}"
    );
    assert!(!to.exists());
    let dropping = Target::Series {
        drop_magnitude: true,
    };
    let warnings = run(&adapter, dropping)?;
    assert!(
        warnings
            .iter()
            .any(|w| w.message == "its magnitude was dropped")
    );
    std::fs::remove_file(&to).unwrap();
    // A magnitude that is 1 throughout is none.
    let fresh = home.adapter_of("fresh", &["a"], f64_config(), 0., 0)?;
    run(&fresh, SERIES)?;
    std::fs::remove_file(&to).unwrap();
    let table = home.adapter_of("table", &["embed"], oft(), 0.1, 0)?;
    assert!(text(run(&table, SERIES)).contains("has no embeddings"));
    let builder = Adapter::load(&fresh, &CPU)?;
    builder.wrap(
        "a",
        Linear::new(load(&home.base())?["a.weight"].clone(), None),
    )?;
    builder.extra("head.weight", &Tensor::ones((2, 2), DType::F32, &CPU)?)?;
    builder.finish()?.save(home.path("extra"))?;
    assert!(text(run(&home.path("extra"), SERIES)).contains("the extra tensor `head.weight`"));
    let wide = oft().with_map(Map::Exponential).with_scaled(false);
    let wide = home.adapter_of("wide", &["a"], wide, 3., 0)?;
    assert!(text(run(&wide, SERIES)).contains("the series ends below 180"));
    assert!(!to.exists());
    let other = golden("onetrainer/doft_g3_linear").join("adapter.safetensors");
    let none = BTreeMap::new();
    assert!(
        text(convert(other, &to, SERIES, &LoadOptions::default(), &none)).contains("magnitude")
    );
    Ok(())
}
