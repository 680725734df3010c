//! Layers of which each rank holds a part: column parallel by outputs, row parallel by inputs.

mod adapted;
mod column;
mod exchange;
mod row;
mod save;
mod sums;

pub use column::{ColumnParallel, DoftColumnParallel};
pub use exchange::Exchange;
pub use row::{DoftRowParallel, RowParallel};
pub use save::{Sharded, save};

use super::{Processes, agree, same};
use crate::error::Result;
use crate::frozen::{Frozen, Linear};

/// Checks the part of each rank, and that all ranks have parts of one shape. Every rank gets the error of any.
fn check_parts(group: &Exchange, path: &str, part: &Linear) -> Result<()> {
    agree(group, part.check_base(path))?;
    let shape = format!(
        "weight [{}, {}], {:?}, {} bias",
        part.out_dim(),
        part.in_dim(),
        part.dtype(),
        if part.bias().is_some() { "with" } else { "no" }
    );
    same(
        group as &dyn Processes,
        &format!("the part of `{path}`"),
        &shape,
    )
}
