//! Small random models of each architecture, adapted end to end, and the programs that do it; the real
//! SmolLM2 where its file is at hand (`CANDLE_DOFT_SMOLLM2`).

#[path = "../support/mod.rs"]
mod common;
#[path = "../../examples/support/mod.rs"]
mod support;

mod extracted;
mod foreign;
mod gguf;
mod hostile;
mod hub;
mod memory;
mod model;
mod places;
mod programs;
mod ranks;
mod readers;
mod real;
mod refusals;
mod runs;
mod serving;
mod small;
mod text;
mod texts;
mod tune;
