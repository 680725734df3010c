//! One training step of one linear layer: forward, then backward to the input and to the adapter.

mod steps;
#[path = "../examples/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use std::hint::black_box;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The floor first, what users have today last.
const METHODS: [&str; 10] = [
    "gemm",
    "frozen",
    "doft",
    "oft",
    "lora",
    "dora",
    "candle_linear",
    "candle_lora",
    "candle_dora",
    "candle_oft",
];

const SHAPES: [steps::Shape; 6] = [
    (512, 1024, 1024),
    (512, 576, 1536),
    (2048, 1024, 1024),
    (128, 4096, 4096),
    (8, 1024, 1024),
    (1, 1024, 1024),
];

fn linear_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear_step");
    group.sample_size(20);
    for shape in SHAPES {
        let steps = steps::steps(&METHODS, shape, 32).expect("layers that agree");
        for step in &steps {
            let id = BenchmarkId::new(&step.method, steps::name(shape));
            group.bench_function(id, |b| b.iter(|| black_box(step.run()).expect("a step")));
        }
    }
    group.finish();
}

criterion_group!(benches, linear_step);
criterion_main!(benches);
