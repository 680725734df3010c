//! Series that are projected on rotations.

use super::support::golden::golden;
use super::support::tensors::{CPU, relative, values};
use super::{Home, f64_config, load, seeded, text};
use candle_core::Tensor;
use candle_doft::file::{Cause, Changes, LoadOptions, Target, convert_with};
use candle_doft::merge::inspect;
use candle_doft::rotation::{cayley, cayley_neumann, orthogonality_error, skew};
use candle_doft::{Adapter, Magnitude, Map, Result};
use candle_nn::Linear;
use std::path::PathBuf;

fn mended() -> Changes {
    Changes::default().with_projection(true)
}

fn series(terms: usize, last_coefficient: u8) -> Map {
    Map::CayleyNeumann {
        terms,
        last_coefficient,
    }
}

/// An adapter of one layer with one plane of `v`.
fn plane(home: &Home, map: Map, v: f64) -> Result<PathBuf> {
    let config = f64_config()
        .with_block_size(2)
        .with_scaled(false)
        .with_map(map);
    let builder = Adapter::builder(config.with_magnitude(Magnitude::None), &CPU)?;
    builder.wrap("head", Linear::new(seeded((3, 2), 1), None))?;
    let adapter = builder.finish()?;
    adapter.rotation_vars()[0].set(&Tensor::new(&[[v]], &CPU)?)?;
    adapter.save(home.path("plane"))?;
    Ok(home.path("plane"))
}

/// The polar factor of a matrix of full rank: Newton's iteration on the inverse of the transpose, here
/// `X <- X (3 I - X^T X) / 2`, which needs singular values below the square root of 3.
fn polar(r: &Tensor) -> Result<Tensor> {
    let eye = (Tensor::eye(r.dim(1)?, r.dtype(), &CPU)? * 3.)?;
    let mut x = r.clone();
    for _ in 0..60 {
        let square = x.transpose(1, 2)?.matmul(&x)?;
        x = (x.matmul(&eye.broadcast_sub(&square)?)? / 2.)?;
    }
    Ok(x)
}

#[test]
fn each_series_becomes_the_rotation_nearest_to_it() -> Result<()> {
    let home = Home::new();
    for (map, cap) in [
        (series(5, 1), None),
        (series(5, 2), None),
        (series(4, 1), Some(0.3)),
        (series(7, 1), None),
        (series(2, 1), None),
        (series(1, 1), None),
    ] {
        let config = f64_config().with_map(map).with_max_norm(cap);
        let adapter = home.adapter("adapter", config, 0.25, 1)?;
        let (file, done) = home.convert(&adapter, "mended", Target::Doft, mended())?;
        let found = inspect(&file, &LoadOptions::default(), None)?;
        assert_eq!(done.changes.len(), found.layers.len());
        for (layer, change) in found.layers.iter().zip(&done.changes) {
            assert_eq!(
                (layer.map, &layer.path, change.cause),
                (Map::Cayley, &change.path, Cause::Projection)
            );
            assert!(layer.orthogonality_error < 1e-13, "{map}: {}", layer.path);
        }
        // By the slow way, for one layer: rows of `a`, their series, its polar factor.
        let c = 2. * 7f64.sqrt();
        let mut q = skew(&(&load(&adapter)?["a.oft_R.weight"] / c)?, 8)?;
        if let Some(cap) = cap {
            q = candle_doft::rotation::clip(&q, cap)?;
        }
        let Map::CayleyNeumann {
            terms,
            last_coefficient,
        } = map
        else {
            unreachable!("a series")
        };
        let before = cayley_neumann(&q, terms, last_coefficient)?;
        let expected = polar(&before)?;
        assert!(orthogonality_error(&expected)? < 1e-13);
        let after = cayley(&skew(&(&load(&file)?["a.oft_R.weight"] / c)?, 8)?)?;
        assert!(relative(&after, &expected) < 1e-12, "{map}");
        let off = values(&(after - before)?)
            .iter()
            .fold(0f64, |most, v| most.max(v.abs()));
        let change = &done.changes[0];
        assert!((change.largest_entry - off).abs() < 1e-12, "{map}");
        assert!(change.weight_share >= off && change.weight_share < 1.);
        let said = done
            .warnings
            .iter()
            .any(|w| w.message.contains("its series was projected"));
        assert!(said, "{map}");
    }
    Ok(())
}

#[test]
fn one_plane_by_hand() -> Result<()> {
    // v = 0.5: the series gives (0.5625, 0.75), of length 0.9375; its direction is (0.6, 0.8), which is
    // Cayley's of the same v.
    let home = Home::new();
    let file = plane(&home, Map::SERIES, 0.5)?;
    let (options, none) = (LoadOptions::default(), Default::default());
    let to = home.path("mended");
    let done = convert_with(&file, &to, Target::Doft, &options, &none, &mended())?;
    assert!((values(&load(&to)?["head.oft_R.weight"])[0] - 0.5).abs() < 1e-15);
    assert!((done.changes[0].weight_share - 0.0625).abs() < 1e-14);
    assert!((done.changes[0].largest_entry - 0.05).abs() < 1e-14);
    // A strength comes after it.
    let half = mended().with_strength(0.5);
    convert_with(&file, &to, Target::Doft, &options, &none, &half)?;
    let expected = (0.5 * 0.5f64.atan()).tan();
    assert!((values(&load(&to)?["head.oft_R.weight"])[0] - expected).abs() < 1e-15);
    Ok(())
}

#[test]
fn a_block_without_a_nearest_rotation_is_refused() -> Result<()> {
    let home = Home::new();
    let (options, none) = (LoadOptions::default(), Default::default());
    let to = home.path("mended");
    let run = |file: PathBuf| convert_with(file, &to, Target::Doft, &options, &none, &mended());
    for v in [1., 0.999] {
        let said = text(run(plane(&home, Map::SERIES, v)?));
        assert!(
            said.contains("layer `head`") && said.contains("singular value"),
            "{said}"
        );
    }
    // 1 - 2 v^2 + v^4 .. beyond 1 the sign of the series changes, and its angle passes 180 degrees.
    let wide = plane(&home, series(3, 2), 1e9)?;
    assert!(text(run(wide)).contains("ends below 180"));
    assert!(!to.exists());
    Ok(())
}

#[test]
fn adapters_of_other_tools_are_mended_and_orthogonal_ones_stay() -> Result<()> {
    let home = Home::new();
    let to = home.path("mended");
    let (options, none) = (LoadOptions::default(), Default::default());
    for (tool, case) in [("onetrainer", "doft_g3_linear"), ("peft", "linear_default")] {
        let folder = golden(tool).join(case);
        let source = match tool {
            "peft" => folder,
            _ => folder.join("adapter.safetensors"),
        };
        let before = inspect(&source, &options, None)?;
        assert!(before.layers[0].orthogonality_error > 1e-6);
        convert_with(&source, &to, Target::Doft, &options, &none, &mended())?;
        let after = inspect(&to, &options, None)?;
        assert!(
            after
                .layers
                .iter()
                .all(|layer| layer.orthogonality_error < 1e-6)
        );
    }
    let adapter = home.adapter("adapter", f64_config(), 0.2, 0)?;
    let (same, done) = home.convert(&adapter, "same", Target::Doft, mended())?;
    assert!(done.changes.is_empty());
    assert!(done.warnings[0].message.contains("nothing was projected"));
    assert_eq!(
        std::fs::read(adapter).unwrap(),
        std::fs::read(same).unwrap()
    );
    Ok(())
}
