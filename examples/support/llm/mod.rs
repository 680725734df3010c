//! Language models of the Llama family: what `finetune`, `generate` and the benches share.
//!
//! [`model`] is the file to copy from: a model written on `frozen` and an adapter. The rest reads
//! configurations, weights, tokenizers and text.

pub mod config;
pub mod data;
pub mod gguf;
pub mod gguf_names;
pub mod gguf_tokenizer;
pub mod model;
pub mod open;
pub mod sample;
pub mod template;
pub mod tokenizer;
pub mod train;
pub mod weights;
