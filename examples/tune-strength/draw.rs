//! The perplexities over the strength as a picture.

use crate::measure::{Limit, Losses};
use crate::search::Tried;
use crate::support::plot::{self, Axis, Line, Panel};
use anyhow::Result;
use plotters::style::RGBColor;

/// A panel of the target, and one of the second text where there is one.
pub(crate) fn picture(tried: &[Tried], limit: Option<Limit>) -> Result<String> {
    let mut panels = vec![panel("target", tried, |losses| Some(losses.target))];
    if let Some(limit) = limit {
        let mut general = panel("kept text", tried, |losses| losses.general);
        let ends = tried.first().into_iter().chain(tried.last());
        let at = |tried: &Tried| (tried.strength(), limit.loss().exp()).into();
        general.lines.push(Line {
            name: "allowed where it chooses".into(),
            color: plot::RED,
            thin: true,
            points: ends.map(at).collect(),
        });
        panels.push(general);
    }
    let columns = panels.len();
    plot::grid(&panels, columns)
}

fn panel(title: &str, tried: &[Tried], loss: impl Fn(Losses) -> Option<f64>) -> Panel {
    let line = |name: &str, color: RGBColor, part: &dyn Fn(&Tried) -> Losses| {
        let point = |tried: &Tried| {
            let loss = loss(part(tried))?;
            Some((tried.strength(), loss.exp()).into())
        };
        Line {
            name: name.into(),
            color,
            thin: false,
            points: tried.iter().filter_map(point).collect(),
        }
    };
    Panel {
        title: title.into(),
        x: Axis::linear("strength"),
        y: Axis::linear("perplexity"),
        lines: vec![
            line("the part that chooses", plot::BLUE, &|t| t.measured.choose),
            line("the part that is reported", plot::ORANGE, &|t| {
                t.measured.report
            }),
        ],
    }
}
