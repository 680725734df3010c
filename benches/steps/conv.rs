//! One step of one convolution: forward, then backward to the input and to the adapter.

use super::{Run, seeded};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_doft::{DoftConfig, DoftConv2d, frozen};
use candle_nn::{Conv2d, Conv2dConfig, Module, VarBuilder, VarMap};

/// Images, channels, outputs, height and width, kernel, stride, groups.
#[derive(Clone, Copy)]
pub struct Setting {
    pub name: &'static str,
    images: usize,
    channels: usize,
    outputs: usize,
    size: usize,
    kernel: usize,
    groups: usize,
    block: usize,
}

const fn setting(
    name: &'static str,
    (images, channels, outputs, size): (usize, usize, usize, usize),
    (kernel, groups, block): (usize, usize, usize),
) -> Setting {
    Setting {
        name,
        images,
        channels,
        outputs,
        size,
        kernel,
        groups,
        block,
    }
}

/// Layers of a diffusion model, a small head, a grouped and a depthwise layer.
pub const SETTINGS: [Setting; 6] = [
    setting("1x320x320x32x32k3", (1, 320, 320, 32), (3, 1, 32)),
    setting("4x128x128x16x16k3", (4, 128, 128, 16), (3, 1, 32)),
    setting("1x640x640x32x32k1", (1, 640, 640, 32), (1, 1, 32)),
    setting("1x320x4x32x32k3", (1, 320, 4, 32), (3, 1, 32)),
    setting("4x128x128x16x16k3g4", (4, 128, 128, 16), (3, 4, 32)),
    setting("4x128x128x16x16k3g128", (4, 128, 128, 16), (3, 128, 9)),
];

type Layer = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// `candle` is candle's convolution with its own backward, `frozen` and `doft` are this crate's.
pub fn run(method: &str, s: Setting) -> Result<Run> {
    let config = Conv2dConfig {
        padding: s.kernel / 2,
        groups: s.groups,
        ..Default::default()
    };
    let patch = s.channels / s.groups * s.kernel * s.kernel;
    let shape = (s.outputs, s.channels / s.groups, s.kernel, s.kernel);
    let weight = (seeded(shape, 1)? / (patch as f64).sqrt())?;
    let base = Conv2d::new(weight, None, config);
    let x = Var::from_tensor(&seeded((s.images, s.channels, s.size, s.size), 2)?)?;
    let upstream = seeded((s.images, s.outputs, s.size, s.size), 3)?;
    let expected = base.forward(&x)?.detach();
    let varmap = VarMap::new();
    let layer: Layer = match method {
        "candle" => {
            let base = base.clone();
            Box::new(move |x| base.forward(x))
        }
        "frozen" => {
            let layer = frozen::Conv2d::from(base.clone());
            Box::new(move |x| layer.forward(x))
        }
        "doft" => {
            let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
            let doft = DoftConfig::default().with_block_size(s.block);
            let layer = DoftConv2d::new(base.clone(), &doft, vb)?;
            Box::new(move |x| layer.forward(x))
        }
        other => candle_core::bail!("no method `{other}`"),
    };
    let off = (layer(&x)? - expected)?
        .abs()?
        .max_all()?
        .to_scalar::<f32>()?;
    assert!(off < 1e-3, "{method} is off by {off}");
    Ok(Box::new(move || {
        let grads = (layer(&x)? * &upstream)?.sum_all()?.backward()?;
        assert!(grads.get(&x).is_some());
        for var in varmap.all_vars() {
            assert!(grads.get(&var).is_some());
        }
        std::hint::black_box(grads);
        Ok(())
    }))
}
