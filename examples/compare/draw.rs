//! The pictures: learning curves, quality against rate, best rate against block size, norm drift.

use crate::method::{Entry, Name, entry};
use crate::stats::Interval;
use crate::summary::TaskSummary;
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const PANEL: (u32, u32) = (560, 440);

/// Height of the names of the lines, below the chart.
const NAMES: u32 = 76;
const INK: RGBColor = RGBColor(38, 50, 56);
const SOFT: RGBColor = RGBColor(144, 156, 163);
const FONT: &str = "sans-serif";

/// A line with a band around it.
struct Line {
    label: String,
    color: RGBColor,
    thin: bool,
    /// x, y, and the ends of the band.
    points: Vec<(f64, f64, f64, f64)>,
}

struct Panel {
    title: String,
    x: Axis,
    y: Axis,
    lines: Vec<Line>,
}

struct Axis {
    name: &'static str,
    /// The base of a logarithmic axis.
    base: Option<f64>,
    /// Ends that hold whatever the data say.
    range: Option<(f64, f64)>,
}

/// Every picture by its name.
pub fn pictures(summaries: &[TaskSummary]) -> Result<Vec<(&'static str, String)>> {
    let with = |has: fn(&TaskSummary) -> bool| summaries.iter().filter(move |s| has(s));
    let groups: [(&str, Vec<Panel>); 4] = [
        ("curves.svg", summaries.iter().map(curves).collect()),
        ("rates.svg", summaries.iter().map(rates).collect()),
        (
            "blocks.svg",
            with(|s| !s.block_sizes.is_empty()).map(blocks).collect(),
        ),
        (
            "norms.svg",
            with(|s| !s.orthogonality.is_empty()).map(norms).collect(),
        ),
    ];
    let mut pictures = Vec::new();
    for (name, panels) in groups {
        if !panels.is_empty() {
            pictures.push((name, picture(&panels)?));
        }
    }
    Ok(pictures)
}

fn color(entry: Entry) -> RGBColor {
    match entry.method {
        Name::Lora => RGBColor(230, 126, 34),
        Name::Dora => RGBColor(198, 60, 40),
        Name::Oft => RGBColor(57, 73, 171),
        Name::Doft => RGBColor(0, 121, 107),
        Name::DoftUnscaled => RGBColor(142, 68, 173),
        Name::DoftSeries => RGBColor(121, 85, 72),
        Name::DoftCapped => RGBColor(0, 151, 210),
        Name::Full => RGBColor(96, 96, 96),
    }
}

/// The methods that are drawn: each once, at about as many parameters.
fn drawn(entry_: Entry) -> bool {
    let main = [
        entry(Name::Lora, 8),
        entry(Name::Dora, 8),
        entry(Name::Oft, 32),
        entry(Name::Doft, 32),
        entry(Name::DoftUnscaled, 32),
        entry(Name::Full, 0),
    ];
    main.contains(&entry_)
}

fn scale(summary: &TaskSummary) -> (f64, Axis) {
    match summary.measure {
        "accuracy" => (
            100.,
            Axis {
                name: "test accuracy, %",
                base: None,
                range: Some((0., 100.)),
            },
        ),
        _ => (
            1.,
            Axis {
                name: "test perplexity",
                base: Some(10.),
                range: None,
            },
        ),
    }
}

fn point(x: f64, y: &Interval, scale: f64) -> (f64, f64, f64, f64) {
    (x, scale * y.mean, scale * y.low, scale * y.high)
}

fn curves(summary: &TaskSummary) -> Panel {
    let (scale, y) = scale(summary);
    let methods = summary.methods.iter().filter(|m| drawn(m.entry));
    let line = |m: &crate::summary::MethodSummary| Line {
        label: format!("{}, rate {}", m.entry.label(), m.best_lr),
        color: color(m.entry),
        thin: false,
        points: m
            .curve
            .iter()
            .map(|(step, y)| point(*step as f64, y, scale))
            .collect(),
    };
    Panel {
        title: format!("{}: best rate of each method", summary.task),
        x: Axis {
            name: "steps",
            base: None,
            range: None,
        },
        y,
        lines: methods.map(line).collect(),
    }
}

fn rates(summary: &TaskSummary) -> Panel {
    let (scale, y) = scale(summary);
    let methods = summary.methods.iter().filter(|m| drawn(m.entry));
    let line = |m: &crate::summary::MethodSummary| Line {
        label: m.entry.label(),
        color: color(m.entry),
        thin: false,
        points: m
            .rates
            .iter()
            .filter_map(|r| Some(point(r.lr, r.test.as_ref()?, scale)))
            .collect(),
    };
    Panel {
        title: format!("{}: every rate", summary.task),
        x: Axis {
            name: "learning rate",
            base: Some(10.),
            range: None,
        },
        y,
        lines: methods.map(line).collect(),
    }
}

fn blocks(summary: &TaskSummary) -> Panel {
    let line = |method: Name| {
        let mine = summary
            .block_sizes
            .iter()
            .filter(|b| b.entry.method == method);
        let points = mine.filter_map(|b| {
            let best = b.best_lr_of_seeds.as_ref()?;
            Some(point(b.entry.size as f64, best, 1.))
        });
        Line {
            label: method.label().to_string(),
            color: color(entry(method, 0)),
            thin: false,
            points: points.collect(),
        }
    };
    Panel {
        title: format!("{}: best rate of each block size", summary.task),
        x: Axis {
            name: "block size",
            base: Some(2.),
            range: None,
        },
        y: Axis {
            name: "best learning rate",
            base: Some(2.),
            range: None,
        },
        lines: vec![line(Name::Doft), line(Name::DoftUnscaled)],
    }
}

fn norms(summary: &TaskSummary) -> Panel {
    let lowest = summary.orthogonality.iter().map(|o| o.lr);
    let lowest = lowest.fold(f64::INFINITY, f64::min);
    let line = |o: &crate::studies::Orthogonality| Line {
        label: format!("{}, rate {}", o.entry.label(), o.lr),
        color: color(o.entry),
        thin: o.lr > lowest,
        points: o
            .trace
            .iter()
            .map(|look| {
                let y = look.norm_drift_mean.max(1e-9);
                (look.step as f64, y, y, y)
            })
            .collect(),
    };
    Panel {
        title: format!("{}: how far row norms are off", summary.task),
        x: Axis {
            name: "steps",
            base: None,
            range: None,
        },
        y: Axis {
            name: "mean of | ||row|| / m - 1 |",
            base: Some(10.),
            range: None,
        },
        lines: summary.orthogonality.iter().map(line).collect(),
    }
}

fn picture(panels: &[Panel]) -> Result<String> {
    let mut svg = String::new();
    {
        let size = (PANEL.0 * panels.len() as u32, PANEL.1);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let failed = |error: String| anyhow!("a picture cannot be drawn: {error}");
        root.fill(&WHITE).map_err(|e| failed(e.to_string()))?;
        for (area, panel) in root.split_evenly((1, panels.len())).iter().zip(panels) {
            draw(area, panel).map_err(|e| failed(e.to_string()))?;
        }
        root.present().map_err(|e| failed(e.to_string()))?;
    }
    Ok(svg)
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        self.base.map_or(value, |base| value.log(base))
    }

    fn ends(&self, values: impl Iterator<Item = f64>) -> (f64, f64) {
        if let Some(range) = self.range {
            return range;
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

type Area<'a, 'b> = &'b DrawingArea<SVGBackend<'a>, Shift>;

fn draw(area: Area, panel: &Panel) -> Result<(), Box<dyn std::error::Error>> {
    let style = |size: i32| (FONT, size).into_font().color(&INK);
    let (chart, below) = area.split_vertically(PANEL.1 - NAMES);
    names(&below, &panel.lines)?;
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let (left, right) = panel.x.ends(points().map(|p| p.0));
    let (low, high) = panel.y.ends(points().flat_map(|p| [p.1, p.2, p.3]));
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
        let above = line.points.iter().map(|p| place(p.0, p.3));
        let below = line.points.iter().rev().map(|p| place(p.0, p.2));
        let band: Vec<(f64, f64)> = above.chain(below).collect();
        chart.draw_series([Polygon::new(band, line.color.mix(0.14))])?;
        let middle = line.points.iter().map(|p| place(p.0, p.1));
        chart.draw_series(LineSeries::new(middle, line.stroke()))?;
    }
    Ok(())
}

impl Line {
    fn stroke(&self) -> ShapeStyle {
        self.color.stroke_width(if self.thin { 1 } else { 3 })
    }
}

/// The names of the lines in two columns; over the lines they would hide them.
fn names(
    area: &DrawingArea<SVGBackend, Shift>,
    lines: &[Line],
) -> Result<(), Box<dyn std::error::Error>> {
    let rows = lines.len().div_ceil(2).max(1);
    for (place, line) in lines.iter().enumerate() {
        let x = 74 + (place / rows) as i32 * 250;
        let y = 8 + (place % rows) as i32 * 22;
        area.draw(&PathElement::new([(x, y), (x + 22, y)], line.stroke()))?;
        let style = (FONT, 13).into_font().color(&INK);
        let style = style.pos(Pos::new(HPos::Left, VPos::Center));
        area.draw_text(&line.label, &style, (x + 30, y))?;
    }
    Ok(())
}
