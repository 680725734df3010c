//! Layers of which each rank has a part: what has to travel so that two ranks compute what one does. The page
//! of `train::parallel` has the table.

use crate::common::tensors::{CPU, disturb, named, seeded, wrapped};
use crate::threads::{Rank, on_ranks};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Module, Result, Shape, Tensor, Var};
use candle_doft::DoftConfig;
use candle_doft::train::parallel::Processes;
use candle_nn::Linear;
use std::collections::BTreeMap;

const RANKS: usize = 2;
const WIDTHS: [usize; 3] = [32, 48, 40];

/// Over ranks, in their order.
fn summed(rank: &Rank, values: &[f64]) -> Vec<f64> {
    let send: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut received = vec![0; send.len() * rank.size()];
    rank.all_gather(&send, &mut received).unwrap();
    let mut sum = vec![0.; values.len()];
    for row in received.chunks_exact(send.len()) {
        for (sum, bytes) in sum.iter_mut().zip(row.chunks_exact(8)) {
            *sum += f64::from_le_bytes(bytes.try_into().unwrap());
        }
    }
    sum
}

fn sum(rank: &Rank, x: &Tensor) -> Result<Tensor> {
    let values = x.flatten_all()?.to_vec1::<f64>()?;
    Tensor::from_vec(summed(rank, &values), x.shape(), &CPU)
}

fn held<'a>(storage: &'a CpuStorage, layout: &Layout) -> &'a [f64] {
    let (start, end) = layout.contiguous_offsets().unwrap();
    &storage.as_slice::<f64>().unwrap()[start..end]
}

/// Before layers that are split by their outputs: the input is whole, its gradient a sum.
struct Enter(Rank);

impl CustomOp1 for Enter {
    fn name(&self) -> &'static str {
        "enter"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let same = held(x, layout).to_vec();
        Ok((CpuStorage::F64(same), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        sum(&self.0, grad).map(Some)
    }
}

/// Behind layers that are split by their inputs: the output is a sum, its gradient whole.
struct Leave(Rank);

impl CustomOp1 for Leave {
    fn name(&self) -> &'static str {
        "leave"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let all = summed(&self.0, held(x, layout));
        Ok((CpuStorage::F64(all), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.clone()))
    }
}

fn weights() -> Result<[Linear; 2]> {
    let layer = |i: usize| -> Result<Linear> {
        let (width, out) = (WIDTHS[i], WIDTHS[i + 1]);
        let weight = (seeded((out, width), i as u64) / (width as f64).sqrt())?;
        Ok(Linear::new(weight, Some(seeded(out, 10 + i as u64))))
    };
    Ok([layer(0)?, layer(1)?])
}

/// Gradients by layer and name, and of the input.
struct Pass {
    output: Tensor,
    input: Tensor,
    grads: [BTreeMap<String, Tensor>; 2],
}

/// Two layers, with what is around them; `part` cuts a parameter of a layer to what the layers have.
fn pass(
    layers: [Linear; 2],
    part: impl Fn(usize, &str, &Tensor) -> Result<Tensor>,
    enter: impl Fn(&Tensor) -> Result<Tensor>,
    leave: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Pass> {
    let config = DoftConfig::default().with_block_size(8);
    let (mut doft, mut vars) = (Vec::new(), Vec::new());
    for (i, (whole, mine)) in weights()?.into_iter().zip(layers).enumerate() {
        // Parameters away from the start, the same on all ranks.
        let (_, all) = wrapped(&whole, &config)?;
        disturb(&all, 0.2)?;
        let (layer, map) = wrapped(&mine, &config)?;
        let all: BTreeMap<String, Var> = named(&all, []).into_iter().collect();
        for (name, var) in named(&map, []) {
            var.set(&part(i, &name, all[&name].as_tensor())?.contiguous()?)?;
        }
        doft.push(layer);
        vars.push(named(&map, []));
    }
    let x = Var::from_tensor(&seeded((5, WIDTHS[0]), 30))?;
    let hidden = doft[0].forward(&enter(x.as_tensor())?)?.tanh()?;
    let output = leave(&doft[1].forward(&hidden)?)?;
    let uneven = seeded(output.dims(), 31);
    let store = (&output * uneven)?.sum_all()?.backward()?;
    let of = |vars: &[(String, Var)]| -> BTreeMap<String, Tensor> {
        let grad = |(name, var): &(String, Var)| (name.clone(), store.get(var).unwrap().clone());
        vars.iter().map(grad).collect()
    };
    Ok(Pass {
        input: store.get(&x).unwrap().clone(),
        grads: [of(&vars[0]), of(&vars[1])],
        output: output.detach(),
    })
}

fn is_rotation(name: &str) -> bool {
    name.contains("oft_R")
}

fn assert_same(what: &str, found: &Tensor, expected: &Tensor) -> Result<()> {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let off = (found - expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
    let size = expected.abs()?.max_all()?.to_scalar::<f64>()?;
    assert!(size > 1e-3, "{what} is {size:e}, which shows nothing");
    assert!(off <= 1e-12 * size, "{what} is off by {off:e} of {size:e}");
    Ok(())
}

#[test]
fn two_ranks_with_halves_of_the_layers_compute_what_one_does() -> Result<()> {
    let whole = |_: usize, _: &str, all: &Tensor| Ok(all.clone());
    let copy = |x: &Tensor| Ok(x.clone());
    let one = pass(weights()?, whole, copy, copy)?;
    assert_eq!(one.output.dtype(), DType::F64);
    let half = |x: &Tensor, dim: usize, rank: usize| {
        let part = x.dim(dim)? / RANKS;
        x.narrow(dim, rank * part, part)
    };
    let work = |rank: &Rank| -> Result<Pass> {
        let [first, last] = weights()?;
        let me = rank.rank();
        // Outputs of the first, inputs of the last; its bias on one rank.
        let bias = first.bias().map(|bias| half(bias, 0, me)).transpose()?;
        let column = Linear::new(half(first.weight(), 0, me)?.contiguous()?, bias);
        let bias = last.bias().filter(|_| me == 0).cloned();
        let row = Linear::new(half(last.weight(), 1, me)?.contiguous()?, bias);
        let part = |layer: usize, name: &str, all: &Tensor| match (layer, is_rotation(name)) {
            (0, false) | (1, true) => half(all, 0, me),
            _ => Ok(all.clone()),
        };
        let enter = |x: &Tensor| x.contiguous()?.apply_op1(Enter(rank.clone()));
        let leave = |x: &Tensor| x.contiguous()?.apply_op1(Leave(rank.clone()));
        pass([column, row], part, enter, leave)
    };
    let ranks: Vec<Pass> = on_ranks(RANKS, work).0.into_iter().collect::<Result<_>>()?;
    for rank in &ranks {
        assert_same("the output", &rank.output, &one.output)?;
        assert_same("the gradient of the input", &rank.input, &one.input)?;
    }
    for (layer, expected) in one.grads.iter().enumerate() {
        assert_eq!(expected.len(), 2, "{:?}", expected.keys());
        for (name, expected) in expected {
            let parts = [0, 1].map(|rank: usize| &ranks[rank].grads[layer][name]);
            let joined = match (layer, is_rotation(name)) {
                (0, false) | (1, true) => Tensor::cat(&parts, 0)?,
                _ => (parts[0] + parts[1])?,
            };
            assert_same(&format!("layer {layer}: {name}"), &joined, expected)?;
        }
    }
    Ok(())
}
