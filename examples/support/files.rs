//! Writing a file as a whole: a reader finds the old one or the new one.

use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::path::Path;
use tempfile::NamedTempFile;

/// Replaces `path` by `content`.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    replace_by(path, |file| Ok(file.write_all(content)?))
}

/// Replaces `path` by what `content` writes into an empty file.
pub fn replace_by(
    path: &Path,
    content: impl FnOnce(&mut NamedTempFile) -> Result<()>,
) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let write = || -> Result<()> {
        let mut builder = tempfile::Builder::new();
        // A temporary file is readable by its owner alone otherwise.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(folder)?;
        content(&mut file)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
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
