//! Numbers of OneTrainer's own adapter modules: what they compute, and how they train.

mod support;

use candle_core::{DType, Result, Tensor, Var};
use candle_doft::{DoftConfig, DoftLinear, Magnitude, Map};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use support::golden::{golden, load};
use support::tensors::{CPU, relative, values};
use support::tolerance::{GOLDEN_GRADIENTS, GOLDEN_VALUES, TRAJECTORY};

type Tensors = BTreeMap<String, Tensor>;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn one(tensors: &Tensors, end: &str) -> Option<Tensor> {
    let mut found = tensors.iter().filter(|(name, _)| name.ends_with(end));
    let tensor = found.next().map(|(_, tensor)| tensor.clone());
    assert!(found.next().is_none(), "more than one tensor ends in {end}");
    tensor
}

/// The layer as trained there: the stored values are those of this crate, for linear layers.
fn layer(base: &Tensors, adapter: &Tensors, config: DoftConfig) -> Result<(DoftLinear, VarMap)> {
    let rotation = one(adapter, "oft_R.weight").expect("a rotation");
    let kinds = [
        (Magnitude::Log, "dora_log_multiplier"),
        (Magnitude::Factor, "dora_multiplier"),
        (Magnitude::Absolute, "dora_scale"),
    ];
    let magnitude = kinds
        .into_iter()
        .find_map(|(kind, name)| Some((kind, name, one(adapter, name)?)));
    let config = config.with_magnitude(magnitude.as_ref().map_or(Magnitude::None, |m| m.0));
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &CPU);
    let base = Linear::new(one(base, ".weight").expect("a weight"), one(base, ".bias"));
    let layer = DoftLinear::new(base, &config, vb)?;
    let data = varmap.data().lock().unwrap();
    data["oft_R.weight"].set(&rotation)?;
    if let Some((_, name, value)) = magnitude {
        data[name].set(&value.flatten_all()?)?;
    }
    drop(data);
    Ok((layer, varmap))
}

#[test]
fn linear_layers_compute_what_onetrainer_computes_forward_and_backward() -> Result<()> {
    let (unscaled, scaled) = (
        DoftConfig::default().with_scaled(false),
        DoftConfig::default(),
    );
    let series = |config: &DoftConfig, b| config.clone().with_map(Map::SERIES).with_block_size(b);
    let cayley = scaled.clone().with_block_size(16);
    let exponential = scaled
        .clone()
        .with_block_size(16)
        .with_map(Map::Exponential);
    let cases = [
        ("oft_plain", series(&unscaled, 8)),
        ("oft_scaled_bool", series(&scaled, 16)),
        ("oft_scaled_int", series(&scaled, 16)),
        ("doft_g1_linear", series(&scaled, 16)),
        ("doft_g1_zero_row", series(&scaled, 8)),
        ("doft_g2_linear", series(&scaled, 16)),
        ("doft_g3_linear", series(&scaled, 16)),
        ("doft_g3_unscaled_linear", series(&unscaled, 8)),
        ("share_linear", series(&scaled, 8).with_block_share(true)),
        ("odd_block_50_32", series(&scaled, 32)),
        ("odd_block_12_5", series(&scaled, 5)),
        ("clip_inactive", series(&scaled, 16).with_max_norm(0.95)),
        ("clip_active", series(&scaled, 16).with_max_norm(0.95)),
        ("cans_linear", cayley.clone()),
        ("cans_linear_nobias", cayley.clone()),
        ("cans_large", cayley),
        ("cans_exp_linear", exponential),
    ];
    for (case, config) in cases {
        let folder = golden("onetrainer").join(case);
        let base = load(&folder.join("base.safetensors"))?;
        let adapter = load(&folder.join("adapter.safetensors"))?;
        let io = load(&folder.join("io.safetensors"))?;
        let (layer, varmap) = layer(&base, &adapter, config)?;
        let used = json(&folder.join("meta.json"))["layers"][0]["block_size"].clone();
        let layout = layer.layout().expect("an adapted layer");
        assert_eq!(used, layout.block_size, "{case}: block size");

        let x = Var::from_tensor(&io["x"])?;
        let y = layer.forward(&x)?;
        let near = |what: &str, found: &Tensor, tolerance: f64| -> Result<()> {
            let expected = io[what].reshape(found.shape())?;
            let off = relative(found, &expected);
            assert!(off <= tolerance, "{case}: {what} is off by {off:e}");
            Ok(())
        };
        near("y", &y, GOLDEN_VALUES)?;
        near("w_eff", &layer.effective_weight()?, GOLDEN_VALUES)?;
        let grads = (y * &io["g"])?.sum_all()?.backward()?;
        near(
            "grad.x",
            grads.get(&x).expect("a gradient of x"),
            GOLDEN_GRADIENTS,
        )?;
        for (name, var) in varmap.data().lock().unwrap().iter() {
            near(
                &format!("grad.{name}"),
                grads.get(var).expect(name),
                GOLDEN_GRADIENTS,
            )?;
        }
    }
    Ok(())
}

#[test]
fn training_follows_onetrainer_step_by_step() -> Result<()> {
    let root = golden("onetrainer/trajectory");
    let data = load(&root.join("data.safetensors"))?;
    let base = load(&root.join("base.safetensors"))?;
    let x = data["x"].to_dtype(DType::F32)?;
    let weight = &data["target_weight"];
    let target = x
        .matmul(&weight.t()?)?
        .broadcast_add(&data["target_bias"])?;
    for (run, map) in [("neumann", Map::SERIES), ("cans", Map::Cayley)] {
        let at = |step: usize| load(&root.join(format!("{run}/adapter.step{step:02}.safetensors")));
        let config = DoftConfig::default().with_block_size(16).with_map(map);
        let (layer, varmap) = layer(&base, &at(0)?, config)?;
        let params = ParamsAdamW {
            lr: 1e-2,
            weight_decay: 0.,
            ..Default::default()
        };
        let mut optimizer = AdamW::new(varmap.all_vars(), params)?;
        let losses = json(&root.join(format!("{run}/loss.json")));
        let mut expected: Vec<f64> = numbers(&losses["loss_before_step"]);
        expected.extend(losses["loss_after_last_step"].as_f64());
        assert_eq!(expected.len(), 41);
        for (step, expected) in expected.iter().enumerate() {
            if [1, 10, 40].contains(&step) {
                compare(&varmap, &at(step)?, &format!("{run}, step {step}"))?;
            }
            let found = loss::mse(&layer.forward(&x)?, &target)?;
            let value = f64::from(found.to_scalar::<f32>()?);
            let off = (value / expected - 1.).abs();
            assert!(
                off < TRAJECTORY,
                "{run}: the loss after {step} steps is off by {off:e}"
            );
            optimizer.backward_step(&found)?;
        }
    }
    Ok(())
}

fn compare(varmap: &VarMap, expected: &Tensors, what: &str) -> Result<()> {
    for (name, var) in varmap.data().lock().unwrap().iter() {
        let expected = one(expected, name).expect(name).reshape(var.shape())?;
        for (found, expected) in values(var).iter().zip(values(&expected)) {
            let off = (found - expected).abs();
            assert!(off < TRAJECTORY, "{what}: {name} is off by {off:e}");
        }
    }
    Ok(())
}

fn numbers(list: &Value) -> Vec<f64> {
    let list = list.as_array().expect("a list");
    list.iter().map(|v| v.as_f64().expect("a number")).collect()
}
