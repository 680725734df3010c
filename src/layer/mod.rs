//! The adapted layers: a frozen base, its [`Params`](crate::params::Params), and a `forward`.
//!
//! | layer | computes | weight that acts |
//! |---|---|---|
//! | [`DoftLinear`] | `(m / n0) * ((x . blockdiag(R)) . W^T) + bias` | `diag(m / n0) W blockdiag(R)^T` |
//! | [`DoftConv2d`], [`DoftConv1d`] | the same of each patch | the same, of the flattened kernel |
//! | [`DoftEmbedding`] | `(m_id / n0_id) * (E[id] . blockdiag(R))` | `diag(m / n0) E blockdiag(R)` |
//!
//! An [`Adapter`](crate::Adapter) builds them by path; each also stands alone, made by its `new`.

mod adaptation;
mod adapted;
mod conv;
mod embedding;
mod linear;
mod low_rank;
mod mixed;
mod mode;
mod replay;

pub(crate) use adaptation::{Adaptation, Form, check_finite};
pub use adapted::Doft;
pub(crate) use adapted::{Adaptable, next_id};
pub use conv::{DoftConv1d, DoftConv2d};
pub use embedding::DoftEmbedding;
pub use linear::DoftLinear;
pub(crate) use mixed::Rows;
pub(crate) use mode::{Active, Beside, Control, Pin};
pub use mode::{Mode, Scope};
pub(crate) use replay::{Log, recorded, replayed};
