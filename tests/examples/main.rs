//! The examples and benches: as programs, and what they compute beside the library.

#[path = "../../benches/table/bounds.rs"]
mod bounds;
#[path = "../support/mod.rs"]
mod common;
#[path = "../../benches/table/markdown.rs"]
mod markdown;
#[path = "../../benches/table/results.rs"]
#[allow(dead_code, reason = "the bench reads files")]
mod results;
#[path = "../../examples/support/mod.rs"]
mod support;

mod arithmetic;
mod benches;
mod bert;
mod commands;
mod compare;
mod digits;
mod methods;
mod statistics;
