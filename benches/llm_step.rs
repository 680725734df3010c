//! A training step of a language model of SmolLM2-135M's shape.

mod steps;
#[path = "../examples/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use support::pages;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn llm_step(c: &mut Criterion) {
    pages::keep(pages::FOR_GOOD);
    let mut group = c.benchmark_group("llm_step");
    group.sample_size(10);
    let weights = steps::llm::weights(steps::llm::LAYERS).expect("weights");
    for method in ["gemm", "none", "doft", "oft", "lora", "dora"] {
        let step = steps::llm::run(method, &weights).expect("a model");
        let id = BenchmarkId::new(method, "4x128");
        group.bench_function(id, |b| b.iter(|| step().expect("a step")));
    }
    group.finish();
}

criterion_group!(benches, llm_step);
criterion_main!(benches);
