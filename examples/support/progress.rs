//! The progress bar of all examples; nothing where standard error is no terminal.

use indicatif::{ProgressBar, ProgressStyle};

pub fn bar(length: usize, what: &'static str) -> ProgressBar {
    let style = "{prefix:>12} [{bar:40.cyan/blue}] {pos}/{len} {msg} ({eta} left)";
    let style =
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length as u64)
        .with_style(style.progress_chars("=> "))
        .with_prefix(what)
}

/// For a process that shows nothing.
pub fn none() -> ProgressBar {
    ProgressBar::hidden()
}
