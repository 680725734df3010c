//! The loss as a picture.

use crate::support::plot::{self, Axis, Line, Panel};
use anyhow::Result;
use plotters::style::RGBColor;

/// The loss of each step, and the held-out loss where it was measured.
pub fn picture(losses: &[(u64, f64)], held_out: &[(u64, f64)], title: String) -> Result<String> {
    let line = |name: &str, color: RGBColor, points: &[(u64, f64)], thin: bool| Line {
        name: name.into(),
        color,
        thin,
        points: points
            .iter()
            .map(|(step, loss)| (*step as f64, *loss).into())
            .collect(),
    };
    let panel = Panel {
        title,
        x: Axis::linear("step"),
        y: Axis::linear("loss of a token"),
        lines: vec![
            line("training", plot::BLUE, losses, true),
            line("held out", plot::ORANGE, held_out, false),
        ],
    };
    plot::grid(&[panel], 1)
}
