//! What each ratio may be at most, and whether it is.

use crate::results::Entry;

/// A line of the table of bounds.
pub struct Bound {
    pub what: &'static str,
    pub at_most: &'static str,
    pub checks: &'static [Check],
}

/// One limit, and the entries that it is for.
pub struct Check {
    what: &'static str,
    /// None: every shape that was measured.
    shape: Option<&'static str>,
    numerator: &'static str,
    denominator: &'static str,
    pub limit: f64,
}

const fn at(
    what: &'static str,
    shape: &'static str,
    (numerator, denominator): (&'static str, &'static str),
    limit: f64,
) -> Check {
    Check {
        what,
        shape: Some(shape),
        numerator,
        denominator,
        limit,
    }
}

/// A step of a linear layer at every shape.
const fn everywhere(numerator: &'static str, denominator: &'static str, limit: f64) -> Check {
    Check {
        what: "linear_step",
        shape: None,
        numerator,
        denominator,
        limit,
    }
}

const STEP: &str = "linear_step";
const CALLS: &str = "linear_calls";
const SQUARE: &str = "512x1024x1024";

/// On 2 cores, medians of interleaved pairs.
pub const BOUNDS: [Bound; 17] = [
    Bound {
        what: "`doft` against `frozen`, b = 32, 512x1024x1024",
        at_most: "1.10",
        checks: &[at(STEP, SQUARE, ("doft", "frozen"), 1.10)],
    },
    Bound {
        what: "the same at 2048x1024x1024 and 128x4096x4096",
        at_most: "1.10",
        checks: &[
            at(STEP, "2048x1024x1024", ("doft", "frozen"), 1.10),
            at(STEP, "128x4096x4096", ("doft", "frozen"), 1.10),
        ],
    },
    Bound {
        what: "the same at 512x3072x768, where the rotation weighs most",
        at_most: "1.18",
        checks: &[at(STEP, "512x3072x768", ("doft", "frozen"), 1.18)],
    },
    Bound {
        what: "`doft` against `oft` (the magnitude's price)",
        at_most: "1.03",
        checks: &[everywhere("doft", "oft", 1.03)],
    },
    Bound {
        what: "`doft` against `candle_lora`",
        at_most: "0.70",
        checks: &[everywhere("doft", "candle_lora", 0.70)],
    },
    Bound {
        what: "`doft` against `candle_dora`",
        at_most: "0.40",
        checks: &[everywhere("doft", "candle_dora", 0.40)],
    },
    Bound {
        what: "`doft` against `candle_oft`",
        at_most: "0.50",
        checks: &[everywhere("doft", "candle_oft", 0.50)],
    },
    Bound {
        what: "b = 8 and b = 128 against `frozen`",
        at_most: "1.15 and 1.40",
        checks: &[
            at(STEP, "512x1024x1024, b = 8", ("doft", "frozen"), 1.15),
            at(STEP, "512x1024x1024, b = 128", ("doft", "frozen"), 1.40),
        ],
    },
    Bound {
        what: "`frozen` against `gemm`, the op's two calls on warm buffers",
        at_most: "1.05",
        checks: &[at(CALLS, SQUARE, ("frozen", "gemm"), 1.05)],
    },
    Bound {
        what: "`frozen` against `gemm`, 512x1024x1024",
        at_most: "1.30",
        checks: &[at(STEP, SQUARE, ("frozen", "gemm"), 1.30)],
    },
    Bound {
        what: "`doft` against `gemm`, the op's calls on warm buffers, 512x1024x1024",
        at_most: "1.20",
        checks: &[at(CALLS, SQUARE, ("doft", "gemm"), 1.20)],
    },
    Bound {
        what: "exact Cayley, forward and backward, b = 32, against the 5-term series",
        at_most: "1.5, and under 2 % of the 512x1024x1024 step",
        checks: &[
            at("rotation", "32x32", ("cayley", "series"), 1.5),
            at("rotation", "32x32", ("cayley", "doft_step"), 0.02),
        ],
    },
    Bound {
        what: "one decoded token, unmerged cached against merged, 1x1024x1024",
        at_most: "1.25",
        checks: &[at("decode", "1x1024x1024", ("cached", "merged"), 1.25)],
    },
    Bound {
        what: "eight rows of 1 and of 64 tokens under eight adapters against one adapter for all, 1024x1024",
        at_most: "1.25",
        checks: &[
            at("serving", "8x1x1024x1024", ("mixed", "one"), 1.25),
            at("serving", "8x64x1024x1024", ("mixed", "one"), 1.25),
        ],
    },
    Bound {
        what: "the same against eight merged layers in turn",
        at_most: "0.25 and 1.10",
        checks: &[
            at("serving", "8x1x1024x1024", ("mixed", "merged"), 0.25),
            at("serving", "8x64x1024x1024", ("mixed", "merged"), 1.10),
        ],
    },
    Bound {
        what: "`llm_step` (SmolLM2's shape, 4x128 tokens, all linear layers adapted) against the bare \
               base and attention products that it contains",
        at_most: "1.6",
        checks: &[at("llm_step", "4x128, 30 layers", ("doft", "gemm"), 1.6)],
    },
    Bound {
        what: "peak memory of a step beyond the inputs and weight, against `candle_lora`",
        at_most: "0.40",
        checks: &[at("memory", SQUARE, ("doft", "candle_lora"), 0.40)],
    },
];

impl Check {
    /// The entries that it is for.
    pub fn of<'a>(&'a self, entries: &'a [Entry]) -> impl Iterator<Item = &'a Entry> {
        let shape = |entry: &Entry| self.shape.is_none_or(|shape| entry.shape == shape);
        entries.iter().filter(move |entry| {
            entry.what == self.what
                && entry.numerator == self.numerator
                && entry.denominator == self.denominator
                && shape(entry)
        })
    }
}

impl Bound {
    /// Whether the medians keep it: `yes`, `no`, how many of them do, or `not measured`.
    pub fn verdict(&self, entries: &[Entry]) -> String {
        let mut kept = Vec::new();
        for check in self.checks {
            let before = kept.len();
            kept.extend(check.of(entries).map(|entry| entry.median <= check.limit));
            if kept.len() == before {
                return "not measured".into();
            }
        }
        match kept.iter().filter(|kept| **kept).count() {
            0 => "no".into(),
            all if all == kept.len() => "yes".into(),
            some => format!("{some} of {}", kept.len()),
        }
    }
}
