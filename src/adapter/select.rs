//! Which layers a configuration selects, and which of its patterns select nothing.

use crate::config::{DoftConfig, LayerKind, Pattern, Targets};
use crate::error::{Error, Result, nearest};

/// Whether the configuration adapts the layer at `path`.
pub(crate) fn selects(config: &DoftConfig, path: &str, kind: LayerKind) -> Result<bool> {
    let wanted = match &config.targets {
        Targets::All => true,
        Targets::AllLinear => kind.is_linear(),
        Targets::None => false,
        Targets::Patterns(patterns) => any(patterns, path)?,
    };
    Ok(wanted && !any(&config.exclude, path)?)
}

fn any(patterns: &[Pattern], path: &str) -> Result<bool> {
    for pattern in patterns {
        if pattern.matches(path)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Refuses a pattern that matches none of `paths`.
pub(crate) fn check_patterns<'a>(
    config: &DoftConfig,
    paths: impl Iterator<Item = &'a str> + Clone,
) -> Result<()> {
    let targets = match &config.targets {
        Targets::Patterns(patterns) => patterns.as_slice(),
        _ => &[],
    };
    let targets = targets.iter().map(|p| ("targets", p));
    let exclude = config.exclude.iter().map(|p| ("exclude", p));
    let rules = config.rules.iter().map(|r| ("rules", &r.pattern));
    for (field, pattern) in targets.chain(exclude).chain(rules) {
        let mut found = false;
        for path in paths.clone() {
            found |= pattern.matches(path)?;
        }
        if !found {
            return Err(Error::NoMatch {
                field,
                pattern: pattern.text().to_string(),
                nearest: nearest(pattern.text(), paths.clone()),
                hint: pattern.hint(),
            });
        }
    }
    Ok(())
}
