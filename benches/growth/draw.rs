//! The picture: one panel for each size that grows, both axes logarithmic.

use super::{Grown, METHODS};
use crate::support::plot::{self, Axis, Line, Panel};

pub fn picture(sweeps: &[Grown]) -> anyhow::Result<String> {
    let panels: Vec<Panel> = sweeps.iter().map(panel).collect();
    plot::grid(&panels, 2)
}

fn panel(sweep: &Grown) -> Panel {
    let line = |method: &str| Line {
        name: match method {
            "gemm" => "the two bare products".into(),
            "frozen" => "frozen layer".into(),
            _ => "DOFT".into(),
        },
        color: match method {
            "gemm" => plot::GREY,
            "frozen" => plot::ORANGE,
            _ => plot::GREEN,
        },
        thin: false,
        points: sweep
            .points
            .iter()
            .map(|point| (point.value as f64, 1e3 * point.seconds[method]).into())
            .collect(),
    };
    let times = sweep.points.iter().flat_map(|point| point.seconds.values());
    let (low, high) = times.fold((f64::INFINITY, 0f64), |(low, high), seconds| {
        (low.min(1e3 * seconds), high.max(1e3 * seconds))
    });
    let mut y = Axis::log("ms a step", 2.);
    if low.is_finite() {
        // Whole powers of two above and below, so that a flat line looks flat.
        y = y.with_range(low.log2().floor().exp2(), high.log2().ceil().exp2());
    }
    Panel {
        title: format!("by {} ({})", sweep.name, sweep.fixed),
        x: Axis::log(sweep.name, 2.),
        y,
        lines: METHODS.map(line).into(),
    }
}
