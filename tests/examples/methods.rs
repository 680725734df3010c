//! The methods that DOFT is compared with are what their papers say: LoRA and DoRA against plain
//! matrices, central differences, and their own merged weights.

use crate::common::slopes::check_slopes;
use crate::common::tensors::{CPU, disturb_all, linear, relative, seeded, values};
use crate::common::tolerance::{SLOPE, SLOPE_FLOOR};
use crate::common::{assert_close, central_difference, dot};
use crate::support::methods::{Method, Tuned, TunerBuilder};
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::{Linear, Module};

const OUT: usize = 5;
const WIDTH: usize = 7;
const RANK: usize = 3;
const TOKENS: usize = 4;

/// Not the rank, so that a scale that is forgotten or applied twice shows.
const ALPHA: f64 = 4.5;

const METHODS: [Method; 2] = [
    Method::Lora {
        rank: RANK,
        alpha: ALPHA,
    },
    Method::Dora {
        rank: RANK,
        alpha: ALPHA,
    },
];

struct Case {
    base: Linear,
    layer: Tuned,
    vars: Vec<(String, Var)>,
    x: Tensor,
    upstream: Tensor,
}

impl Case {
    /// A layer in f64 whose every parameter was moved from its start.
    fn new(method: &Method, bias: bool) -> candle_doft::Result<Self> {
        let base = linear(OUT, WIDTH, bias, DType::F64)?;
        let builder = TunerBuilder::new(method.clone(), 3, &CPU)?;
        let layer = builder.wrap_linear("layer", base.clone())?;
        let tuner = builder.finish()?;
        let vars = tuner.named_vars();
        disturb_all(vars.iter().map(|(_, var)| var.clone()), 0.4)?;
        Ok(Self {
            base,
            layer,
            vars,
            x: seeded((TOKENS, WIDTH), 4),
            upstream: seeded((TOKENS, OUT), 5),
        })
    }

    fn var(&self, role: &str) -> &Var {
        let name = format!("layer.{role}");
        let found = self.vars.iter().find(|(n, _)| *n == name);
        &found.unwrap_or_else(|| panic!("no {name}")).1
    }

    /// `V = W + alpha / rank B A`, row by row.
    fn direction(&self, a: &[f64], b: &[f64]) -> Vec<f64> {
        let mut v = values(self.base.weight());
        for o in 0..OUT {
            for i in 0..WIDTH {
                let product: f64 = (0..RANK).map(|r| b[o * RANK + r] * a[r * WIDTH + i]).sum();
                v[o * WIDTH + i] += ALPHA / RANK as f64 * product;
            }
        }
        v
    }

    /// `sum((x (diag(ratio) V)^T + bias) * upstream)` and the output itself.
    fn loss(&self, v: &[f64], ratio: &[f64]) -> (f64, Vec<f64>) {
        let (x, bias) = (values(&self.x), self.base.bias().map(values));
        let mut y = vec![0.; TOKENS * OUT];
        for t in 0..TOKENS {
            for o in 0..OUT {
                let product = dot(&x[t * WIDTH..][..WIDTH], &v[o * WIDTH..][..WIDTH]);
                y[t * OUT + o] = ratio[o] * product + bias.as_ref().map_or(0., |b| b[o]);
            }
        }
        (dot(&y, &values(&self.upstream)), y)
    }
}

fn norms(v: &[f64]) -> Vec<f64> {
    v.chunks(WIDTH).map(|row| dot(row, row).sqrt()).collect()
}

#[test]
fn lora_and_dora_match_plain_matrices_and_slopes() -> candle_doft::Result<()> {
    for bias in [false, true] {
        for method in &METHODS {
            let case = Case::new(method, bias)?;
            let is_dora = matches!(method, Method::Dora { .. });
            let (a, b) = (
                values(case.var("lora_A.weight")),
                values(case.var("lora_B.weight")),
            );
            let v = case.direction(&a, &b);
            let m = match is_dora {
                true => values(case.var("lora_magnitude_vector.weight")),
                false => vec![1.; OUT],
            };
            // DoRA takes the norm as a constant in the backward pass (its equation 11).
            let held = if is_dora { norms(&v) } else { vec![1.; OUT] };
            let ratio =
                |m: &[f64]| -> Vec<f64> { m.iter().zip(&held).map(|(m, n)| m / n).collect() };
            let (_, expected) = case.loss(&v, &ratio(&m));
            let y = case.layer.forward(&case.x)?;
            assert_close("y", &y, &expected, 1e-14, 1e-14);

            let grads = (y * &case.upstream)?.sum_all()?.backward()?;
            let check = |role: &str, slope: Vec<f64>| {
                let scale = slope.iter().fold(0f64, |s, v| s.max(v.abs()));
                let grad = grads
                    .get(case.var(role))
                    .unwrap_or_else(|| panic!("{role}"));
                let what = format!("{method:?}: d{role}");
                assert_close(&what, grad, &slope, SLOPE_FLOOR * scale, SLOPE);
            };
            let of_a = |a: &[f64]| case.loss(&case.direction(a, &b), &ratio(&m)).0;
            check("lora_A.weight", central_difference(of_a, &a, 1e-5));
            let of_b = |b: &[f64]| case.loss(&case.direction(&a, b), &ratio(&m)).0;
            check("lora_B.weight", central_difference(of_b, &b, 1e-5));
            if is_dora {
                let of_m = |m: &[f64]| case.loss(&v, &ratio(m)).0;
                let slope = central_difference(of_m, &m, 1e-5);
                check("lora_magnitude_vector.weight", slope);
            }
        }
    }
    Ok(())
}

#[test]
fn merged_weights_are_the_papers() -> candle_doft::Result<()> {
    for bias in [false, true] {
        for method in &METHODS {
            let case = Case::new(method, bias)?;
            let (a, b) = (
                values(case.var("lora_A.weight")),
                values(case.var("lora_B.weight")),
            );
            let mut expected = case.direction(&a, &b);
            if matches!(method, Method::Dora { .. }) {
                let m = values(case.var("lora_magnitude_vector.weight"));
                let norms = norms(&expected);
                for (i, w) in expected.iter_mut().enumerate() {
                    *w *= m[i / WIDTH] / norms[i / WIDTH];
                }
            }
            let merged = case.layer.merge()?;
            assert_close("merged", merged.weight(), &expected, 1e-14, 1e-14);
            assert_eq!(merged.bias().is_some(), bias);
            let off = relative(&merged.forward(&case.x)?, &case.layer.forward(&case.x)?);
            assert!(off < 1e-14, "{method:?}: merged is {off:e} away");
        }
    }
    Ok(())
}

#[test]
fn they_start_at_the_base_with_the_usual_values() -> candle_doft::Result<()> {
    let base = linear(OUT, WIDTH, true, DType::F64)?;
    let x = seeded((TOKENS, WIDTH), 4);
    for method in &METHODS {
        let builder = TunerBuilder::new(method.clone(), 3, &CPU)?;
        let layer = builder.wrap_linear("layer", base.clone())?;
        let tuner = builder.finish()?;
        let off = relative(&layer.forward(&x)?, &base.forward(&x)?);
        assert!(off < 1e-14, "{method:?} starts {off:e} away");
        let bound = 1. / (WIDTH as f64).sqrt();
        for (name, var) in tuner.named_vars() {
            let found = values(&var);
            let largest = found.iter().fold(0f64, |s, v| s.max(v.abs()));
            match name.as_str() {
                // Uniform up to the bound: the largest of 21 is above its half but for a chance of 2^-21.
                "layer.lora_A.weight" => {
                    assert!(largest <= bound && largest > bound / 2., "{largest}");
                    assert!(found.iter().any(|v| *v < 0.) && found.iter().any(|v| *v > 0.));
                }
                "layer.lora_B.weight" => assert_eq!(largest, 0.),
                "layer.lora_magnitude_vector.weight" => {
                    let norms = norms(&values(base.weight()));
                    assert_close("m", &var, &norms, 1e-14, 1e-14);
                }
                other => panic!("{other} is not of {method:?}"),
            }
        }
    }
    Ok(())
}

#[test]
fn full_fine_tuning_trains_weight_and_bias() -> Result<()> {
    let base = linear(OUT, WIDTH, true, DType::F64)?;
    let builder = TunerBuilder::new(Method::Full, 0, &CPU)?;
    let layer = builder.wrap_linear("layer", base.clone())?;
    let tuner = builder.finish()?;
    let x = seeded((TOKENS, WIDTH), 4);
    let vars = tuner.named_vars();
    assert_eq!(vars.len(), 2);
    check_slopes("full", &vars, || layer.forward(&x))
}
