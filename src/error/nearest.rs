//! The names nearest to one that was not found, for errors.

/// How many names an error lists.
const SHOWN: usize = 3;

/// Characters of a name that are compared. A file may hold one of any length, and the time grows with it.
const COMPARED: usize = 500;

/// Up to three of `candidates`, nearest to `wanted` first, ties in their order.
///
/// Paths are long and patterns short, so a candidate counts by its best end: as many dotted segments
/// as `wanted` has, or all of it.
pub(crate) fn nearest<'a>(
    wanted: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Vec<String> {
    let end = wanted.char_indices().nth(COMPARED);
    let wanted = &wanted[..end.map_or(wanted.len(), |(end, _)| end)];
    let segments = wanted.split('.').count();
    let mut scored: Vec<(usize, &str)> = candidates
        .into_iter()
        .map(|path| {
            let tail = match path.rmatch_indices('.').nth(segments - 1) {
                Some((dot, _)) => &path[dot + 1..],
                None => path,
            };
            (distance(wanted, tail).min(distance(wanted, path)), path)
        })
        .collect();
    scored.sort_by_key(|(score, _)| *score);
    scored
        .into_iter()
        .take(SHOWN)
        .map(|(_, path)| path.to_string())
        .collect()
}

// Levenshtein's edit distance, one row of the table at a time.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_finds_its_layer() {
        let paths = ["layers.0.k_proj", "layers.0.q_proj", "head"];
        assert_eq!(nearest("q_prj", paths)[0], "layers.0.q_proj");
        assert_eq!(nearest("haed", paths)[0], "head");
        assert_eq!(distance("kitten", "sitting"), 3);
        assert!(nearest("x", []).is_empty());
    }

    #[test]
    fn a_name_of_megabytes_takes_no_time() {
        let (name, start) = ("ü.".repeat(4_000_000), std::time::Instant::now());
        let found = nearest(&name, std::iter::repeat_n("layers.0.q_proj", 50));
        assert_eq!(found, ["layers.0.q_proj"; 3]);
        assert!(start.elapsed().as_secs() < 5);
    }
}
