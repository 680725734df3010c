//! The results of `ratios`, `growth` and criterion as Markdown, the bounds first.
//!
//!     cargo bench --bench table

mod bounds;
mod markdown;
mod results;
#[path = "../../examples/support/mod.rs"]
mod support;

use support::context::{self, Context};

fn main() -> anyhow::Result<()> {
    let ratios: Option<Vec<results::Entry>> = results::read("target/ratios.json")?;
    let growth: Option<results::Growth> = results::read("target/growth.json")?;
    let criterion = results::criterion()?;
    anyhow::ensure!(
        ratios.is_some() || growth.is_some() || !criterion.is_empty(),
        "nothing was measured: run `cargo bench --bench ratios` first"
    );
    if let Some(entries) = &ratios {
        print!("{}", markdown::bounds(&bounds::BOUNDS, entries));
        print!("{}", markdown::ratios(entries));
    }
    if let Some(growth) = &growth {
        print!("{}", markdown::growth(growth));
    }
    if let Some(last) = criterion.iter().map(|estimate| estimate.at).max() {
        // Criterion keeps times alone; the rest is what it would find here.
        let here = Context {
            date: context::date(last),
            ..context::context(false)
        };
        print!("{}", markdown::criterion(&criterion, &here));
    }
    Ok(())
}
