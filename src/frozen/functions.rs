//! Functions without parameters that pass gradients on where candle's cut the graph.

use super::{FLOATS, check_float};
use crate::error::Error;
use crate::ops::attention::{Attention, Sees};
use crate::ops::pointwise::{Rope, SiluMul, Softmax};
use crate::ops::real::has_kernel;
use crate::ops::rotary::RotaryAttention;
use candle_core::{DType, Result, Tensor};
use std::sync::Arc;

/// [`Error::argument`] as candle's result.
fn refuse<A>(
    function: &'static str,
    what: &'static str,
    found: impl Into<String>,
    expected: impl Into<String>,
) -> Result<A> {
    Err(Error::argument(function, what, found, expected).into())
}

/// Softmax over the last axis: `y = exp(x - max x) / sum exp(x - max x)`, `dx = y * (dy - sum(dy * y))`.
///
/// [`candle_nn::ops::softmax_last_dim`] has no backward; this keeps y alone. Half types are computed in
/// f32.
///
/// # Shapes
///
/// `x` and the answer are of one shape, of rank 1 or more.
///
/// # Errors
///
/// When `x` is not a float tensor of rank 1 or more.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_doft::frozen::softmax_last_dim;
///
/// let x = Var::new(&[[0f32, 3f32.ln()]], &Device::Cpu)?;
/// let y = softmax_last_dim(&x)?;
/// assert!((y.to_vec2::<f32>()?[0][1] - 0.75).abs() < 1e-6);
/// assert!(y.backward()?.get(&x).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn softmax_last_dim(x: &Tensor) -> Result<Tensor> {
    check_float("softmax_last_dim", x, FLOATS)?;
    if x.rank() == 0 {
        return refuse("softmax_last_dim", "`x`", "a scalar", "rank 1 or more");
    }
    match has_kernel(x) {
        // candle finds no largest entry of nothing.
        _ if x.elem_count() == 0 => Ok(x.clone()),
        true => x.apply_op1(Softmax),
        false => Softmax::composed(x),
    }
}

/// The gated product of SwiGLU in one pass: `silu(gate) * up`.
///
/// ```text
/// s = 1 / (1 + exp(-gate)),   y = gate * s * up
/// dup = dy * gate * s,   dgate = dy * up * s * (1 + gate * (1 - s))
/// ```
///
/// # Shapes
///
/// `gate`, `up` and the answer are of one shape and dtype.
///
/// # Errors
///
/// When the two differ in shape or dtype, or are not float tensors.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// let gate = Tensor::new(&[0f32, 100.], &Device::Cpu)?;
/// let up = Tensor::new(&[5f32, 2.], &Device::Cpu)?;
/// assert_eq!(candle_doft::frozen::silu_mul(&gate, &up)?.to_vec1::<f32>()?, [0., 200.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
///
/// "GLU Variants Improve Transformer", arXiv:2002.05202, equation 5.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check_float("silu_mul", gate, FLOATS)?;
    if gate.dims() != up.dims() || gate.dtype() != up.dtype() {
        return refuse(
            "silu_mul",
            "`up`",
            format!("{:?} of {:?}", up.dims(), up.dtype()),
            format!("{:?} of {:?}, as `gate`", gate.dims(), gate.dtype()),
        );
    }
    match has_kernel(gate) {
        true => gate.apply_op2(up, SiluMul),
        false => SiluMul::composed(gate, up),
    }
}

/// Rotary position embedding of the pairs `(x_i, x_{i + d/2})`, as Llama in Hugging Face's layout.
///
/// ```text
/// (a, b) -> (a cos - b sin, a sin + b cos),   angle of (t, i) from `cos` and `sin`
/// ```
///
/// Backward turns back. [`candle_nn::rotary_emb::rope`] has no backward.
///
/// # Shapes
///
/// `x` is `(B, H, T, d)`; `cos` and `sin` are `(S, d/2)`, or `(B, S, d/2)`, with `S >= T`.
///
/// # Errors
///
/// When the shapes do not fit.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::frozen::rope;
///
/// // One head of two entries at one position, turned by a quarter.
/// let x = Tensor::new(&[[[[1f32, 0.]]]], &Device::Cpu)?;
/// let (cos, sin) = (Tensor::new(&[[0f32]], &Device::Cpu)?, Tensor::new(&[[1f32]], &Device::Cpu)?);
/// assert_eq!(rope(&x, &cos, &sin)?.flatten_all()?.to_vec1::<f32>()?, [0., 1.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
///
/// "RoFormer", arXiv:2104.09864, equation 34.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    turned(x, turn("rope", x, cos, sin, false)?)
}

/// [`rope`] of neighbouring pairs `(x_{2i}, x_{2i + 1})`, as in the original Llama files.
///
/// # Shapes
///
/// Those of [`rope`].
///
/// # Errors
///
/// When the shapes do not fit.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::frozen::rope_i;
///
/// // Two pairs at one position: the first stays, the second turns by a quarter.
/// let x = Tensor::new(&[[[[1f32, 2., 3., 4.]]]], &Device::Cpu)?;
/// let cos = Tensor::new(&[[1f32, 0.]], &Device::Cpu)?;
/// let sin = Tensor::new(&[[0f32, 1.]], &Device::Cpu)?;
/// let y = rope_i(&x, &cos, &sin)?.flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(y, [1., 2., -4., 3.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
///
/// "RoFormer", arXiv:2104.09864, equation 34.
pub fn rope_i(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    turned(x, turn("rope_i", x, cos, sin, true)?)
}

/// The turn by tables that fit `x`.
fn turn(
    function: &'static str,
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    interleaved: bool,
) -> Result<Rope> {
    check_float(function, x, FLOATS)?;
    let (batch, _, steps, width) = match x.dims() {
        &[b, h, t, d] if d % 2 == 0 && d > 0 => (b, h, t, d),
        dims => {
            let found = format!("{dims:?}");
            return refuse(function, "`x`", found, "(B, H, T, d) of even d");
        }
    };
    for (what, table) in [("`cos`", cos), ("`sin`", sin)] {
        let fits = match *table.dims() {
            [s, half] => s >= steps && half * 2 == width,
            [b, s, half] => b == batch && s >= steps && half * 2 == width,
            _ => false,
        };
        if !fits || table.rank() != cos.rank() || table.dims() != cos.dims() {
            let expected = format!(
                "(S, {}) or ({batch}, S, {}), S from {steps}",
                width / 2,
                width / 2
            );
            return refuse(function, what, format!("{:?}", table.dims()), expected);
        }
    }
    Ok(Rope {
        cos: cos.detach(),
        sin: sin.detach(),
        interleaved,
    })
}

fn turned(x: &Tensor, rope: Rope) -> Result<Tensor> {
    match has_kernel(x) {
        true => x.apply_op1(rope),
        false => rope.composed(x),
    }
}

/// Causal attention with grouped queries.
///
/// ```text
/// y = P v,   P = softmax(scale * q k^T + mask)
/// dv = P^T dy,   dS = P * (dP - sum(dP * P)),   dP = dy v^T
/// dq = scale * dS k,   dk = scale * dS^T q
/// ```
///
/// Query `i` of `T` sees the keys `0 ..= S - T + i`, so that the last query sees them all, with a
/// cache of earlier keys or without. Query head `h` uses the keys of head `h / (H / G)`.
///
/// Kept for the backward pass are q, k, v, the output and two numbers for each row, never the scores.
///
/// # Shapes
///
/// `q` is `(B, H, T, d)`, `k` and `v` are `(B, G, S, d)` with `G` a divisor of `H` and `S >= T`; the
/// answer is `(B, H, T, d)`, in memory `(B, T, H, d)`: `y.transpose(1, 2)?.reshape((B, T, H * d))`
/// copies nothing.
///
/// # Errors
///
/// When the shapes do not fit, or the three differ in dtype.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::frozen::causal_attention;
///
/// let q = Tensor::randn(0f32, 1., (1, 4, 3, 8), &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 2, 3, 8), &Device::Cpu)?;
/// let y = causal_attention(&q, &kv, &kv, 8f64.powf(-0.5))?;
/// assert_eq!(y.dims(), [1, 4, 3, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
///
/// "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2.
pub fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    check_attention("causal_attention", q, k, v, true)?;
    attend(q, k, v, Attention::new(scale, Sees::Earlier))
}

/// Attention in which every query sees every key that is kept, as in an encoder; grouped queries, too.
///
/// ```text
/// y = P v,   P = softmax(scale * q k^T + m),   m = 0 where a key is kept, else -infinity
/// ```
///
/// The backward pass and what it keeps are those of [`causal_attention`]. Keys and values that are not
/// kept have no effect on the answer and get a gradient of 0.
///
/// # Shapes
///
/// `q` is `(B, H, T, d)`, `k` and `v` are `(B, G, S, d)` with `G` a divisor of `H`; `keep` is `(B, S)`,
/// u8, u32 or i64, 0 for padding, and none keeps all. Returns `(B, H, T, d)`, in memory `(B, T, H, d)`.
///
/// # Errors
///
/// * If the shapes do not fit, or the three differ in dtype.
/// * If `keep` is not an integer tensor `(B, S)`, or a row of it keeps no key: its softmax is undefined.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::frozen::attention;
///
/// let q = Tensor::randn(0f32, 1., (2, 4, 3, 8), &Device::Cpu)?;
/// let keep = Tensor::new(&[[1u8, 1, 1], [1, 1, 0]], &Device::Cpu)?; // the second text is shorter
/// let y = attention(&q, &q, &q, Some(&keep), 8f64.powf(-0.5))?;
/// assert_eq!(y.dims(), [2, 4, 3, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
///
/// "BERT", arXiv:1810.04805, section 3; "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    keep: Option<&Tensor>,
    scale: f64,
) -> Result<Tensor> {
    check_attention("attention", q, k, v, false)?;
    let kept = keep.map(|keep| kept(keep, (k.dim(0)?, k.dim(2)?)));
    attend(
        q,
        k,
        v,
        Attention::new(scale, Sees::Kept(kept.transpose()?)),
    )
}

fn attend(q: &Tensor, k: &Tensor, v: &Tensor, attention: Attention) -> Result<Tensor> {
    let y = if has_kernel(q) {
        q.apply_op3(k, v, attention)?
    } else {
        attention.composed(q, k, v)?
    };
    y.transpose(1, 2)
}

/// A padding mask on the host.
fn kept(keep: &Tensor, (batch, keys): (usize, usize)) -> Result<Arc<[bool]>> {
    const NAME: &str = "attention";
    let integer = [DType::U8, DType::U32, DType::I64].contains(&keep.dtype());
    if keep.dims() != [batch, keys] || !integer {
        let found = format!("{:?} of {:?}", keep.dims(), keep.dtype());
        let expected = format!("({batch}, {keys}), u8, u32 or i64");
        return refuse(NAME, "`keep`", found, expected);
    }
    let values = keep.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
    let kept: Vec<bool> = values.iter().map(|v| *v != 0).collect();
    let mut rows = kept.chunks(keys.max(1));
    if let Some(row) = rows.position(|row| !row.contains(&true)) {
        let found = format!("0 everywhere in row {row}");
        return refuse(
            NAME,
            "`keep`",
            found,
            "at least one key that is kept in each row",
        );
    }
    Ok(kept.into())
}

/// [`causal_attention`] of `rope(q)` and `rope(k)`, with the tables of [`rope`].
///
/// ```text
/// softmax(scale * rope(q) rope(k)^T + mask) v
/// ```
///
/// The same values, bit for bit, as the functions one after the other; but q and k are kept as they came
/// and turned again on the way back, which saves a copy of both for each block of a model. For whole
/// sequences: with a cache of turned keys, call the functions.
///
/// # Shapes
///
/// `q` is `(B, H, T, d)` with even `d`, `k` and `v` are `(B, G, T, d)`; the answer is that of
/// [`causal_attention`].
///
/// # Errors
///
/// Those of both functions, and when there are more keys than queries.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_doft::frozen::{causal_attention, rope, rotary_causal_attention};
///
/// let q = Tensor::randn(0f32, 1., (1, 4, 3, 8), &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 2, 3, 8), &Device::Cpu)?;
/// let angles = Tensor::randn(0f32, 1., (3, 4), &Device::Cpu)?;
/// let (cos, sin) = (angles.cos()?, angles.sin()?);
/// let y = rotary_causal_attention(&q, &kv, &kv, (&cos, &sin), 0.5)?;
/// let z = causal_attention(&rope(&q, &cos, &sin)?, &rope(&kv, &cos, &sin)?, &kv, 0.5)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, z.flatten_all()?.to_vec1::<f32>()?);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
///
/// "RoFormer", arXiv:2104.09864, equation 34; "FlashAttention-2", arXiv:2307.08691.
pub fn rotary_causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    (cos, sin): (&Tensor, &Tensor),
    scale: f64,
) -> Result<Tensor> {
    const NAME: &str = "rotary_causal_attention";
    check_attention(NAME, q, k, v, true)?;
    if q.dim(2)? != k.dim(2)? {
        let found = format!("{:?} and {:?}", q.dims(), k.dims());
        return refuse(
            NAME,
            "the shapes of q and k",
            found,
            "as many keys as queries",
        );
    }
    let rope = turn(NAME, q, cos, sin, false)?;
    if !has_kernel(q) {
        let (q, k) = (rope.composed(q)?, rope.composed(k)?);
        return causal_attention(&q, &k, v, scale);
    }
    let attention = Attention::new(scale, Sees::Earlier);
    let op = RotaryAttention { attention, rope };
    q.apply_op3(k, v, op)?.transpose(1, 2)
}

fn check_attention(
    name: &'static str,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    causal: bool,
) -> Result<()> {
    check_float(name, q, FLOATS)?;
    if k.dtype() != q.dtype() || v.dtype() != q.dtype() {
        let found = format!("{:?}, {:?} and {:?}", q.dtype(), k.dtype(), v.dtype());
        return refuse(name, "the dtype of q, k and v", found, "one float dtype");
    }
    let fits = match (q.dims(), k.dims()) {
        (&[b, h, t, d], &[kb, g, s, kd]) => {
            // Without a key there is nothing to take a mean of.
            let enough = if causal { s >= t } else { s > 0 || t == 0 };
            b == kb && d == kd && d > 0 && g > 0 && h > 0 && h % g == 0 && enough
        }
        _ => false,
    };
    if !fits || k.dims() != v.dims() {
        let found = format!("{:?}, {:?}, {:?}", q.dims(), k.dims(), v.dims());
        let least = if causal {
            ", S at least T"
        } else {
            ", S at least 1"
        };
        let expected = format!("(B, H, T, d), (B, G, S, d) twice, G a divisor of H{least}");
        return refuse(name, "the shapes of q, k and v", found, expected);
    }
    Ok(())
}
