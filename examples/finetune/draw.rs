//! The loss as a picture.

use anyhow::Result;
use plotters::prelude::*;
use std::path::Path;

const BLUE: RGBColor = RGBColor(31, 119, 180);
const ORANGE: RGBColor = RGBColor(214, 98, 20);

/// Draws the loss of each step, and the held-out loss where it was measured.
pub fn draw(
    file: &Path,
    losses: &[(u64, f64)],
    held_out: &[(u64, f64)],
    title: &str,
) -> Result<()> {
    let all = losses.iter().chain(held_out);
    let (mut low, mut high, mut last) = (f64::INFINITY, f64::NEG_INFINITY, 1);
    for (step, loss) in all {
        (low, high, last) = (low.min(*loss), high.max(*loss), last.max(*step));
    }
    if !(low.is_finite() && high.is_finite()) {
        return Ok(());
    }
    let margin = (0.05 * (high - low)).max(1e-3);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (760, 420)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 18))
            .margin(14)
            .x_label_area_size(38)
            .y_label_area_size(48)
            .build_cartesian_2d(0u64..last, low - margin..high + margin)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc("step")
            .y_desc("loss of a token")
            .draw()?;
        chart
            .draw_series(LineSeries::new(losses.iter().copied(), BLUE.mix(0.6)))?
            .label("training")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], BLUE));
        let line = LineSeries::new(held_out.iter().copied(), ORANGE.stroke_width(3)).point_size(3);
        chart
            .draw_series(line)?
            .label("held out")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], ORANGE.stroke_width(3)));
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .draw()?;
        root.present()?;
    }
    crate::support::files::replace(file, svg.as_bytes())
}
