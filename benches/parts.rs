//! Rotations, merges and decoded tokens, each alone. The id of a map ends in its distance from
//! orthogonal.

mod steps;
#[path = "../examples/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use steps::parts;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn rotation(c: &mut Criterion) {
    let mut group = c.benchmark_group("rotation");
    group.sample_size(20);
    for b in parts::SIZES {
        for map in parts::MAPS {
            let (run, error) = parts::map(map, b).expect("a map");
            println!("{map} {}: max |R R^T - I| = {error:.1e}", parts::blocks(b));
            let id = BenchmarkId::new(map, parts::blocks(b));
            group.bench_function(id, |b| b.iter(|| run().expect("a rotation")));
        }
    }
    group.finish();
}

fn merge(c: &mut Criterion) {
    let mut group = c.benchmark_group("merge");
    group.sample_size(20);
    for (width, out) in [(1024, 1024), (4096, 4096)] {
        for way in ["copy", "doft"] {
            let run = parts::merge(way, (width, out)).expect("a layer");
            let id = BenchmarkId::new(way, format!("{width}x{out}"));
            group.bench_function(id, |b| b.iter(|| run().expect("a merge")));
        }
    }
    group.finish();
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    let shape = (1, 1024, 1024);
    for way in parts::DECODE {
        let run = parts::decode(way, shape).expect("layers that agree");
        let id = BenchmarkId::new(way, steps::name(shape));
        group.bench_function(id, |b| b.iter(|| run().expect("a token")));
    }
    group.finish();
}

criterion_group!(benches, rotation, merge, decode);
criterion_main!(benches);
