//! The picture: accuracy against steps, digits before and after, rotation angles of each layer.

use crate::Outcome;
use crate::support::digits::SIDE;
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (1080, 620);
const INK: RGBColor = RGBColor(38, 50, 56);
const SOFT: RGBColor = RGBColor(144, 156, 163);
const RIGHT: RGBColor = RGBColor(0, 121, 107);
const WRONG: RGBColor = RGBColor(198, 60, 40);
const LAYERS: [RGBColor; 3] = [
    RGBColor(0, 121, 107),
    RGBColor(57, 73, 171),
    RGBColor(230, 126, 34),
];
const FONT: &str = "sans-serif";

/// Where the images begin.
const TOP: i32 = 66;

/// Digits that are shown.
const SHOWN: usize = 10;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws everything as SVG text.
pub fn picture(outcome: &Outcome) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = draw(&root, outcome).and_then(|()| root.present().map_err(failed));
        drawn.map_err(|e| anyhow!("the picture cannot be drawn: {e}"))?;
    }
    Ok(svg)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{error}")
}

fn draw(root: &Area, outcome: &Outcome) -> Result<()> {
    root.fill(&WHITE).map_err(failed)?;
    let (digits, charts) = root.split_vertically(222);
    let (left, right) = charts.split_horizontally(SIZE.0 / 2);
    draw_digits(&digits, outcome)?;
    draw_curve(&left.margin(10, 14, 20, 10), outcome)?;
    draw_angles(&right.margin(10, 14, 10, 24), outcome)
}

fn text(area: &Area, words: &str, at: (i32, i32), size: i32, color: RGBColor) -> Result<()> {
    let style = (FONT, size)
        .into_font()
        .color(&color)
        .pos(Pos::new(HPos::Left, VPos::Center));
    area.draw_text(words, &style, at).map_err(failed)
}

fn draw_digits(area: &Area, outcome: &Outcome) -> Result<()> {
    text(
        area,
        "Digits turned by 90 degrees, read by the same frozen network",
        (30, 30),
        20,
        INK,
    )?;
    text(area, "before", (30, 172), 16, SOFT)?;
    text(area, "after DOFT", (30, 200), 16, SOFT)?;
    let cell = 92;
    for (place, i) in chosen(outcome).into_iter().enumerate() {
        let x = 130 + place as i32 * cell;
        let pixel = 10;
        for (p, value) in outcome.digits.images[i].iter().enumerate() {
            let shade = |ink: u8| (255. - f32::from(255 - ink) * value).round() as u8;
            let color = RGBColor(shade(INK.0), shade(INK.1), shade(INK.2));
            let corner = (
                x + (p % SIDE) as i32 * pixel,
                TOP + (p / SIDE) as i32 * pixel,
            );
            let end = (corner.0 + pixel, corner.1 + pixel);
            area.draw(&Rectangle::new([corner, end], color.filled()))
                .map_err(failed)?;
        }
        let frame = [
            (x, TOP),
            (x + SIDE as i32 * pixel, TOP + SIDE as i32 * pixel),
        ];
        area.draw(&Rectangle::new(frame, SOFT.stroke_width(1)))
            .map_err(failed)?;
        let label = outcome.digits.labels[i];
        for (read, y) in [(outcome.before[i], 172), (outcome.after[i], 200)] {
            let color = if read == label { RIGHT } else { WRONG };
            text(area, &read.to_string(), (x + 34, y), 20, color)?;
        }
    }
    Ok(())
}

/// One image of each digit: the first of the test split.
fn chosen(outcome: &Outcome) -> Vec<usize> {
    let labels = &outcome.digits.labels;
    (0..SHOWN as u32)
        .filter_map(|digit| labels.iter().position(|l| *l == digit))
        .collect()
}

fn axis_font(size: i32) -> TextStyle<'static> {
    (FONT, size).into_font().color(&INK)
}

fn draw_curve(area: &Area, outcome: &Outcome) -> Result<()> {
    let last = outcome.curve.last().map_or(1, |point| point.0);
    let mut chart = ChartBuilder::on(area)
        .caption("Accuracy on validation digits", axis_font(18))
        .x_label_area_size(44)
        .y_label_area_size(58)
        .build_cartesian_2d(0..last, 0f64..100.)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(SOFT.mix(0.3))
        .light_line_style(TRANSPARENT)
        .axis_style(SOFT)
        .x_labels(6)
        .y_labels(6)
        .x_desc("steps")
        .y_label_formatter(&|y| format!("{y:.0} %"))
        .label_style(axis_font(13))
        .draw()
        .map_err(failed)?;
    let points: Vec<(usize, f64)> = outcome.curve.iter().map(|(s, a)| (*s, 100. * a)).collect();
    let start = points.first().map_or(0., |point| point.1);
    let level = [(0, start), (last, start)];
    chart
        .draw_series(LineSeries::new(level, WRONG.stroke_width(2)))
        .map_err(failed)?;
    let curve = LineSeries::new(points, RIGHT.stroke_width(3));
    chart.draw_series(curve).map_err(failed)?;
    let label = |words: &'static str, y: f64, color: RGBColor| {
        let style = (FONT, 14)
            .into_font()
            .color(&color)
            .pos(Pos::new(HPos::Right, VPos::Bottom));
        Text::new(words, (last, y), style)
    };
    let end = outcome.curve.last().map_or(0., |point| 100. * point.1);
    let labels = [
        label("frozen", start + 1., WRONG),
        label("DOFT", end - 9., RIGHT),
    ];
    chart.draw_series(labels).map_err(failed)?;
    Ok(())
}

/// All angles of a layer from the smallest to the largest, over the share of planes.
fn draw_angles(area: &Area, outcome: &Outcome) -> Result<()> {
    let degrees = |angles: &[f64]| -> Vec<f64> {
        let mut angles: Vec<f64> = angles.iter().map(|a| a.to_degrees()).collect();
        angles.sort_by(f64::total_cmp);
        angles
    };
    let layers = outcome
        .angles
        .iter()
        .map(|(name, angles)| (name, degrees(angles)));
    let layers: Vec<_> = layers.collect();
    let largest = layers
        .iter()
        .filter_map(|(_, a)| a.last().copied())
        .fold(1., f64::max);
    let top = (largest / 10.).ceil() * 10.;
    let mut chart = ChartBuilder::on(area)
        .caption("Rotation angles of each layer's planes", axis_font(18))
        .x_label_area_size(44)
        .y_label_area_size(58)
        .build_cartesian_2d(0f64..100., 0f64..top)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(SOFT.mix(0.3))
        .light_line_style(TRANSPARENT)
        .axis_style(SOFT)
        .x_labels(6)
        .y_labels(6)
        .x_desc("planes, from the least to the most turned")
        .x_label_formatter(&|x| format!("{x:.0} %"))
        .y_label_formatter(&|y| format!("{y:.0}°"))
        .label_style(axis_font(13))
        .draw()
        .map_err(failed)?;
    for ((name, angles), color) in layers.iter().zip(LAYERS) {
        let share = |i: usize| 100. * (i as f64 + 0.5) / angles.len() as f64;
        let points: Vec<(f64, f64)> = angles
            .iter()
            .enumerate()
            .map(|(i, a)| (share(i), *a))
            .collect();
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(3)))
            .map_err(failed)?
            .label(name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(axis_font(14))
        .border_style(TRANSPARENT)
        .draw()
        .map_err(failed)?;
    Ok(())
}
