//! Every custom op: its forward kernel, its backward, and the composed twin that runs where there is
//! no kernel. The only place with `unsafe`.

mod adapted;
pub(crate) mod attention;
mod blocks;
pub(crate) mod composed;
mod constants;
pub(crate) mod conv;
pub(crate) mod embedding;
mod gemm;
pub(crate) mod graft;
pub(crate) mod linear;
pub(crate) mod loss;
mod magnitude;
pub(crate) mod maps;
pub(crate) mod mixed;
pub(crate) mod norm;
mod packs;
pub(crate) mod pointwise;
pub(crate) mod real;
pub(crate) mod rotary;
mod rows;
mod vectorized;
mod weight;

pub(crate) use weight::Weight;

#[cfg(test)]
mod edges;
#[cfg(test)]
mod ranges;
#[cfg(test)]
mod tests;
