//! What examples, benches and the tests of both share, a module for each thing.

#![allow(dead_code, reason = "each program uses a part")]

pub mod cli;
pub mod context;
pub mod device;
pub mod digits;
pub mod encoder;
pub mod files;
pub mod llm;
pub mod markdown;
pub mod memory;
pub mod methods;
pub mod network;
pub mod pages;
pub mod plot;
pub mod progress;
pub mod stats;
