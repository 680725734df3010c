//! The memory that a step takes at most, each method alone in a process of its own.

use crate::steps::{self, Shape, calls};
use crate::support::memory::{peak_bytes, status};
use crate::support::stats::{median, median_interval};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::alloc::{GlobalAlloc, Layout};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering::Relaxed};

pub const WHAT: &str = "memory";

const SHAPE: Shape = (512, 1024, 1024);

/// Steps of one process: what the first one leaves behind counts as well.
const STEPS: usize = 5;

/// Every method beside the one that the bound names.
const METHODS: [&str; 10] = [
    "doft",
    "oft",
    "frozen",
    "lora",
    "dora",
    "gemm",
    "candle_linear",
    "candle_lora",
    "candle_dora",
    "candle_oft",
];
const BASELINE: &str = "candle_lora";

/// The flag that asks for one process of one method.
pub const FLAG: &str = "--memory-of";

/// The allocator of the other benches, which counts in a process that asks for it.
pub struct Counting(mimalloc::MiMalloc);

pub const ALLOCATOR: Counting = Counting(mimalloc::MiMalloc);

static COUNTS: AtomicBool = AtomicBool::new(false);
/// Signed: what lived before the count began may be given back.
static LIVE: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

fn took(size: usize) {
    if COUNTS.load(Relaxed) {
        let size = size as isize;
        PEAK.fetch_max(LIVE.fetch_add(size, Relaxed) + size, Relaxed);
    }
}

fn gave(size: usize) {
    if COUNTS.load(Relaxed) {
        LIVE.fetch_sub(size as isize, Relaxed);
    }
}

#[allow(unsafe_code, reason = "an allocator that counts")]
// SAFETY: every call goes on to mimalloc with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both live while the values move.
        took(size);
        gave(layout.size());
        unsafe { self.0.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        gave(layout.size());
        unsafe { self.0.dealloc(pointer, layout) }
    }
}

/// Bytes beyond what lived before the first step: input, weight, upstream gradient, parameters.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Found {
    /// Asked of the allocator and not given back, at most.
    allocated: u64,
    /// The same of the steps after the first, beyond what that one left: the pools of `gemm`, as large
    /// for every method.
    warm: u64,
    /// The growth of the resident memory, where the system tells it: with all that the allocator keeps.
    resident: Option<u64>,
}

/// What comes behind the layer.
#[derive(Clone, Copy, PartialEq)]
enum Loss {
    /// That of `linear_step`, in candle's operations, which itself needs several buffers like y.
    Plain,
    /// None: the gradient is given, as it is in the middle of a model.
    None,
}

impl Loss {
    fn suffix(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::None => ", gradient given",
        }
    }
}

/// The part of a child: some steps, and what they took.
pub fn probe(arguments: &[String]) -> anyhow::Result<Found> {
    let [method, suffix] = arguments else {
        anyhow::bail!("{FLAG} takes a method and what comes behind it")
    };
    COUNTS.store(true, Relaxed);
    let step = steps::untouched(method, SHAPE, 32)?;
    let live = LIVE.load(Relaxed);
    PEAK.store(live, Relaxed);
    let resident = status("VmRSS:");
    // From here on the peak is that of the steps, not of what was before them.
    let reset = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    let run = || match suffix == Loss::None.suffix() {
        true => calls::pass(&step),
        false => step.run(),
    };
    run()?;
    let (first, left) = (PEAK.load(Relaxed), LIVE.load(Relaxed));
    PEAK.store(left, Relaxed);
    for _ in 1..STEPS {
        run()?;
    }
    let allocated = first.max(PEAK.load(Relaxed)) - live;
    let warm = PEAK.load(Relaxed) - left;
    let peak = peak_bytes().filter(|_| reset);
    let grown = peak.zip(resident);
    Ok(Found {
        allocated: allocated as u64,
        warm: warm as u64,
        resident: grown.map(|(peak, before)| peak.saturating_sub(before)),
    })
}

/// Processes of each method, in turns.
const PROCESSES: usize = 6;

/// Every method over the baseline.
pub fn compare(quick: bool) -> anyhow::Result<Vec<Value>> {
    let mut entries = Vec::new();
    for loss in [Loss::Plain, Loss::None] {
        let mut found: BTreeMap<&str, Vec<Found>> = BTreeMap::new();
        for _ in 0..if quick { 1 } else { PROCESSES } {
            for method in METHODS {
                found.entry(method).or_default().push(child(method, loss)?);
            }
        }
        let others = METHODS.iter().filter(|method| **method != BASELINE);
        entries.extend(others.map(|method| entry(method, loss, &found)));
    }
    Ok(entries)
}

fn entry(method: &str, loss: Loss, found: &BTreeMap<&str, Vec<Found>>) -> Value {
    let (above, below) = (&found[method], &found[BASELINE]);
    let pairs = || above.iter().zip(below);
    let allocated = pairs().map(|(a, b)| a.allocated as f64 / b.allocated as f64);
    let ratio = median_interval(&allocated.collect::<Vec<_>>());
    let middle = |found: &[Found], of: fn(&Found) -> Option<u64>| {
        let values: Option<Vec<f64>> = found.iter().map(|f| of(f).map(|v| v as f64)).collect();
        values.map(|values| median(&values) as u64)
    };
    json!({
        "what": WHAT,
        "shape": format!("{}{}", steps::name(SHAPE), loss.suffix()),
        "numerator": method,
        "denominator": BASELINE,
        "median": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "rounds": above.len(),
        "numerator_bytes": middle(above, |f| Some(f.allocated)),
        "denominator_bytes": middle(below, |f| Some(f.allocated)),
        "numerator_warm_bytes": middle(above, |f| Some(f.warm)),
        "denominator_warm_bytes": middle(below, |f| Some(f.warm)),
        "numerator_resident_bytes": middle(above, |f| f.resident),
        "denominator_resident_bytes": middle(below, |f| f.resident),
    })
}

fn child(method: &str, loss: Loss) -> anyhow::Result<Found> {
    let output = Command::new(std::env::current_exe()?)
        .args([FLAG, method, loss.suffix()])
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "memory of `{method}`: {error}");
    Ok(serde_json::from_slice(&output.stdout)?)
}
