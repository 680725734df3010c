//! Tables and lines of what was found.

use crate::measure::{Limit, Losses, Measured};
use crate::search::{Search, Tried};
use crate::support::markdown::table;

/// Perplexities of target and second text on both parts.
fn cells(measured: &Measured) -> Vec<String> {
    let part = |losses: Losses| {
        let general = losses.general.map(|loss| format!("{:.3}", loss.exp()));
        [
            format!("{:.3}", losses.target.exp()),
            general.unwrap_or_else(|| "-".into()),
        ]
    };
    [part(measured.choose), part(measured.report)].concat()
}

/// The perplexities at one strength for all layers.
pub(crate) fn curve(tried: &[Tried]) -> String {
    let head = [
        "strength",
        "target, choosing",
        "kept, choosing",
        "target, reported",
        "kept, reported",
    ];
    let row = |tried: &Tried| [vec![tried.strength().to_string()], cells(&tried.measured)].concat();
    table(head, tried.iter().map(row))
}

/// The strength of each layer or block.
pub(crate) fn groups(chosen: &Search) -> String {
    let row = |(name, strength): (&str, f64)| vec![name.to_string(), strength.to_string()];
    table(["layers", "strength"], chosen.groups().map(row))
}

/// What was chosen.
pub(crate) fn chosen(chosen: &Search, limit: Option<Limit>) -> String {
    let what = match chosen.one() {
        Some(strength) => format!("strength {strength}"),
        None => "the strengths of the table".to_string(),
    };
    let why = match limit {
        Some(limit) => format!(
            "lowest perplexity of the target where that of the kept text rises by at most {:.2} %",
            100. * limit.allow
        ),
        None => "lowest perplexity of the target".to_string(),
    };
    let cells = cells(&chosen.measured);
    format!(
        "chosen: {what} ({why}); on the reported part: target {}, kept {}",
        cells[2], cells[3]
    )
}

/// What the user should know of the choice; `base` is what was measured at strength 0.
pub(crate) fn notes(chosen: &Search, limit: Option<Limit>, base: &Measured) -> Vec<String> {
    let mut notes = Vec::new();
    if chosen.one() == Some(0.) {
        notes.push(
            "no strength that is allowed is better than the base, so 0 was chosen".to_string(),
        );
    }
    let (found, before) = (chosen.measured.report, base.report);
    if let (Some(limit), Some(found), Some(before)) = (limit, found.general, before.general)
        && found > before + limit.allow.ln_1p()
    {
        let rise = 100. * (found - before).exp_m1();
        notes.push(format!(
            "on the reported part the perplexity of the kept text rises by {rise:.2} %, more than --allow; give \
             more text (--sequences) or a smaller --allow"
        ));
    }
    if found.target > before.target {
        notes.push("on the reported part the target is worse than with the base".to_string());
    }
    notes
}
