//! A step of convolutions of several shapes, candle's and this crate's.

mod steps;
#[path = "../examples/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use steps::conv;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn conv_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("conv_step");
    group.sample_size(20);
    for setting in conv::SETTINGS {
        for method in ["candle", "frozen", "doft"] {
            let step = conv::run(method, setting).expect("layers that agree");
            let id = BenchmarkId::new(method, setting.name);
            group.bench_function(id, |b| b.iter(|| step().expect("a step")));
        }
    }
    group.finish();
}

criterion_group!(benches, conv_step);
criterion_main!(benches);
