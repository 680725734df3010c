//! Writing a file as a whole: a reader finds the old one or the new one.

use anyhow::{Context, Result, ensure};
use candle_doft::file::replace_with;
use std::io::Write;
use std::path::Path;

/// Replaces `path` by `content`.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let written = replace_with(path, |out| {
        out.write_all(content).map_err(candle_core::Error::wrap)
    });
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Makes a folder and all above it, and sees that a file can be written there before the work begins.
pub fn make_folder(path: &Path) -> Result<()> {
    ensure!(
        !path.is_file(),
        "{} is a file, expected a folder or a new name",
        path.display()
    );
    std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    let written = tempfile::tempfile_in(path);
    written.with_context(|| format!("cannot write into {}", path.display()))?;
    Ok(())
}
