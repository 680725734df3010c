//! Line charts as SVG: panels side by side, axes linear or logarithmic, the names of the lines below.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Size of a panel in a grid.
const PANEL: (u32, u32) = (560, 440);

/// Height of the names of the lines.
const NAMES: u32 = 76;

const FONT: &str = "sans-serif";
pub const INK: RGBColor = RGBColor(38, 50, 56);
pub const SOFT: RGBColor = RGBColor(144, 156, 163);
pub const GREEN: RGBColor = RGBColor(0, 121, 107);
pub const BLUE: RGBColor = RGBColor(57, 73, 171);
pub const ORANGE: RGBColor = RGBColor(230, 126, 34);
pub const RED: RGBColor = RGBColor(198, 60, 40);
pub const GREY: RGBColor = RGBColor(96, 96, 96);

pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub struct Panel {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub lines: Vec<Line>,
}

pub struct Axis {
    pub name: &'static str,
    /// The base of a logarithmic axis.
    pub base: Option<f64>,
    /// Ends that hold whatever the data say.
    pub range: Option<(f64, f64)>,
}

/// A line, with a band around it where its points have one.
pub struct Line {
    pub name: String,
    pub color: RGBColor,
    pub thin: bool,
    pub points: Vec<Point>,
}

pub struct Point {
    pub x: f64,
    pub y: f64,
    /// The ends of the band.
    pub low: f64,
    pub high: f64,
}

impl From<(f64, f64)> for Point {
    fn from((x, y): (f64, f64)) -> Self {
        let (low, high) = (y, y);
        Self { x, y, low, high }
    }
}

/// A picture on white, so that a dark page shows it as well.
pub fn svg(size: (u32, u32), draw: impl FnOnce(&Area) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        draw(&root)?;
        root.present()?;
    }
    Ok(svg)
}

/// Panels in rows of so many.
pub fn grid(panels: &[Panel], columns: usize) -> Result<String> {
    let rows = panels.len().div_ceil(columns);
    let size = (PANEL.0 * columns as u32, PANEL.1 * rows as u32);
    svg(size, |root| {
        let mut places = root.split_evenly((rows, columns)).into_iter().zip(panels);
        places.try_for_each(|(area, panel)| draw(&area, panel))
    })
}

/// Words that begin at a place, at half their height.
pub fn text(area: &Area, words: &str, at: (i32, i32), size: i32, color: RGBColor) -> Result<()> {
    let style = (FONT, size).into_font().color(&color);
    let style = style.pos(Pos::new(HPos::Left, VPos::Center));
    Ok(area.draw_text(words, &style, at)?)
}

/// One panel, which fills the area.
pub fn draw(area: &Area, panel: &Panel) -> Result<()> {
    let style = |size: i32| (FONT, size).into_font().color(&INK);
    let (chart, below) = area.split_vertically(area.dim_in_pixel().1 - NAMES);
    names(&below, &panel.lines)?;
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let (left, right) = panel.x.ends(points().map(|p| p.x));
    let (low, high) = panel.y.ends(points().flat_map(|p| [p.y, p.low, p.high]));
    let mut chart = ChartBuilder::on(&chart)
        .caption(&panel.title, style(17))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(62)
        .build_cartesian_2d(left..right, low..high)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(SOFT.mix(0.3))
        .axis_style(SOFT)
        .x_labels(8)
        .y_labels(6)
        .x_desc(panel.x.name)
        .y_desc(panel.y.name)
        .x_label_formatter(&|x| panel.x.label(*x))
        .y_label_formatter(&|y| panel.y.label(*y))
        .label_style(style(13))
        .draw()?;
    for line in &panel.lines {
        let place = |x: f64, y: f64| (panel.x.place(x), panel.y.place(y).clamp(low, high));
        if line.points.iter().any(|p| p.low < p.high) {
            let above = line.points.iter().map(|p| place(p.x, p.high));
            let below = line.points.iter().rev().map(|p| place(p.x, p.low));
            let band: Vec<(f64, f64)> = above.chain(below).collect();
            chart.draw_series([Polygon::new(band, line.color.mix(0.14))])?;
        }
        let middle = line.points.iter().map(|p| place(p.x, p.y));
        chart.draw_series(LineSeries::new(middle, line.stroke()))?;
    }
    Ok(())
}

impl Axis {
    pub fn linear(name: &'static str) -> Self {
        let (base, range) = (None, None);
        Self { name, base, range }
    }

    pub fn log(name: &'static str, base: f64) -> Self {
        let (base, range) = (Some(base), None);
        Self { name, base, range }
    }

    pub fn with_range(mut self, low: f64, high: f64) -> Self {
        self.range = Some((low, high));
        self
    }

    fn place(&self, value: f64) -> f64 {
        self.base.map_or(value, |base| value.log(base))
    }

    fn ends(&self, values: impl Iterator<Item = f64>) -> (f64, f64) {
        if let Some((low, high)) = self.range {
            return (self.place(low), self.place(high));
        }
        let places = values.map(|v| self.place(v)).filter(|v| v.is_finite());
        let (low, high) = places.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
            (low.min(v), high.max(v))
        });
        let margin = (0.04 * (high - low)).max(1e-3);
        match low.is_finite() && self.base.is_some() {
            true => (low - margin, high + margin),
            false if low.is_finite() => (low, high.max(low + 1e-9)),
            false => (0., 1.),
        }
    }

    fn label(&self, place: f64) -> String {
        let value = self.base.map_or(place, |base| base.powf(place));
        if value == 0. || value.abs() >= 10. {
            return format!("{value:.0}");
        }
        // Two digits that count.
        let digits = (1. - value.abs().log10().floor()) as usize;
        match digits {
            5.. => format!("{value:.0e}"),
            _ => {
                let text = format!("{value:.digits$}");
                text.trim_end_matches('0').trim_end_matches('.').to_string()
            }
        }
    }
}

impl Line {
    fn stroke(&self) -> ShapeStyle {
        self.color.stroke_width(if self.thin { 1 } else { 3 })
    }
}

/// The names of the lines in two columns; over the lines they would hide them.
fn names(area: &Area, lines: &[Line]) -> Result<()> {
    let rows = lines.len().div_ceil(2).max(1);
    for (place, line) in lines.iter().enumerate() {
        let x = 74 + (place / rows) as i32 * 250;
        let y = 8 + (place % rows) as i32 * 22;
        area.draw(&PathElement::new([(x, y), (x + 22, y)], line.stroke()))?;
        text(area, &line.name, (x + 30, y), 13, INK)?;
    }
    Ok(())
}
