//! What a layer is made of, each alone: the map from parameters to rotations, a merge, one decoded token.

use super::plain::series;
use super::{Run, seeded};
use candle_core::{Device, Result, Tensor, Var};
use candle_doft::{Adapter, DoftConfig, DoftLinear, Map, Mode, rotation};
use candle_nn::{Linear, Module};
use std::hint::black_box;

/// Width of the layer whose rotations are made.
pub const WIDTH: usize = 1024;

/// Block sizes of the group `rotation`.
pub const SIZES: [usize; 6] = [8, 16, 32, 64, 128, 256];

/// `<blocks>x<b>`, as bench ids have it.
pub fn blocks(b: usize) -> String {
    format!("{}x{b}", WIDTH / b)
}

/// Maps of this crate, and two ways to write them with candle alone.
pub const MAPS: [&str; 5] = [
    "cayley",
    "series",
    "exponential",
    "candle_series",
    "candle_newton",
];

/// `R = map(skew(theta))` for a layer of [`WIDTH`], and back to theta; and the distance of `R` from
/// orthogonal, which stands beside its time.
pub fn map(name: &str, b: usize) -> Result<(Run, f64)> {
    let name = name.to_string();
    let n = b * (b - 1) / 2;
    let scale = 0.5 / (2. * ((b - 1) as f64).sqrt());
    let theta = Var::from_tensor(&(seeded((WIDTH / b, n), 1)? * scale)?)?;
    let upstream = seeded((WIDTH / b, b, b), 2)?;
    let map = match name.as_str() {
        "series" => Map::CayleyNeumann {
            terms: 5,
            last_coefficient: 1,
        },
        "exponential" => Map::Exponential,
        _ => Map::Cayley,
    };
    let config = DoftConfig::default().with_block_size(b).with_scaled(false);
    let layout = config.with_map(map).layout("layer", WIDTH)?;
    let turn = move |theta: &Tensor| -> Result<Tensor> {
        match name.as_str() {
            // As layers do it.
            "cayley" | "series" | "exponential" => Ok(rotation::rotation(theta, &layout)?),
            "candle_series" => series(&rotation::skew(theta, b)?),
            "candle_newton" => newton(&rotation::skew(theta, b)?),
            other => candle_core::bail!("no map `{other}`"),
        }
    };
    let error = rotation::orthogonality_error(&turn(&theta)?)?;
    let run = move || {
        let grads = (turn(&theta)? * &upstream)?.sum_all()?.backward()?;
        assert!(grads.get(&theta).is_some());
        black_box(grads);
        Ok(())
    };
    Ok((Box::new(run), error))
}

fn eye(q: &Tensor) -> Result<Tensor> {
    Tensor::eye(q.dim(1)?, q.dtype(), q.device())?.broadcast_as(q.shape())
}

/// `2 (I - Q)^-1 - I` by ten steps of Newton and Schulz, each of two products.
fn newton(q: &Tensor) -> Result<Tensor> {
    let m = (eye(q)? - q)?;
    let largest = q.detach().sqr()?.sum_keepdim(2)?.sum_keepdim(1)?;
    let mut x = m.t()?.broadcast_div(&((largest * 0.5)? + 1.)?)?;
    for _ in 0..10 {
        x = x.matmul(&((eye(q)? * 2.)? - m.matmul(&x)?)?)?;
    }
    (x * 2.)? - eye(q)?
}

fn layer(width: usize, out: usize) -> Result<(Linear, DoftLinear, Adapter)> {
    let base = Linear::new((seeded((out, width), 1)? / (width as f64).sqrt())?, None);
    let builder = Adapter::builder(DoftConfig::default(), &Device::Cpu)?;
    let layer = builder.wrap("layer", base.clone())?;
    let adapter = builder.finish()?;
    for var in adapter.vars() {
        let values = seeded(var.shape().clone(), 3)?;
        var.set(&(values * 0.1)?)?;
    }
    Ok((base, layer, adapter))
}

/// Ways to decode one token.
pub const DECODE: [&str; 3] = ["merged", "cached", "rebuilt"];

/// One token through a layer: `merged` into a plain candle layer, unmerged with its rotations `cached`,
/// or with them `rebuilt` from the parameters.
pub fn decode(name: &str, (rows, width, out): super::Shape) -> Result<Run> {
    let x = seeded((rows, width), 2)?;
    let (_, layer, adapter) = layer(width, out)?;
    let merged = layer.merge()?;
    let expected = merged.forward(&x)?;
    let held = adapter.scope(Mode::Eval)?;
    let off = (held.run(|| layer.forward(&x))? - expected)?
        .abs()?
        .max_all()?;
    assert!(off.to_scalar::<f32>()? < 1e-4, "unmerged is off by {off}");
    let forward: Box<dyn Fn() -> Result<Tensor>> = match name {
        "merged" => Box::new(move || merged.forward(&x)),
        "cached" => Box::new(move || held.run(|| layer.forward(&x))),
        "rebuilt" => Box::new(move || layer.forward(&x)),
        other => candle_core::bail!("no way `{other}`"),
    };
    Ok(Box::new(move || {
        black_box(forward()?);
        Ok(())
    }))
}

/// The merge of one layer, and for comparison the copy of its weight.
pub fn merge(name: &str, (width, out): (usize, usize)) -> Result<Run> {
    let (base, layer, _) = layer(width, out)?;
    let copy = match name {
        "doft" => false,
        "copy" => true,
        other => candle_core::bail!("no way `{other}`"),
    };
    Ok(Box::new(move || {
        match copy {
            true => drop(black_box(base.weight().copy()?)),
            false => drop(black_box(layer.merge()?)),
        }
        Ok(())
    }))
}
