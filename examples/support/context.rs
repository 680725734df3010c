//! Where and with what numbers were measured: they mean nothing without it.

use serde::{Deserialize, Serialize};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Context {
    pub cpu: String,
    pub cores: usize,
    pub rustc: String,
    pub candle: String,
    pub allocator: String,
    pub date: String,
    /// Rough numbers, of a short run.
    pub quick: bool,
}

/// This machine, these versions, and today.
pub fn context(quick: bool) -> Context {
    Context {
        cpu: cpu().unwrap_or_else(|| "an unknown processor".into()),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        rustc: rustc().unwrap_or_else(|| "unknown".into()),
        candle: candle().unwrap_or("unknown").into(),
        allocator: "mimalloc".into(),
        date: date(SystemTime::now()),
        quick,
    }
}

fn cpu() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// That of the compiler in the path, which is the one that `cargo bench` builds with.
fn rustc() -> Option<String> {
    let output = Command::new("rustc").arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.split(' ').nth(1)?.to_string())
}

fn candle() -> Option<&'static str> {
    let lock = include_str!("../../Cargo.lock");
    let (_, after) = lock.split_once("name = \"candle-core\"\nversion = \"")?;
    Some(after.split_once('"')?.0)
}

/// `2026-11-25`.
pub fn date(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH);
    let (year, month, day) = civil(since.map_or(0, |since| since.as_secs() / 86_400));
    format!("{year}-{month:02}-{day:02}")
}

/// Year, month and day, `days` after 1970-01-01.
pub fn civil(mut days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month + 1, days + 1)
}
