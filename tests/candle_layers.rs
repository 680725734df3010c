//! Which layers of candle pass gradients on: the table in the docs of `frozen`, line by line, so that a
//! new candle is noticed.

mod support;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::rnn::{GRUConfig, LSTMConfig, RNN};
use candle_nn::{Module, ModuleT, VarBuilder, VarMap, ops};
use support::slopes::check_slopes;
use support::tensors::seeded;

type Function = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// Weights of f64, seeded by their shapes.
fn vb() -> VarBuilder<'static> {
    struct Seeded;
    impl candle_nn::var_builder::SimpleBackend for Seeded {
        fn get(
            &self,
            shape: candle_core::Shape,
            name: &str,
            _: candle_nn::Init,
            dtype: DType,
            _: &Device,
        ) -> Result<Tensor> {
            // A variance has to be above 0.
            let values = seeded(shape, name.len() as u64);
            if name.ends_with("var") {
                values.sqr()?.affine(1., 0.5)?.to_dtype(dtype)
            } else {
                values.to_dtype(dtype)
            }
        }

        fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
            Err(candle_core::Error::CannotFindTensor {
                path: name.to_string(),
            })
        }

        fn contains_tensor(&self, _: &str) -> bool {
            true
        }
    }
    VarBuilder::from_backend(Box::new(Seeded), DType::F64, Device::Cpu)
}

const IMAGE: &[usize] = &[2, 4, 6, 6];
const ROWS: &[usize] = &[3, 8];
const TEXT: &[usize] = &[2, 3, 8];
const HEADS: &[usize] = &[1, 2, 3, 8];

/// A function of candle with the shape that it is tried on.
fn case(
    name: &'static str,
    shape: &'static [usize],
    f: impl Fn(&Tensor) -> Result<Tensor> + 'static,
) -> (&'static str, &'static [usize], Function) {
    (name, shape, Box::new(f))
}

fn contiguous_input(shape: &[usize]) -> Result<Var> {
    Var::from_tensor(&seeded(shape, 7))
}

#[test]
fn these_pass_gradients() -> Result<()> {
    let (batch_norm, group_norm) = (
        candle_nn::batch_norm(4, 1e-5, vb().pp("b"))?,
        candle_nn::group_norm(2, 4, 1e-5, vb().pp("g"))?,
    );
    let transposed = candle_nn::conv_transpose2d(4, 3, 3, Default::default(), vb().pp("t"))?;
    let lstm = candle_nn::lstm(8, 5, LSTMConfig::default(), vb().pp("l"))?;
    let gru = candle_nn::gru(8, 5, GRUConfig::default(), vb().pp("r"))?;
    let prelu = candle_nn::prelu(Some(4), vb().pp("p"))?;
    let cases = [
        case("softmax", ROWS, |x| ops::softmax(x, 1)),
        case("log_softmax", ROWS, |x| ops::log_softmax(x, 1)),
        case("silu", ROWS, ops::silu),
        case("GroupNorm", IMAGE, move |x| group_norm.forward(x)),
        case("BatchNorm, evaluated", IMAGE, move |x| {
            batch_norm.forward_t(x, false)
        }),
        case("ConvTranspose2d", IMAGE, move |x| transposed.forward(x)),
        case("LSTM", TEXT, move |x| lstm.states_to_tensor(&lstm.seq(x)?)),
        case("GRU", TEXT, move |x| gru.states_to_tensor(&gru.seq(x)?)),
        case("PReLU", IMAGE, move |x| prelu.forward(x)),
        case("upsample_nearest2d", IMAGE, |x| {
            x.upsample_nearest2d(12, 12)
        }),
        case("pixel_shuffle", IMAGE, |x| ops::pixel_shuffle(x, 2)),
        case("pad_with_zeros", IMAGE, |x| x.pad_with_zeros(3, 1, 2)),
        case("pad_with_same", IMAGE, |x| x.pad_with_same(3, 1, 2)),
        case("avg_pool2d", IMAGE, |x| x.avg_pool2d(2)),
    ];
    for (name, shape, f) in cases {
        let x = contiguous_input(shape)?;
        check_slopes(name, &[("x".to_string(), x.clone())], || f(&x))?;
    }
    // Of dropout no two passes are alike: what it keeps it scales, and so the gradient.
    let x = contiguous_input(ROWS)?;
    let y = candle_nn::Dropout::new(0.5).forward_t(&x, true)?;
    let grads = y.sum_all()?.backward()?;
    let scaled = (grads.get(&x).expect("dropout passes a gradient") * x.as_tensor())?;
    assert_eq!(scaled.to_vec2::<f64>()?, y.to_vec2::<f64>()?);
    Ok(())
}

/// The gradient of the largest of a window is divided by the size of the window.
#[test]
fn max_pool2d_passes_a_wrong_gradient() -> Result<()> {
    let x = Var::from_tensor(&Tensor::new(&[[[[1f64, 2.], [4., 3.]]]], &Device::Cpu)?)?;
    let grads = x.max_pool2d(2)?.sum_all()?.backward()?;
    let found = grads.get(&x).expect("a gradient").flatten_all()?;
    assert_eq!(
        found.to_vec1::<f64>()?,
        [0., 0., 0.25, 0.],
        "1 would be right"
    );
    Ok(())
}

#[test]
fn these_cut_the_graph_in_silence() -> Result<()> {
    let ones = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let layer_norm = candle_nn::layer_norm(8, 1e-5, ones.pp("a"))?;
    let rms_norm = candle_nn::rms_norm(8, 1e-5, ones.pp("b"))?;
    let table = |seed| seeded((3, 4), seed).to_dtype(DType::F32);
    let (cos, sin) = (table(1)?, table(2)?);
    let turned = move |x: &Tensor| candle_nn::rotary_emb::rope(x, &cos, &sin);
    let (cos, sin) = (table(1)?, table(2)?);
    let pairs = move |x: &Tensor| candle_nn::rotary_emb::rope_i(x, &cos, &sin);
    let cases = [
        case("LayerNorm", ROWS, move |x| layer_norm.forward(x)),
        case("RmsNorm", ROWS, move |x| rms_norm.forward(x)),
        case("softmax_last_dim", ROWS, ops::softmax_last_dim),
        case("rope", HEADS, turned),
        case("rope_i", HEADS, pairs),
    ];
    for (name, shape, f) in cases {
        let x = Var::from_tensor(&seeded(shape, 7).to_dtype(DType::F32)?)?;
        let grads = f(&x)?.sqr()?.sum_all()?.backward()?;
        assert!(grads.get(&x).is_none(), "{name} passes a gradient now");
    }
    Ok(())
}

#[test]
fn these_fail_loudly() -> Result<()> {
    let cases = [
        case("upsample_bilinear2d", IMAGE, |x| {
            x.upsample_bilinear2d(12, 12, false)
        }),
        case("avg_pool2d_with_stride", IMAGE, |x| {
            x.avg_pool2d_with_stride(3, 1)
        }),
        case("max_pool2d_with_stride", IMAGE, |x| {
            x.max_pool2d_with_stride(3, 1)
        }),
        case("sdpa", HEADS, |x| ops::sdpa(x, x, x, None, false, 1., 1.)),
    ];
    for (name, shape, f) in cases {
        let x = contiguous_input(shape)?;
        let ran = f(&x).and_then(|y| y.sqr()?.sum_all()?.backward());
        assert!(ran.is_err(), "{name} works now");
    }
    Ok(())
}
