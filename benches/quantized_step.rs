//! A step through quantized and half weights beside the dense one, and the loss over a head.

mod steps;
#[path = "../examples/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use steps::quantized;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn quantized_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("quantized_step");
    group.sample_size(20);
    let types = quantized::TYPES.iter().map(|(name, _)| *name);
    for method in ["dense", "bf16", "forward", "qmatmul"]
        .into_iter()
        .chain(types)
    {
        let step = quantized::run(method).expect("a layer that agrees");
        let id = BenchmarkId::new(method, steps::name(quantized::SHAPE));
        group.bench_function(id, |b| b.iter(|| step().expect("a step")));
    }
    group.finish();
    let mut group = c.benchmark_group("loss");
    group.sample_size(10);
    for method in ["fused", "plain"] {
        let step = quantized::loss(method).expect("a head");
        let id = BenchmarkId::new(method, "512x576x49152");
        group.bench_function(id, |b| b.iter(|| step().expect("a step")));
    }
    group.finish();
}

criterion_group!(benches, quantized_step);
criterion_main!(benches);
