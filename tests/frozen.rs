//! The frozen functions against candle's: the same results, and gradients where candle's have none.

mod support;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Result, Tensor, Var};
use candle_doft::{Adapter, DoftConfig, frozen};
use candle_nn::{Linear, Module, VarBuilder};
use std::sync::Arc;
use support::slopes::check_slopes;
use support::tensors::{CPU, bits, named, relative, seeded};

/// 2^-17, which f32 holds.
const EPS: f64 = 7.62939453125e-6;

type Function = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// candle's function and ours, for one shape of input.
struct Pair {
    name: &'static str,
    shape: Vec<usize>,
    candle: Function,
    ours: Function,
    /// Whether candle's passes a gradient on.
    whole: bool,
}

fn pair(
    name: &'static str,
    shape: &[usize],
    candle: impl Fn(&Tensor) -> Result<Tensor> + 'static,
    ours: impl Fn(&Tensor) -> Result<Tensor> + 'static,
) -> Pair {
    Pair {
        name,
        shape: shape.to_vec(),
        candle: Box::new(candle),
        ours: Box::new(ours),
        whole: false,
    }
}

fn pairs(dtype: DType) -> Result<Vec<Pair>> {
    let mut all = Vec::from(norms(dtype)?);
    all.push(pair(
        "softmax_last_dim",
        &[2, 5, 32],
        candle_nn::ops::softmax_last_dim,
        frozen::softmax_last_dim,
    ));
    all.extend(rotary(dtype)?);
    if dtype == DType::F32 {
        let quantized = seeded((16, 32), 6).to_dtype(dtype)?;
        let quantized = Arc::new(QTensor::quantize(&quantized, GgmlDType::Q8_0)?);
        let candle = QMatMul::from_arc(quantized.clone())?;
        let ours = frozen::Linear::quantized(quantized, None)?;
        all.push(pair(
            "QMatMul",
            &[2, 5, 32],
            move |x| candle.forward(x),
            move |x| ours.forward(x),
        ));
    }
    let targets = Tensor::new(&[3u32, 0, 31, 7, 7], &CPU)?;
    let targets_o = targets.clone();
    let up = seeded((2, 5, 32), 5).to_dtype(dtype)?;
    let up_o = up.clone();
    let loss = pair(
        "cross_entropy",
        &[5, 32],
        move |x| candle_nn::loss::cross_entropy(x, &targets),
        move |x| frozen::cross_entropy(x, &targets_o),
    );
    let silu = pair(
        "silu_mul",
        &[2, 5, 32],
        move |x| x.silu()? * &up,
        move |x| frozen::silu_mul(x, &up_o),
    );
    all.extend([loss, silu].map(|pair| Pair {
        whole: true,
        ..pair
    }));
    Ok(all)
}

/// candle's kernels have no f64; the slow functions that it has besides pass gradients.
fn norms(dtype: DType) -> Result<[Pair; 2]> {
    let (scale, shift) = (
        seeded(32, 1).to_dtype(dtype)?,
        seeded(32, 2).to_dtype(dtype)?,
    );
    let slow = dtype == DType::F64;
    let (w, c) = (scale.clone(), shift.clone());
    let theirs = candle_nn::LayerNorm::new(scale.clone(), shift.clone(), EPS);
    let ours = frozen::LayerNorm::new(scale.clone(), shift, EPS);
    let layer_norm = pair(
        "LayerNorm",
        &[2, 5, 32],
        move |x| match slow {
            true => candle_nn::ops::layer_norm_slow(x, &w, &c, EPS as f32),
            false => theirs.forward(x),
        },
        move |x| ours.forward(x),
    );
    let w = scale.clone();
    let theirs = candle_nn::RmsNorm::new(scale.clone(), EPS);
    let ours = frozen::RmsNorm::new(scale, EPS);
    let rms_norm = pair(
        "RmsNorm",
        &[2, 5, 32],
        move |x| match slow {
            true => candle_nn::ops::rms_norm_slow(x, &w, EPS as f32),
            false => theirs.forward(x),
        },
        move |x| ours.forward(x),
    );
    Ok([layer_norm, rms_norm].map(|pair| Pair {
        whole: slow,
        ..pair
    }))
}

type Turn = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

fn rotary(dtype: DType) -> Result<[Pair; 2]> {
    let table = |seed| seeded((9, 4), seed).to_dtype(dtype);
    let (cos, sin) = (table(3)?, table(4)?);
    let turned = |turn: Turn| {
        let (cos, sin) = (cos.clone(), sin.clone());
        move |x: &Tensor| turn(x, &cos, &sin)
    };
    let shape = [2, 3, 5, 8];
    use candle_nn::rotary_emb::{rope, rope_i};
    Ok([
        pair("rope", &shape, turned(rope), turned(frozen::rope)),
        pair("rope_i", &shape, turned(rope_i), turned(frozen::rope_i)),
    ])
}

#[test]
fn results_are_those_of_candle() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 5e-7), (DType::F64, 5e-15)] {
        for pair in pairs(dtype)? {
            let x = seeded(pair.shape.as_slice(), 10).to_dtype(dtype)?;
            let off = relative(&(pair.ours)(&x)?, &(pair.candle)(&x)?);
            // candle rounds the input of a quantized product to 8 bits.
            let tolerance = if pair.name == "QMatMul" {
                1e-2
            } else {
                tolerance
            };
            assert!(off < tolerance, "{}: off by {off:e}", pair.name);
            // Through a strided view the result is the same.
            let last = pair.shape.len() - 1;
            let view = x
                .transpose(last - 1, last)?
                .contiguous()?
                .transpose(last - 1, last)?;
            let (viewed, plain) = ((pair.ours)(&view)?, (pair.ours)(&x)?);
            assert_eq!(bits(&viewed), bits(&plain), "{}", pair.name);
        }
    }
    Ok(())
}

/// A layer is trained in front of each function. Behind candle's the gradient vanishes, which
/// `check_gradients` names; behind ours it is the slope of the loss.
#[test]
fn a_parameter_in_front_trains_behind_ours_and_is_missed_behind_candle_s() -> Result<()> {
    for dtype in [DType::F64, DType::F32] {
        for pair in pairs(dtype)? {
            let width = *pair.shape.last().unwrap();
            let builder = Adapter::builder(DoftConfig::default().with_block_size(4), &CPU)?;
            let weight = seeded((width, width), 11).to_dtype(dtype)?;
            let layer = builder.wrap("front", Linear::new(weight, None))?;
            let adapter = builder.finish()?;
            let x = seeded(pair.shape.as_slice(), 12).to_dtype(dtype)?;
            let through = |f: &Function| f(&layer.forward(&x)?);

            let y = through(&pair.candle)?;
            let upstream = seeded(y.shape().clone(), 13).to_dtype(dtype)?;
            let grads = (y * &upstream)?.sum_all()?.backward()?;
            match adapter.check_gradients(&grads) {
                Ok(_) => assert!(pair.whole, "candle's {} has a backward now", pair.name),
                Err(error) => {
                    let error = error.to_string();
                    let named = error.contains("`front.oft_R.weight`, `front.dora_log_multiplier`");
                    assert!(!pair.whole && named, "{}: {error}", pair.name);
                }
            }
            let grads = (through(&pair.ours)? * &upstream)?.sum_all()?.backward()?;
            assert_eq!(adapter.check_gradients(&grads)?.checked, 2, "{}", pair.name);
            if dtype == DType::F64 {
                check_slopes(pair.name, &adapter.named_vars(), || through(&pair.ours))?;
            }
        }
    }
    Ok(())
}

#[test]
fn attention_and_the_loss_over_a_head_have_the_slopes_of_their_loss() -> Result<()> {
    let none = candle_nn::VarMap::new();
    let q = Var::from_tensor(&seeded((2, 4, 5, 4), 1))?;
    let k = Var::from_tensor(&seeded((2, 2, 7, 4), 2))?;
    let v = Var::from_tensor(&seeded((2, 2, 7, 4), 3))?;
    let vars = named(&none, [("q", &q), ("k", &k), ("v", &v)]);
    check_slopes("attention", &vars, || {
        frozen::causal_attention(&q, &k, &v, 0.5)
    })?;

    // More queries than keys, and some of the keys are padding.
    let long = Var::from_tensor(&seeded((2, 4, 9, 4), 1))?;
    let keep = Tensor::new(&[[1u8, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 5, 0, 0]], &CPU)?;
    let vars = named(&none, [("q", &long), ("k", &k), ("v", &v)]);
    for keep in [None, Some(&keep)] {
        check_slopes("attention", &vars, || {
            frozen::attention(&long, &k, &v, keep, 0.5)
        })?;
    }

    // Turned first, which equals the two functions to the bit and in its slopes.
    let k = Var::from_tensor(&seeded((2, 2, 5, 4), 2))?;
    let v = Var::from_tensor(&seeded((2, 2, 5, 4), 3))?;
    let (cos, sin) = (seeded((6, 2), 9).cos()?, seeded((6, 2), 9).sin()?);
    let vars = named(&none, [("q", &q), ("k", &k), ("v", &v)]);
    let turned = || frozen::rotary_causal_attention(&q, &k, &v, (&cos, &sin), 0.5);
    check_slopes("rotary attention", &vars, turned)?;
    let turn = |x: &Var| frozen::rope(x, &cos, &sin);
    let apart = frozen::causal_attention(&turn(&q)?, &turn(&k)?, &v, 0.5)?;
    let values = |x: &Tensor| x.flatten_all()?.to_vec1::<f64>();
    assert_eq!(values(&turned()?)?, values(&apart)?);
    let longer = Var::from_tensor(&seeded((2, 2, 7, 4), 3))?;
    let refused = frozen::rotary_causal_attention(&q, &longer, &longer, (&cos, &sin), 0.5);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("as many keys as queries"), "{refused}");

    let head = frozen::Linear::new(seeded((11, 6), 4), Some(seeded(11, 5)));
    let hidden = Var::from_tensor(&seeded((2, 3, 6), 6))?;
    let targets = Tensor::new(&[[0u32, 10, 3], [3, 3, 1]], &CPU)?;
    let vars = named(&none, [("hidden", &hidden)]);
    check_slopes("head", &vars, || {
        frozen::linear_cross_entropy(&hidden, &head, &targets)
    })?;
    let norm = frozen::RmsNorm::new(seeded(6, 7), 1e-5);
    let other = Var::from_tensor(&seeded((2, 3, 6), 8))?;
    let vars = named(&none, [("x", &hidden), ("residual", &other)]);
    check_slopes("residual", &vars, || {
        let (sum, normed) = norm.forward_residual(&hidden, &other)?;
        // The sum goes on as the residual stream.
        (sum.sqr()? * 0.3)? + normed
    })
}

#[test]
fn attention_does_not_look_ahead_and_continues_a_cache() -> Result<()> {
    let (q, k) = (seeded((1, 2, 6, 4), 1), seeded((1, 1, 6, 4), 2));
    let v = seeded((1, 1, 6, 4), 3);
    let all = frozen::causal_attention(&q, &k, &v, 0.5)?;
    assert_eq!(all.dims(), [1, 2, 6, 4]);
    assert!(all.transpose(1, 2)?.is_contiguous());
    let part = |t: &Tensor, end| t.narrow(2, 0, end);
    for end in 1..=6 {
        let last = q.narrow(2, end - 1, 1)?;
        let one = frozen::causal_attention(&last, &part(&k, end)?, &part(&v, end)?, 0.5)?;
        assert!(relative(&one, &all.narrow(2, end - 1, 1)?) < 1e-14);
    }
    Ok(())
}

/// What is padding has no part in the answer: the rest alone gives the same, and so does candle's softmax.
#[test]
fn padding_is_not_seen() -> Result<()> {
    let (q, k, v) = (
        seeded((2, 4, 5, 4), 1),
        seeded((2, 2, 5, 4), 2),
        seeded((2, 2, 5, 4), 3),
    );
    let keep = Tensor::new(&[[1u32, 1, 1, 0, 0], [1, 1, 1, 1, 1]], &CPU)?;
    let y = frozen::attention(&q, &k, &v, Some(&keep), 0.5)?;
    let short = |t: &Tensor| t.narrow(0, 0, 1)?.narrow(2, 0, 3);
    let alone = frozen::attention(&q.narrow(0, 0, 1)?, &short(&k)?, &short(&v)?, None, 0.5)?;
    assert!(relative(&y.narrow(0, 0, 1)?, &alone) < 1e-14);
    let repeated = |t: &Tensor| Tensor::stack(&[t, t], 2)?.reshape((2, 4, 5, 4));
    let mask = (keep.to_dtype(DType::F64)? * 1e300)?.affine(1., -1e300)?;
    let scores = (q.matmul(&repeated(&k)?.t()?)? * 0.5)?;
    let scores = scores.broadcast_add(&mask.reshape((2, 1, 1, 5))?)?;
    let plain = candle_nn::ops::softmax(&scores, 3)?.matmul(&repeated(&v)?)?;
    assert!(relative(&y, &plain) < 1e-14);
    for (keep, expected) in [
        (
            Tensor::zeros((2, 5), DType::U8, &CPU)?,
            "`attention`: `keep` is 0 everywhere in row 0, expected at least one key that is kept in each row",
        ),
        (
            Tensor::ones((2, 4), DType::U8, &CPU)?,
            "`attention`: `keep` is [2, 4] of U8, expected (2, 5), u8, u32 or i64",
        ),
        (
            Tensor::ones((2, 5), DType::F32, &CPU)?,
            "`attention`: `keep` is [2, 5] of F32, expected (2, 5), u8, u32 or i64",
        ),
    ] {
        let error = frozen::attention(&q, &k, &v, Some(&keep), 0.5).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    Ok(())
}

#[test]
fn a_quantized_head_has_the_loss_of_the_head_it_expands_to() -> Result<()> {
    let weight = seeded((3000, 256), 1).to_dtype(DType::F32)?;
    let quantized = Arc::new(QTensor::quantize(&weight, GgmlDType::Q4K)?);
    let dense = frozen::Linear::new(quantized.dequantize(&CPU)?, None);
    let quantized = frozen::Linear::quantized(quantized, None)?;
    let hidden = Var::from_tensor(&(seeded((200, 256), 2) * 0.1)?.to_dtype(DType::F32)?)?;
    let targets = Tensor::arange(0u32, 200, &CPU)?;
    let a = frozen::linear_cross_entropy(&hidden, &quantized, &targets)?;
    let b = frozen::linear_cross_entropy(&hidden, &dense, &targets)?;
    assert!(relative(&a, &b) < 1e-6);
    let (a, b) = (a.backward()?, b.backward()?);
    let (a, b) = (a.get(&hidden).expect("dh"), b.get(&hidden).expect("dh"));
    assert!(relative(a, b) < 3e-6);
    Ok(())
}

#[test]
fn bad_input_is_refused_with_what_was_expected() -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU).unwrap();
    let text = |error: candle_core::Error| error.to_string();
    let (q, k) = (zeros(&[1, 4, 3, 8]), zeros(&[1, 3, 3, 8]));
    assert_eq!(
        text(frozen::causal_attention(&q, &k, &k, 1.).unwrap_err()),
        "`causal_attention`: the shapes of q, k and v is [1, 4, 3, 8], [1, 3, 3, 8], [1, 3, 3, 8], \
         expected (B, H, T, d), (B, G, S, d) twice, G a divisor of H, S at least T"
    );
    let table = zeros(&[2, 4]);
    assert_eq!(
        text(frozen::rope(&q, &table, &table).unwrap_err()),
        "`rope`: `cos` is [2, 4], expected (S, 4) or (1, S, 4), S from 3"
    );
    let norm = frozen::RmsNorm::new(zeros(&[8]), 1e-5);
    assert_eq!(
        text(norm.forward(&zeros(&[2, 7])).unwrap_err()),
        "`RmsNorm::forward`: the shape of `x` is [2, 7], expected (.., 8), the size of the norm"
    );
    let ids = Tensor::zeros((2, 8), DType::U32, &CPU)?;
    assert_eq!(
        text(norm.forward(&ids).unwrap_err()),
        "`RmsNorm::forward`: the dtype of the input is U32, expected one of [F16, BF16, F32, F64]"
    );
    let targets = Tensor::new(&[1u32, 8], &CPU)?;
    assert_eq!(
        text(frozen::cross_entropy(&zeros(&[2, 8]), &targets).unwrap_err()),
        "`cross_entropy`: a target is 8, expected below 8, the classes"
    );
    assert_eq!(
        text(frozen::cross_entropy(&zeros(&[3, 8]), &targets).unwrap_err()),
        "`cross_entropy`: the shape of the targets is [2], expected one for each of 3 rows, and at \
         least one row"
    );
    let head = frozen::Linear::new(zeros(&[8, 4]), None);
    assert_eq!(
        text(head.forward(&zeros(&[2, 5])).unwrap_err()),
        "layer `the linear layer`: the input has shape [2, 5], expected (.., 4) of rank 2 or more"
    );
    assert_eq!(
        text(frozen::linear_cross_entropy(&zeros(&[2, 5]), &head, &targets).unwrap_err()),
        "`linear_cross_entropy`: the shape of `hidden` is [2, 5], expected (.., 4) of rank 2 or more"
    );
    let norm = frozen::LayerNorm::new(zeros(&[8]), zeros(&[1]), 1e-5);
    assert_eq!(
        text(norm.forward(&zeros(&[2, 8])).unwrap_err()),
        "`LayerNorm::forward`: the shape of the shift is [1], expected [8]"
    );
    let head = frozen::Linear::new(zeros(&[8, 5]), Some(zeros(&[7])));
    assert_eq!(
        text(frozen::linear_cross_entropy(&zeros(&[2, 5]), &head, &targets).unwrap_err()),
        "layer `the head`: the bias has shape [7], expected [8], one for each output"
    );
    assert_eq!(
        text(frozen::silu_mul(&zeros(&[2, 5]), &zeros(&[2, 4])).unwrap_err()),
        "`silu_mul`: `up` is [2, 4] of F32, expected [2, 5] of F32, as `gate`"
    );
    Ok(())
}

#[test]
fn nothing_in_gives_nothing_out() -> Result<()> {
    let empty =
        |shape: &[usize]| Tensor::zeros(shape, DType::F32, &CPU).and_then(|t| Var::from_tensor(&t));
    let (norm, table) = (frozen::RmsNorm::new(seeded(8, 1), 1e-5), seeded((4, 4), 2));
    let run = |name: &str, x: &Var| match name {
        "softmax" => frozen::softmax_last_dim(x),
        "silu_mul" => frozen::silu_mul(x, x),
        "rope" => frozen::rope(x, &table, &table),
        "attention" => frozen::causal_attention(x, x, x, 1.),
        "both ways" => frozen::attention(x, x, x, None, 1.),
        _ => norm.forward(x),
    };
    for (name, shape) in [
        ("softmax", &[0, 8][..]),
        ("softmax", &[2, 0]),
        ("silu_mul", &[0, 8]),
        ("rope", &[1, 2, 0, 8]),
        ("rope", &[0, 2, 3, 8]),
        ("attention", &[1, 2, 0, 8]),
        ("attention", &[0, 2, 3, 8]),
        ("both ways", &[1, 2, 0, 8]),
        ("both ways", &[0, 2, 3, 8]),
        ("norm", &[0, 8]),
    ] {
        let x = empty(shape)?;
        let y = run(name, &x)?;
        assert_eq!(y.dims(), shape, "{name}");
        let grads = y.sum_all()?.backward()?;
        assert_eq!(grads.get(&x).expect(name).dims(), shape, "{name}");
    }
    Ok(())
}

#[test]
fn constructors_take_what_candle_s_take() -> Result<()> {
    let varmap = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &CPU);
    let x = seeded((3, 8), 1).to_dtype(DType::F32)?;
    let ours = frozen::rms_norm(8, 1e-6, vb.pp("a"))?.forward(&x)?;
    let theirs = candle_nn::rms_norm(8, 1e-6, vb.pp("a"))?.forward(&x)?;
    assert!(relative(&ours, &theirs) < 5e-7);
    for config in [
        candle_nn::LayerNormConfig::from(1e-6),
        candle_nn::LayerNormConfig {
            eps: 1e-6,
            remove_mean: false,
            affine: false,
        },
    ] {
        let ours = frozen::layer_norm(8, config, vb.pp("b"))?.forward(&x)?;
        let theirs = candle_nn::layer_norm(8, config, vb.pp("b"))?.forward(&x)?;
        assert!(relative(&ours, &theirs) < 5e-7);
    }
    let ids = Tensor::new(&[1u32, 0], &CPU)?;
    assert_eq!(
        frozen::embedding(4, 8, vb.pp("c"))?.forward(&ids)?.dims(),
        [2, 8]
    );
    Ok(())
}
