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
    let (left, right) = ends(values);
    let (low, high) = ends(milliseconds);
    // Whole powers of two above and below, so that a flat line looks flat.
    let (low, high) = (low.log2().floor().exp2(), high.log2().ceil().exp2());
    let margin = 0.15f64.exp2();
    let mut chart = ChartBuilder::on(area)
        .caption(format!("by {} ({})", sweep.name, sweep.fixed), style(16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(58)
        .build_cartesian_2d(
            (left / margin..right * margin).log_scale().base(2.),
            (low..high).log_scale().base(2.),
        )?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(SOFT.mix(0.3))
        .axis_style(SOFT)
        .x_labels(8)
        .y_labels(8)
        .x_desc(sweep.name)
        .y_desc("ms a step")
        .x_label_formatter(&|value| power(*value))
        .y_label_formatter(&|value| power(*value))
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

/// The least and the largest value; 1 and 2 where there is none.
fn ends(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let ends = values.fold((f64::INFINITY, 0f64), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    if ends.0.is_finite() { ends } else { (1., 2.) }
}

/// Powers of two alone: what an axis with few of them puts between has no round number.
fn power(value: f64) -> String {
    let exponent = value.log2();
    if (exponent - exponent.round()).abs() > 1e-6 {
        return String::new();
    }
    match exponent.round() {
        0.0.. => format!("{value:.0}"),
        _ => format!("1/{:.0}", 1. / value),
    }
}
