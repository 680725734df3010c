//! What ranks say to one another outside a step: that a phase went well, that they are about the same thing.

use super::{Processes, gather, share};
use crate::error::{Error, Result};
use std::fmt::Display;

/// Bytes of an error's text that other ranks are told.
const TEXT: usize = 512;

/// Returns `result` where every rank has one, else an error on every rank: its own, or that of the first
/// rank that has one. For the end of each phase before the first step, such as reading a file: a rank that
/// returned alone would leave the others waiting.
///
/// # Errors
///
/// That of `result`; [`Error::Rank`] with that of another rank.
///
/// # Examples
///
/// ```
/// # use candle_doft::train::parallel::{Alone, agree};
/// # let group = Alone;
/// let text = std::fs::read_to_string("nowhere").map_err(anyhow::Error::from);
/// assert!(agree(&group, text).is_err());
/// ```
pub fn agree<T, E: From<Error> + Display>(
    group: &dyn Processes,
    result: Result<T, E>,
) -> Result<T, E> {
    if group.size() == 1 {
        return result;
    }
    let failed = gather(group, &[u8::from(result.is_err())])?;
    let Some(first) = failed.iter().position(|flag| flag != &[0]) else {
        return result;
    };
    other(group, first, result.map(drop))
}

/// The error on all ranks, when all know that rank `first` has one.
pub(super) fn other<T, E: From<Error> + Display>(
    group: &dyn Processes,
    first: usize,
    result: Result<(), E>,
) -> Result<T, E> {
    let text = match &result {
        Ok(()) => String::new(),
        // An error of many lines is told by its first, with its causes where they are in it.
        Err(error) => format!("{error:#}").lines().next().unwrap_or("").into(),
    };
    let mut record = text.into_bytes();
    record.resize(TEXT, 0);
    let texts = gather(group, &record)?;
    result?;
    let said = String::from_utf8_lossy(&texts[first]);
    let said = said.trim_end_matches(['\0', char::REPLACEMENT_CHARACTER]);
    Err(rank(first, said).into())
}

pub(super) fn rank(rank: usize, reason: impl Into<String>) -> Error {
    Error::Rank {
        rank,
        reason: reason.into(),
    }
}

/// Whether any rank says so.
///
/// # Errors
///
/// Those of the engine.
///
/// # Examples
///
/// ```
/// # use candle_doft::train::parallel::{Alone, any};
/// assert!(any(&Alone, true)? && !any(&Alone, false)?);
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn any(group: &dyn Processes, said: bool) -> Result<bool> {
    let said = gather(group, &[u8::from(said)])?;
    Ok(said.iter().any(|said| said != &[0]))
}

/// Does on rank 0 alone what only one may do, such as writing a file; it fails on all ranks or on none.
///
/// # Errors
///
/// That of `work` on rank 0, [`Error::Rank`] with it on the others.
///
/// # Examples
///
/// ```
/// # use candle_doft::train::parallel::{Alone, lead};
/// # let group = Alone;
/// let folder = tempfile::tempdir()?;
/// let file = folder.path().join("metrics.jsonl");
/// lead(&group, || anyhow::Ok(std::fs::write(&file, "{}")?))?;
/// assert!(file.exists());
/// # anyhow::Ok(())
/// ```
pub fn lead<E: From<Error> + Display>(
    group: &dyn Processes,
    work: impl FnOnce() -> Result<(), E>,
) -> Result<(), E> {
    let result = match group.rank() {
        0 => work(),
        _ => Ok(()),
    };
    agree(group, result)
}

/// Checks that all ranks have the same `value` of something: flags, a checksum of the data, a number of
/// threads.
///
/// # Errors
///
/// [`Error::Rank`] with the first rank that has another than rank 0, and both.
///
/// # Examples
///
/// ```
/// # use candle_doft::train::parallel::{Alone, same};
/// # let (group, settings) = (Alone, 1);
/// same(&group, "the settings", &format!("{settings:?}"))?;
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn same(group: &dyn Processes, what: &str, value: &str) -> Result<()> {
    let lengths = gather(group, &(value.len() as u64).to_le_bytes())?;
    let length = |bytes: &Vec<u8>| bytes.iter().rev().fold(0, |n, b| n << 8 | usize::from(*b));
    let longest = lengths.iter().map(length).max().unwrap_or(0);
    let mut record = value.as_bytes().to_vec();
    // No text holds this byte, so texts of different lengths differ.
    record.resize(longest + 1, 0xff);
    let records = gather(group, &record)?;
    let Some(other) = records.iter().position(|found| found != &records[0]) else {
        return Ok(());
    };
    let (found, expected) = differing(&records[other], &records[0]);
    let reason = format!(
        "{what}: {found}, expected {expected} as on rank 0; give all ranks the same files and settings"
    );
    Err(rank(other, reason))
}

/// Two texts from where they differ, cut to what fits into a line.
fn differing(a: &[u8], b: &[u8]) -> (String, String) {
    const BEFORE: usize = 40;
    const SHOWN: usize = 120;
    let start = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(0);
    let start = start.saturating_sub(BEFORE);
    let part = |bytes: &[u8]| {
        let bytes = bytes.split(|byte| *byte == 0xff).next().unwrap_or(&[]);
        let shown = bytes.iter().skip(start).take(SHOWN).copied().collect();
        let shown: Vec<u8> = shown;
        String::from_utf8_lossy(&shown).into_owned()
    };
    (part(a), part(b))
}

/// Numbers `work(0)` to `work(count - 1)`, each made by one rank, on all ranks and in order, whatever their
/// number: for a mean over held-out data.
///
/// # Errors
///
/// As [`agree`].
///
/// # Examples
///
/// ```
/// # use candle_doft::{Error, train::parallel::{Alone, each}};
/// # let group = Alone;
/// let losses = each(&group, 3, |chunk| Ok::<_, Error>(chunk as f64))?;
/// assert_eq!(losses, [0., 1., 2.]);
/// # Ok::<(), Error>(())
/// ```
pub fn each<E: From<Error> + Display>(
    group: &dyn Processes,
    count: usize,
    work: impl FnMut(usize) -> Result<f64, E>,
) -> Result<Vec<f64>, E> {
    let mine: Result<Vec<f64>, E> = share(group, count).map(work).collect();
    let mine = agree(group, mine)?;
    // Every rank sends as many as the largest share.
    let width = count.div_ceil(group.size());
    let mut record: Vec<u8> = mine.iter().flat_map(|value| value.to_le_bytes()).collect();
    record.resize(width * 8, 0);
    let mut all = Vec::with_capacity(count);
    for (rank, record) in gather(group, &record)?.iter().enumerate() {
        let share = count * (rank + 1) / group.size() - count * rank / group.size();
        let values = record.chunks_exact(8).take(share);
        all.extend(values.map(|bytes| {
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            f64::from_le_bytes(value)
        }));
    }
    Ok(all)
}
