//! Layers of which each rank holds a part compute what whole layers do in one process: forward, every gradient, and
//! the adapter file.

use crate::common::tensors::{CPU, disturb, named, seeded};
use crate::threads::on_ranks;
use candle_core::{DType, Tensor, Var};
use candle_doft::train::parallel::{
    self, ColumnParallel, DoftColumnParallel, DoftRowParallel, Exchange, Processes, RowParallel,
};
use candle_doft::{Adapter, DoftConfig, DoftLinear, Error, Magnitude, Result, frozen};
use candle_nn::{Linear, Module, VarBuilder, VarMap};
use std::collections::BTreeMap;
use std::path::Path;

const WIDTHS: [usize; 3] = [32, 48, 40];
const PATHS: [&str; 2] = ["up", "down"];

fn weights() -> Result<[Linear; 2]> {
    let layer = |i: usize| -> Result<Linear> {
        let (width, out) = (WIDTHS[i], WIDTHS[i + 1]);
        let weight = (seeded((out, width), i as u64) / (width as f64).sqrt())?;
        Ok(Linear::new(weight, Some(seeded(out, 10 + i as u64))))
    };
    Ok([layer(0)?, layer(1)?])
}

fn part(x: &Tensor, dim: usize, group: &Exchange) -> Result<Tensor> {
    let part = x.dim(dim)? / group.size();
    Ok(x.narrow(dim, group.rank() * part, part)?.contiguous()?)
}

/// Rows of the first layer with their bias, columns of the last with all of it.
fn parts(group: &Exchange) -> Result<[Linear; 2]> {
    let [up, down] = weights()?;
    let bias = up.bias().map(|bias| part(bias, 0, group)).transpose()?;
    let up = Linear::new(part(up.weight(), 0, group)?, bias);
    let down = Linear::new(part(down.weight(), 1, group)?, down.bias().cloned());
    Ok([up, down])
}

/// What came out of two layers: output, gradient of the input, and of each parameter by its name.
struct Pass {
    output: Tensor,
    grads: BTreeMap<String, Tensor>,
}

fn pass(up: &dyn Module, down: &dyn Module, varmap: &VarMap) -> Result<Pass> {
    let x = Var::from_tensor(&seeded((2, 3, WIDTHS[0]), 30))?;
    let output = down.forward(&up.forward(x.as_tensor())?.tanh()?)?;
    let uneven = seeded(output.dims(), 31);
    let store = (&output * uneven)?.sum_all()?.backward()?;
    let vars = named(varmap, [("the input", &x)]).into_iter();
    let grads = vars.map(|(name, var)| (name, store.get(&var).unwrap().clone()));
    Ok(Pass {
        grads: grads.collect(),
        output: output.detach(),
    })
}

fn assert_same(what: &str, found: &Tensor, expected: &Tensor) -> Result<()> {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let off = (found - expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
    let size = expected.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(size > 1e-3, "{what} is {size:e}, which shows nothing");
    assert!(off <= 1e-12 * size, "{what} is off by {off:e} of {size:e}");
    Ok(())
}

/// What a rank has of a parameter, or of its gradient.
fn mine(name: &str, whole: &Tensor, shared: bool, group: &Exchange) -> Result<Tensor> {
    match (name.starts_with("up"), name.contains("oft_R")) {
        (true, false) => part(whole, 0, group),
        (false, true) if name != "the input" && !shared => part(whole, 0, group),
        _ => Ok(whole.clone()),
    }
}

/// The layers in one process, their parameters away from the start.
fn whole(config: &DoftConfig) -> Result<([DoftLinear; 2], VarMap)> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F64, &CPU);
    let [up, down] = weights()?;
    let up = DoftLinear::new(up, config, vb.pp(PATHS[0]))?;
    let down = DoftLinear::new(down, config, vb.pp(PATHS[1]))?;
    disturb(&varmap, 0.2)?;
    Ok(([up, down], varmap))
}

/// One rank of the comparison, under any engine. `file` is one that all ranks can reach.
pub fn compare(group: Box<dyn Processes>, config: &DoftConfig, file: &Path) -> Result<()> {
    let group = Exchange::new(group);
    let (layers, all) = whole(config)?;
    let one = pass(&layers[0], &layers[1], &all)?;
    assert_eq!(one.output.dtype(), DType::F64);

    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F64, &CPU);
    let [up, down] = parts(&group)?;
    let up = DoftColumnParallel::new(up, config, &group, vb.pp(PATHS[0]))?;
    let down = DoftRowParallel::new(down, config, &group, vb.pp(PATHS[1]))?;
    let norms = down.params().norms();
    let [_, base] = weights()?;
    let expected = candle_doft::params::row_norms(base.weight())?;
    assert_same("the norms", norms, &expected)?;
    let all: BTreeMap<String, Var> = named(&all, []).into_iter().collect();
    let vars = named(&varmap, []);
    assert_eq!(vars.len(), all.len());
    for (name, var) in vars {
        let value = all[&name].as_tensor();
        var.set(&mine(&name, value, config.block_share, &group)?)?;
    }

    let found = pass(&up, &down, &varmap)?;
    assert_same("the output", &found.output, &one.output)?;
    assert_eq!(found.grads.len(), one.grads.len());
    for (name, expected) in &one.grads {
        let expected = mine(name, expected, config.block_share, &group)?;
        assert_same(name, &found.grads[name], &expected)?;
    }

    let merged = [&layers[0], &layers[1]].map(DoftLinear::effective_weight);
    let [of_up, of_down] = merged;
    let (of_up, of_down) = (of_up?, of_down?);
    assert_same("rows", &up.effective_weight()?, &part(&of_up, 0, &group)?)?;
    let columns = part(&of_down, 1, &group)?;
    assert_same("columns", &down.effective_weight()?, &columns)?;

    parallel::save(&group, file, &[&up, &down])?;
    let builder = Adapter::load(file, &CPU)?;
    let mut loaded = Vec::new();
    for (base, path) in weights()?.into_iter().zip(PATHS) {
        loaded.push(builder.wrap(path, base)?);
    }
    let adapter = builder.finish()?;
    assert!(adapter.warnings().is_empty(), "{:?}", adapter.warnings());
    let expected = [of_up, of_down];
    for (layer, expected) in loaded.iter().zip(expected) {
        let merged = layer.merge()?;
        assert_same("the merged weight", merged.weight(), &expected)?;
    }
    Box::new(group).finish()
}

/// What every engine has to show.
pub fn configs() -> Vec<DoftConfig> {
    let config = DoftConfig::default().with_block_size(8);
    let kinds = [
        Magnitude::Log,
        Magnitude::Factor,
        Magnitude::Absolute,
        Magnitude::None,
    ];
    let kinds = kinds.map(|kind| config.clone().with_magnitude(kind));
    let shared = config.with_block_share(true);
    kinds.into_iter().chain([shared]).collect()
}

#[test]
fn ranks_with_parts_of_the_layers_compute_what_one_does() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    for size in [1, 2, 3] {
        for config in configs() {
            let work =
                |rank: &crate::threads::Rank| compare(Box::new(rank.clone()), &config, &file);
            on_ranks(size, work).0.into_iter().collect::<Result<()>>()?;
        }
    }
    Ok(())
}

#[test]
fn frozen_parts_compute_what_the_whole_does() -> Result<()> {
    let [up, down] = weights()?.map(frozen::Linear::from);
    let one = pass(&up, &down, &VarMap::new())?;
    let work = |rank: &crate::threads::Rank| -> Result<()> {
        let group = Exchange::new(Box::new(rank.clone()));
        let [up, down] = parts(&group)?;
        let up = ColumnParallel::new(up, &group)?;
        let down = RowParallel::new(down, &group)?;
        let found = pass(&up, &down, &VarMap::new())?;
        assert_same("the output", &found.output, &one.output)?;
        let input = "the input";
        assert_same(input, &found.grads[input], &one.grads[input])
    };
    for size in [1, 2, 4] {
        on_ranks(size, work).0.into_iter().collect::<Result<()>>()?;
    }
    Ok(())
}

/// The errors of two ranks, for layers that rank 1 builds as `odd` says.
fn errors(config: &DoftConfig, odd: bool) -> Vec<String> {
    let work = |rank: &crate::threads::Rank| -> Result<String> {
        let group = Exchange::new(Box::new(rank.clone()));
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F64, &CPU).pp("down");
        let rows = if odd && group.rank() == 1 { 7 } else { 8 };
        let base = Linear::new(seeded((rows, 24), 1), None);
        let made = DoftRowParallel::new(base, config, &group, vb);
        let error = made.map(drop).unwrap_err();
        assert!(varmap.all_vars().is_empty());
        Ok(error.to_string())
    };
    on_ranks(2, work)
        .0
        .into_iter()
        .map(Result::unwrap)
        .collect()
}

#[test]
fn what_cannot_be_split_is_refused_on_all_ranks() {
    let config = DoftConfig::default().with_block_size(16);
    for (config, odd, expected) in [
        (config.clone(), true, "rank 1: the part of `down`: "),
        (
            config,
            false,
            "24 of `down`, which cuts a block, expected a multiple of the block size 16",
        ),
        (
            DoftConfig::default().with_dropout(0.1),
            false,
            "the dropout is 0.1, expected 0",
        ),
        (
            DoftConfig::lora(2, 2.),
            false,
            "the adapter is low-rank matrices, expected a rotation",
        ),
    ] {
        for error in errors(&config, odd) {
            assert!(error.contains(expected), "{error}");
        }
    }
}

#[test]
fn copies_that_drift_apart_are_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let config = DoftConfig::default().with_block_size(8);
    let work = |rank: &crate::threads::Rank| -> Result<[String; 2]> {
        let group = Exchange::new(Box::new(rank.clone()));
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F64, &CPU);
        let [up, _] = parts(&group)?;
        let up = DoftColumnParallel::new(up, &config, &group, vb.pp("up"))?;
        let none = parallel::save(&group, &file, &[]).unwrap_err();
        assert!(matches!(none, Error::NoLayers));
        let twice = parallel::save(&group, &file, &[&up, &up]).unwrap_err();
        let (_, var) = named(&varmap, [])
            .into_iter()
            .find(|(name, _)| name.contains("oft_R"))
            .unwrap();
        var.set(&(var.as_tensor() + 1e-9 * group.rank() as f64)?)?;
        let drifted = parallel::save(&group, &file, &[&up]).unwrap_err();
        Ok([twice, drifted].map(|error| error.to_string()))
    };
    for errors in on_ranks(2, work).0 {
        let [twice, drifted] = errors.unwrap();
        assert!(twice.contains("`up` twice"), "{twice}");
        let expected = "rank 1: its `up.oft_R.weight` is not that of rank 0";
        assert!(drifted.starts_with(expected), "{drifted}");
    }
    assert!(!file.exists());
}

#[test]
fn a_layer_whose_group_is_gone_or_elsewhere_says_so() -> Result<()> {
    let work = |rank: &crate::threads::Rank| -> Result<()> {
        let group = Exchange::new(Box::new(rank.clone()));
        let down = RowParallel::new(parts(&group)?[1].clone(), &group)?;
        let x = part(&seeded((2, WIDTHS[1]), 5), 1, &group)?;
        down.forward(&x)?;
        let elsewhere = || std::thread::scope(|s| s.spawn(|| down.forward(&x)).join().unwrap());
        let text = elsewhere().unwrap_err().to_string();
        assert!(
            text.contains("one without the group of the layer"),
            "{text}"
        );
        Box::new(group).finish()?;
        assert_eq!(down.forward(&x).unwrap_err().to_string(), text);
        Ok(())
    };
    on_ranks(2, work).0.into_iter().collect()
}
