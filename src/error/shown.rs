//! Names from files, made fit for one line of an error.

/// How much of a name is shown.
const SHOWN: usize = 200;

/// A name without control characters, cut where it is long.
pub(crate) fn shown(name: &str) -> String {
    let mut escaped = String::new();
    for c in name.chars().take(SHOWN + 1) {
        match c.is_control() {
            true => escaped.extend(c.escape_default()),
            false => escaped.push(c),
        }
    }
    match escaped.chars().count() > SHOWN {
        true => escaped.chars().take(SHOWN).chain(['…']).collect(),
        false => escaped,
    }
}
