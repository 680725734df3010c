//! What the examples share.

#![allow(dead_code, reason = "each example uses a part")]

pub mod cli;
pub mod digits;
pub mod files;
pub mod progress;
