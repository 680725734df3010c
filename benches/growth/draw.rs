//! The picture: one panel for each size that grows, both axes logarithmic.

use super::{Grown, METHODS};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::error::Error;

const PANEL: (u32, u32) = (480, 340);

/// Height of the names of the lines, above the panels.
const NAMES: u32 = 44;
const INK: RGBColor = RGBColor(38, 50, 56);
const SOFT: RGBColor = RGBColor(144, 156, 163);
const FONT: &str = "sans-serif";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn color(method: &str) -> RGBColor {
    match method {
        "gemm" => RGBColor(96, 96, 96),
        "frozen" => RGBColor(230, 126, 34),
        _ => RGBColor(0, 121, 107),
    }
}

fn label(method: &str) -> &'static str {
    match method {
        "gemm" => "the two bare products",
        "frozen" => "frozen layer",
        _ => "DOFT",
    }
}

/// The whole picture as SVG, on white, so that a dark page shows it as well.
pub fn picture(sweeps: &[Grown]) -> anyhow::Result<String> {
    let mut svg = String::new();
    draw(sweeps, &mut svg).map_err(|error| anyhow::anyhow!("no picture: {error}"))?;
    Ok(svg)
}

fn draw(sweeps: &[Grown], svg: &mut String) -> Result<(), Box<dyn Error>> {
    let rows = sweeps.len().div_ceil(2);
    let size = (2 * PANEL.0, rows as u32 * PANEL.1 + NAMES);
    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (top, below) = root.split_vertically(NAMES);
    names(&top)?;
    for (area, sweep) in below.split_evenly((rows, 2)).iter().zip(sweeps) {
        panel(area, sweep)?;
    }
    root.present()?;
    Ok(())
}

fn names(area: &Area) -> Result<(), Box<dyn Error>> {
    for (place, method) in METHODS.iter().enumerate() {
        let (x, y) = (74 + place as i32 * 210, 26);
        let line = PathElement::new([(x, y), (x + 26, y)], color(method).stroke_width(3));
        area.draw(&line)?;
        let style = (FONT, 15).into_font().color(&INK);
        let style = style.pos(Pos::new(HPos::Left, VPos::Center));
        area.draw_text(label(method), &style, (x + 34, y))?;
    }
    Ok(())
}

fn panel(area: &Area, sweep: &Grown) -> Result<(), Box<dyn Error>> {
    let style = |size: i32| (FONT, size).into_font().color(&INK);
    let values = sweep.points.iter().map(|point| point.value as f64);
    let times = || sweep.points.iter().flat_map(|point| point.seconds.values());
    let milliseconds = times().map(|seconds| 1e3 * seconds);
    // Powers of two on both axes, so that a line of slope one is one that grows in proportion.
    let ((left, right), (low, high)) = (ends(values, 0.15), ends(milliseconds, 0.3));
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}: {}", sweep.name, sweep.fixed), style(16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(58)
        .build_cartesian_2d(
            (left..right).log_scale().base(2.),
            (low..high).log_scale().base(2.),
        )?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(SOFT.mix(0.3))
        .axis_style(SOFT)
        .x_labels(14)
        .y_labels(8)
        .x_desc(sweep.name)
        .y_desc("ms a step")
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| number(*value))
        .label_style(style(13))
        .draw()?;
    for method in METHODS {
        let color = color(method);
        let place = |point: &super::Point| (point.value as f64, 1e3 * point.seconds[method]);
        let points = || sweep.points.iter().map(place);
        chart.draw_series(LineSeries::new(points(), color.stroke_width(3)))?;
        let dots = points().map(|at| Circle::new(at, 4, color.filled()));
        chart.draw_series(dots)?;
    }
    Ok(())
}

/// The ends of an axis that holds the values, `margin` powers of two beyond them.
fn ends(values: impl Iterator<Item = f64>, margin: f64) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, 0f64), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    match low.is_finite() {
        true => (low / margin.exp2(), high * margin.exp2()),
        false => (1., 2.),
    }
}

/// Without digits that say nothing.
fn number(value: f64) -> String {
    match value {
        10.0.. => format!("{value:.0}"),
        1.0..10. => format!("{value:.1}").trim_end_matches(".0").to_string(),
        _ => format!("{value:.2}"),
    }
}
