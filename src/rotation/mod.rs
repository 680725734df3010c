//! From packed parameters `theta` to rotation blocks `R`.
//!
//! # The one convention
//!
//! A layer of input width `in` is cut into `D = in / b` blocks of size `b`. Block `d` acts on the
//! columns `d*b .. (d+1)*b`.
//!
//! * **Packing.** A row of `theta` is the strict upper triangle of `Q`, row by row:
//!   `(0,1), (0,2) .. (0,b-1), (1,2) ..`, so `n = b(b-1)/2` entries. `Q[i,j] = +v`, `Q[j,i] = -v`
//!   for `i < j`.
//! * **Divisor.** `Q = skew(theta / c)`, with `c` of [`Map::divisor`](crate::Map::divisor) in scaled
//!   OFT, else 1.
//! * **Side.** A linear layer computes `x . blockdiag(R) . W^T`, so its effective weight is
//!   `W . blockdiag(R)^T`: a row of the weight turns by `R^T` on its right.
//! * **Inverse.** `R(-Q) = R(Q)^T` for every map.
//!
//! By hand, for `b = 2`, `theta = 0.5`, `c = 1` and Cayley: `Q = [[0, .5], [-.5, 0]]`,
//! `R = [[.6, .8], [-.8, .6]]`; `x = [1, 0]` becomes `[.6, .8]`, and the row `W = [1, 0]` becomes
//! `W R^T = [.6, -.8]`.
//!
//! Adapter files of other tools are translated to this convention in `file`, nowhere else.
