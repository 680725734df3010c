//! Rows of one batch under eight adapters, through one linear layer.

use super::{Run, seeded};
use candle_core::{Device, Result, Tensor};
use candle_doft::{Adapter, Adapters, DoftConfig, DoftLinear, Mode, Targets};
use candle_nn::{Linear, Module};
use std::hint::black_box;

/// Adapters, and indices of axis 0, each with its own.
pub const ADAPTERS: usize = 8;

/// Width of the layer, in and out.
pub const WIDTH: usize = 1024;

/// `8xTx1024x1024`: a batch of eight, `T` tokens each.
pub fn name(tokens: usize) -> String {
    format!("{ADAPTERS}x{tokens}x{WIDTH}x{WIDTH}")
}

/// A layer with eight adapters of blocks of 32, away from their start.
fn layer() -> Result<(DoftLinear, Adapters)> {
    let nothing = DoftConfig::default().with_targets(Targets::None);
    let builder = Adapter::builder(nothing, &Device::Cpu)?;
    let weight = (seeded((WIDTH, WIDTH), 1)? / (WIDTH as f64).sqrt())?;
    let layer = builder.wrap("layer", Linear::new(weight, None))?;
    let adapters = Adapters::new("", builder.finish()?);
    for i in 0..ADAPTERS {
        let adapter = adapters.add(&i.to_string(), DoftConfig::default())?;
        for (at, var) in adapter.vars().iter().enumerate() {
            let values = seeded(var.shape().clone(), (10 * i + at) as u64)?;
            var.set(&(values * 0.1)?)?;
        }
    }
    Ok((layer, adapters))
}

/// One pass of `tokens` tokens for each of eight rows: `mixed`, each under an adapter of its own; `one`, all under
/// the same; `merged`, each through a plain layer of its own, one after the other.
pub fn run(way: &str, tokens: usize) -> Result<Run> {
    let x = seeded((ADAPTERS, tokens, WIDTH), 2)?;
    let (layer, adapters) = layer()?;
    let names: Vec<String> = (0..ADAPTERS).map(|i| i.to_string()).collect();
    let rows: Vec<Option<&str>> = names.iter().map(|name| Some(name.as_str())).collect();
    let mixed = adapters.rows(&rows)?;
    let mut merged = Vec::new();
    for name in &names {
        // What the layer makes of the identity is its weight.
        let eye = Tensor::eye(WIDTH, x.dtype(), x.device())?;
        let held = adapters.get(name)?.scope(Mode::Eval)?;
        let weight = held.run(|| layer.forward(&eye))?.t()?.contiguous()?;
        merged.push(Linear::new(weight, None));
    }
    let in_turn = move |x: &Tensor| -> Result<Vec<Tensor>> {
        let each = merged.iter().enumerate();
        each.map(|(row, layer)| layer.forward(&x.narrow(0, row, 1)?))
            .collect()
    };
    let expected = Tensor::cat(&in_turn(&x)?, 0)?;
    let off = (mixed.run(|| layer.forward(&x))? - expected)?;
    let off = off.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(off < 1e-4, "mixed rows are off by {off}");
    Ok(match way {
        "mixed" => Box::new(move || {
            black_box(mixed.run(|| layer.forward(&x))?);
            Ok(())
        }),
        "one" => {
            let one = adapters.get(&names[0])?.scope(Mode::Eval)?;
            Box::new(move || {
                black_box(one.run(|| layer.forward(&x))?);
                Ok(())
            })
        }
        "merged" => Box::new(move || {
            black_box(in_turn(&x)?);
            Ok(())
        }),
        other => candle_core::bail!("no way `{other}`"),
    })
}
