//! The picture: accuracy against steps, digits before and after, rotation angles of each layer.

use crate::Outcome;
use crate::support::digits::SIDE;
use crate::support::plot::{
    self, Area, Axis, BLUE, GREEN, INK, Line, ORANGE, Panel, RED, SOFT, text,
};
use anyhow::Result;
use plotters::prelude::*;

const SIZE: (u32, u32) = (1080, 660);

/// Where the images begin.
const TOP: i32 = 66;

/// Digits that are shown.
const SHOWN: usize = 10;

/// Draws everything as SVG text.
pub fn picture(outcome: &Outcome) -> Result<String> {
    plot::svg(SIZE, |root| {
        let (digits, charts) = root.split_vertically(222);
        let (left, right) = charts.split_horizontally(SIZE.0 / 2);
        draw_digits(&digits, outcome)?;
        plot::draw(&left, &curve(outcome))?;
        plot::draw(&right, &angles(outcome))
    })
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
            area.draw(&Rectangle::new([corner, end], color.filled()))?;
        }
        let frame = [
            (x, TOP),
            (x + SIDE as i32 * pixel, TOP + SIDE as i32 * pixel),
        ];
        area.draw(&Rectangle::new(frame, SOFT.stroke_width(1)))?;
        let label = outcome.digits.labels[i];
        for (read, y) in [(outcome.before[i], 172), (outcome.after[i], 200)] {
            let color = if read == label { GREEN } else { RED };
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

fn curve(outcome: &Outcome) -> Panel {
    let line = |name: &str, color, points: Vec<(usize, f64)>| Line {
        name: name.into(),
        color,
        thin: false,
        points: points
            .into_iter()
            .map(|(step, share)| (step as f64, 100. * share).into())
            .collect(),
    };
    let start = outcome.curve.first().map_or(0., |point| point.1);
    let level = outcome.curve.iter().map(|(step, _)| (*step, start));
    Panel {
        title: "Accuracy on validation digits".into(),
        x: Axis::linear("steps"),
        y: Axis::linear("accuracy, %").with_range(0., 100.),
        lines: vec![
            line("frozen", RED, level.collect()),
            line("DOFT", GREEN, outcome.curve.clone()),
        ],
    }
}

/// All angles of a layer from the smallest to the largest, over the share of planes.
fn angles(outcome: &Outcome) -> Panel {
    let line = |((name, angles), color): (&(String, Vec<f64>), RGBColor)| {
        let mut degrees: Vec<f64> = angles.iter().map(|a| a.to_degrees()).collect();
        degrees.sort_by(f64::total_cmp);
        let share = |i: usize| 100. * (i as f64 + 0.5) / angles.len() as f64;
        let points = degrees.into_iter().enumerate();
        Line {
            name: name.clone(),
            color,
            thin: false,
            points: points.map(|(i, a)| (share(i), a).into()).collect(),
        }
    };
    let all = outcome.angles.iter().flat_map(|(_, angles)| angles);
    let largest = all.fold(1f64, |largest, a| a.to_degrees().max(largest));
    let layers = outcome.angles.iter().zip([GREEN, BLUE, ORANGE]);
    Panel {
        title: "Rotation angles of each layer's planes".into(),
        x: Axis::linear("planes, from the least to the most turned, %").with_range(0., 100.),
        y: Axis::linear("angle, degrees").with_range(0., (largest / 10.).ceil() * 10.),
        lines: layers.map(line).collect(),
    }
}
